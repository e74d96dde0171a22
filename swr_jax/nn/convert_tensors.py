"""Where the parameters of a `LanguageModel` lie among the tensors of a checkpoint, both ways."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from swr_jax.nn.convert_files import Tensor, TensorToStore
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

Fields = Mapping[str, Any]
# Rows compared at once.
_ROWS = 4096


@dataclass(frozen=True)
class Source:
    """Where a parameter lies in a checkpoint."""

    # Name of the tensor; {block}, where it is, stands for the number of the block.
    name: str
    # Shape of that tensor.
    shape: tuple[int, ...]
    # Rows that belong to the parameter.
    rows: slice = slice(None)


@dataclass(frozen=True)
class Layout:
    """What one kind of checkpoint calls its fields and tensors."""

    # The configuration that config.json describes, in float32; ValueError if no model has it.
    config: Callable[[Fields], LanguageModelConfig]
    # Fields of config.json for a configuration, as far as the format can say what it says.
    fields: Callable[[LanguageModelConfig], dict[str, Any]]
    # Sources of all parameters, by their dotted paths; config.json may decide between spellings.
    sources: Callable[[LanguageModelConfig, Fields], dict[str, Source]]
    # Name of the tensor of the embedding.
    embedding: str
    # Tensors that say nothing that config.json does not say.
    ignored: re.Pattern[str] | None = None

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of this name needs no place in a model."""
        return self.ignored is not None and self.ignored.fullmatch(name) is not None


UNEMBEDDING = "lm_head.weight"


def is_tied(layout: Layout, config: LanguageModelConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether embeddings are tied: said so, and no other unembedding is there all the same."""
    if not config.tie_embeddings or UNEMBEDDING not in tensors:
        return config.tie_embeddings
    first, second = tensors.get(layout.embedding), tensors[UNEMBEDDING]
    if first is None or tuple(first.shape) != tuple(second.shape) or first.dtype != second.dtype:
        return False
    starts = range(0, first.shape[0], _ROWS)
    parts = (slice(start, start + _ROWS) for start in starts)
    return all(np.array_equal(first[part], second[part]) for part in parts)


def check_tensors(
    config: LanguageModelConfig,
    sources: Mapping[str, Source],
    tensors: Mapping[str, Tensor],
    ignored: Callable[[str], bool],
) -> None:
    """Raise ValueError that names every tensor that is missing, too many, or of another shape."""
    wanted = {
        source.name.format(block=block): source.shape
        for path, source in sources.items()
        for block in _blocks(config, path)
    }
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            if not ignored(name):
                problems.append(f"{name} is no part of the model that config.json describes")
            continue
        if tuple(tensor.shape) != wanted[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {wanted[name]}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has dtype {tensor.dtype}, which is not a floating one")
    if problems:
        raise ValueError("tensors do not fit: " + "; ".join(problems))


def assemble(
    config: LanguageModelConfig, sources: Mapping[str, Source], tensors: Mapping[str, Tensor]
) -> LanguageModel:
    """Make the model, one parameter after the other, each stacked over the blocks it belongs to."""
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    definition, variables = nnx.split(abstract, nnx.Param)
    parameters = {}
    for path, variable in nnx.to_flat_state(variables):
        dotted = ".".join(map(str, path))
        source = sources[dotted]
        array = np.empty(variable.shape, variable.dtype)
        places = array if path[0] == "periods" else array[None]
        for block, place in zip(_blocks(config, dotted), places, strict=True):
            part = tensors[source.name.format(block=block)][source.rows]
            # Kernels are stored [out, in].
            place[...] = part.T if path[-1] == "kernel" else part
        parameters[path] = jnp.asarray(array)
    return nnx.merge(definition, traverse_util.unflatten_dict(parameters))


def take_apart(
    model: LanguageModel, sources: Mapping[str, Source], dtype: DTypeLike | None
) -> dict[str, TensorToStore]:
    """Make the tensors of a checkpoint from a model, in the order of its blocks.

    Args:
      model: the model; its parameters are read when a tensor is made.
      sources: of all its parameters.
      dtype: of the tensors; None: that of the parameters.
    """
    parameters = {
        ".".join(map(str, path)): variable
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    parts: dict[str, list[tuple[Source, str, int | None]]] = {}
    for path, source in sources.items():
        for row, block in enumerate(_blocks(model.config, path)):
            name = source.name.format(block=block)
            parts.setdefault(name, []).append((source, path, None if block is None else row))

    def stored(name: str) -> TensorToStore:
        shape = parts[name][0][0].shape
        kind = parameters[parts[name][0][1]].dtype if dtype is None else dtype
        kind = np.dtype(jnp.dtype(kind))

        def make() -> np.ndarray:
            tensor = np.empty(shape, kind)
            for source, path, row in parts[name]:
                value = parameters[path][...]
                value = np.asarray(value if row is None else value[row]).astype(kind)
                tensor[source.rows] = value.T if path.endswith(".kernel") else value
            return tensor

        return TensorToStore(shape, kind, make)

    return {name: stored(name) for name in sorted(parts, key=_natural)}


def _blocks(config: LanguageModelConfig, path: str) -> Iterator[int | None]:
    """Numbers of the blocks whose parameter this is, period by period; None for one of no block."""
    if not path.startswith("periods."):
        return iter([None])
    return iter(range(int(path.split(".")[1]), config.depth, len(config.pattern)))


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = name.split(".")
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
