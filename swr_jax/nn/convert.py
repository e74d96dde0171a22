"""Released weights as `LanguageModel`s: xLSTM checkpoints in the layout of Hugging Face.

A checkpoint is a folder: config.json, and the weights as safetensors, in one file or in several
with an index.

    config, model = load_xlstm("xLSTM-7b", dtype="bfloat16", param_dtype="bfloat16")

Reading needs the package safetensors (`pip install 'swr_jax[convert]'`), not torch.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jax.typing import DTypeLike

from swr_jax.nn.blocks import MLSTMConfig
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig

# `eps` is added to the denominator of the mLSTM, so it scales what a head puts out, and the norm of
# the head, next in line, takes scales out again: this much moves logits by about 1e-6 of their
# size. The operator has none, because what it does hangs on the stabiliser, which has no meaning.
_XLSTM_MAX_EPSILON = 1e-5
# Sizes that config.json must give, under one of these names.
_XLSTM_SIZES = (
    ("vocab_size",),
    ("hidden_size", "embedding_dim"),
    ("num_hidden_layers", "num_blocks"),
    ("num_heads",),
)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_cap(value: Any) -> bool:
    return value is None or _is_positive(value)


def _is_small(value: Any) -> bool:
    return value == 0 or (_is_positive(value) and value <= _XLSTM_MAX_EPSILON)


# Options in config.json: the format's default, which values there may be, and the same in words.
_XLSTM_OPTIONS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "qk_dim_factor": (0.5, _is_positive, "above 0"),
    "v_dim_factor": (1.0, _is_positive, "above 0"),
    "ffn_proj_factor": (2.667, _is_positive, "above 0"),
    "ffn_round_up_to_multiple_of": (64, _is_positive, "above 0"),
    "gate_soft_cap": (15.0, _is_cap, "above 0, or null for no cap"),
    "output_logit_soft_cap": (30.0, _is_cap, "above 0, or null for no cap"),
    "norm_eps": (1e-6, _is_positive, "above 0"),
    "eps": (1e-6, _is_small, f"in [0, {_XLSTM_MAX_EPSILON}]"),
    "use_bias": (False, lambda x: x is False, "false: the layers here have no such biases"),
    "tie_word_embeddings": (False, lambda x: isinstance(x, bool), "true or false"),
    "weight_mode": ("single", lambda x: x in ("single", "fused"), "single or fused"),
}


class Tensor(Protocol):
    """What conversion needs of a stored tensor; NumPy arrays have it."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Read a range of the first axis."""


def load_xlstm(
    folder: str | Path, *, dtype: DTypeLike = "float32", param_dtype: DTypeLike = "float32"
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Read an xLSTM checkpoint (arXiv 2503.13427), such as xLSTM-7B, into a `LanguageModel`.

    Tensors are read one after the other, so little more memory is needed than the model takes.

    Args:
      folder: holds config.json and either model.safetensors or model.safetensors.index.json with
        the files that it names.
      dtype: dtype of activations.
      param_dtype: dtype of parameters, whatever dtype they are stored in.

    Returns:
      The model's configuration, and the model with its parameters on the default device.

    Raises:
      FileNotFoundError: a file is missing.
      ImportError: the package safetensors is missing.
      ValueError: an index that does not fit its files, or what `convert_xlstm` refuses.
    """
    folder = Path(folder)
    fields = _read_json(folder / "config.json")
    with _stored_tensors(folder) as tensors:
        return convert_xlstm(fields, tensors, dtype=dtype, param_dtype=param_dtype)


def convert_xlstm(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike = "float32",
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Make a `LanguageModel` of the tensors of an xLSTM checkpoint.

    Fields that only choose kernels and their precision are ignored: gates, norms and recurrences
    are float32 here. So is add_out_norm: the last norm is always there, as in transformers.
    Embeddings are tied where tie_word_embeddings says so and there is no lm_head.weight.

    Args:
      fields: what config.json holds; absent ones have the format's default.
      tensors: by the names of the checkpoint; NumPy arrays, or others that read when indexed.
      dtype, param_dtype: as for `load_xlstm`.

    Raises:
      ValueError: a field of a value that no `LanguageModel` has, tensors that are missing, that
        the model does not have, or whose shape or dtype is another; all of them are named.
    """
    options = _xlstm_options(fields)
    tied = options["tie_word_embeddings"] and "lm_head.weight" not in tensors
    config = _xlstm_config(options, tie_embeddings=tied, dtype=dtype, param_dtype=param_dtype)
    sources = _xlstm_sources(config, fused=options["weight_mode"] == "fused")
    _check_tensors(sources.values(), tensors, config.num_periods)
    return config, _assemble(config, sources, tensors)


def _xlstm_options(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return sizes, under the first of their names, and options, after checking them all."""
    options, problems = {}, []
    if (kind := fields.get("model_type")) != "xlstm":
        problems.append(f"model_type={kind!r}; it must be xlstm")
    for names in _XLSTM_SIZES:
        given = {name: fields[name] for name in names if fields.get(name) is not None}
        if not given:
            problems.append(f"{' or '.join(names)} is missing")
            continue
        options[names[0]], *others = given.values()
        if any(other != options[names[0]] for other in others):
            spelled = ", ".join(f"{name}={value!r}" for name, value in given.items())
            problems.append(f"{spelled}; they must be equal")
        elif not isinstance(options[names[0]], int) or options[names[0]] < 1:
            size = next(f"{name}={value!r}" for name, value in given.items())
            problems.append(f"{size}; it must be an integer of at least 1")
    for name, (default, is_allowed, rule) in _XLSTM_OPTIONS.items():
        options[name] = fields.get(name, default)
        if not is_allowed(options[name]):
            problems.append(f"{name}={options[name]!r}; it must be {rule}")
    if problems:
        raise ValueError("config.json does not describe a model of here: " + "; ".join(problems))
    return options


def _xlstm_config(
    options: Mapping[str, Any],
    *,
    tie_embeddings: bool,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> LanguageModelConfig:
    features, multiple = options["hidden_size"], options["ffn_round_up_to_multiple_of"]
    # Not quite rounded up, but what the format does: 256.03 becomes 256 and not 320.
    mlp_features = features * options["ffn_proj_factor"] + multiple - 1
    return LanguageModelConfig(
        vocab_size=options["vocab_size"],
        features=features,
        depth=options["num_hidden_layers"],
        pattern=("mlstm",),
        mlp_features=int(mlp_features // multiple * multiple),
        mlstm=MLSTMConfig(
            num_heads=options["num_heads"],
            # The format rounds these widths down, MLSTM to the nearest.
            qk_dim_factor=int(features * options["qk_dim_factor"]) / features,
            v_dim_factor=int(features * options["v_dim_factor"]) / features,
            gate_soft_cap=options["gate_soft_cap"],
            head_norm="layer",
            input_gate="exp",
        ),
        tie_embeddings=tie_embeddings,
        logits_soft_cap=options["output_logit_soft_cap"],
        norm_epsilon=options["norm_eps"],
        dtype=dtype,
        param_dtype=param_dtype,
    )


@dataclass(frozen=True)
class _Source:
    """Where a parameter lies in a checkpoint."""

    # Name of the tensor; {block}, where it is, stands for the number of the block.
    name: str
    # Shape of that tensor.
    shape: tuple[int, ...]
    # Rows that belong to the parameter.
    rows: slice = slice(None)


def _xlstm_sources(config: LanguageModelConfig, *, fused: bool) -> dict[str, _Source]:
    """Sources of all parameters of the model, by their dotted paths."""
    features, heads, hidden = config.features, config.mlstm.num_heads, config.hidden_features
    qk = round(features * config.mlstm.qk_dim_factor)
    v = round(features * config.mlstm.v_dim_factor)
    block, path = "backbone.blocks.{block}", "periods.0"
    layer, ffn = f"{block}.mlstm_layer", f"{block}.ffn"
    sources = {
        "embedding": _Source("backbone.embeddings.weight", (config.vocab_size, features)),
        "norm.scale": _Source("backbone.out_norm.weight", (features,)),
        f"{path}.mixer_norm.scale": _Source(f"{block}.norm_mlstm.weight", (features,)),
        f"{path}.mlp_norm.scale": _Source(f"{block}.norm_ffn.weight", (features,)),
        f"{path}.mixer.head_norm.scale": _Source(f"{layer}.multihead_norm.weight", (v,)),
        f"{path}.mixer.output.kernel": _Source(f"{layer}.out_proj.weight", (features, v)),
        f"{path}.mlp.down.kernel": _Source(f"{ffn}.proj_down.weight", (features, hidden)),
    }
    if not config.tie_embeddings:
        sources["unembedding.kernel"] = _Source("lm_head.weight", (config.vocab_size, features))

    inputs = {
        "mixer.query": ("q", qk),
        "mixer.key": ("k", qk),
        "mixer.value": ("v", v),
        "mixer.output_gate": ("ogate_preact", v),
    }
    gates = {
        "mixer.input_gate": ("igate_preact", heads),
        "mixer.forget_gate": ("fgate_preact", heads),
    }
    ups = {"mlp.gate": ("proj_up_gate", hidden), "mlp.up": ("proj_up", hidden)}
    # Projections of the same input: one tensor each, or the rows of one for all of them.
    for parent, joint, parts, kind, stored_kind, inner in (
        (layer, "qkv_opreact", inputs, "kernel", "weight", (features,)),
        (layer, "ifgate_preact", gates, "kernel", "weight", (features,)),
        (layer, "ifgate_preact", gates, "bias", "bias", ()),
        (ffn, "proj_up_gate_z", ups, "kernel", "weight", (features,)),
    ):
        start, total = 0, sum(size for _, size in parts.values())
        for part, (name, size) in parts.items():
            if fused:
                source = _Source(
                    f"{parent}.{joint}.{stored_kind}", (total, *inner), slice(start, start + size)
                )
            else:
                source = _Source(f"{parent}.{name}.{stored_kind}", (size, *inner))
            sources[f"{path}.{part}.{kind}"] = source
            start += size
    return sources


def _check_tensors(
    sources: Iterable[_Source], tensors: Mapping[str, Tensor], num_blocks: int
) -> None:
    wanted = {
        source.name.format(block=block): source.shape
        for source in sources
        for block in range(num_blocks)
    }
    problems = [f"{name} is missing" for name in wanted if name not in tensors]
    for name, tensor in tensors.items():
        if name not in wanted:
            problems.append(f"{name} is no part of the model that config.json describes")
            continue
        if tuple(tensor.shape) != wanted[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)} instead of {wanted[name]}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            problems.append(f"{name} has dtype {tensor.dtype}, which is not a floating one")
    if problems:
        raise ValueError("tensors do not fit: " + "; ".join(problems))


def _assemble(
    config: LanguageModelConfig, sources: Mapping[str, _Source], tensors: Mapping[str, Tensor]
) -> LanguageModel:
    """Make the model, one parameter after the other, each stacked over the blocks it belongs to."""
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    definition, variables = nnx.split(abstract, nnx.Param)
    parameters = {}
    for path, variable in nnx.to_flat_state(variables):
        source = sources[".".join(map(str, path))]
        array = np.empty(variable.shape, variable.dtype)
        blocks = array if path[0] == "periods" else array[None]
        for block, place in enumerate(blocks):
            part = tensors[source.name.format(block=block)][source.rows]
            # Kernels are stored [out, in].
            place[...] = part.T if path[-1] == "kernel" else part
        parameters[path] = jnp.asarray(array)
    return nnx.merge(definition, traverse_util.unflatten_dict(parameters))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__} and not a JSON object")
    return content


@dataclass(frozen=True)
class _StoredTensor:
    """A tensor in an open file, of which nothing is read before it is indexed."""

    stored: Any  # what safetensors calls a slice: of the whole tensor, to be sliced

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.get_shape())

    @property
    def dtype(self) -> np.dtype:
        return self.stored[:0].dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.stored[rows]


@contextlib.contextmanager
def _stored_tensors(folder: Path) -> Iterator[dict[str, _StoredTensor]]:
    """Open a checkpoint's files; nothing can be read any more once the context has ended."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "checkpoints need the package 'safetensors': pip install 'swr_jax[convert]'"
        ) from error
    index_path = folder / "model.safetensors.index.json"
    index = None
    if index_path.exists() and (index := _read_json(index_path).get("weight_map")) is None:
        raise ValueError(f"{index_path} has no weight_map")
    tensors, misplaced = {}, []
    with contextlib.ExitStack() as stack:
        for name in sorted({"model.safetensors"} if index is None else set(index.values())):
            try:
                opened = safetensors.safe_open(folder / name, framework="numpy")
            except safetensors.SafetensorError as error:
                raise ValueError(f"{folder / name} is no safetensors file: {error}") from error
            file = stack.enter_context(opened)
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                tensors[key] = _StoredTensor(file.get_slice(key))
                if index is not None and index.get(key) != name:
                    misplaced.append(f"{key} is in {name}, where the index does not have it")
        misplaced += [f"{key} is not in {index[key]}" for key in index or () if key not in tensors]
        if misplaced:
            raise ValueError(f"{index_path} does not fit its files: " + "; ".join(misplaced))
        yield tensors
