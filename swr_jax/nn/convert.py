"""Released weights as `LanguageModel`s and back, in the layout of Hugging Face.

A checkpoint is a folder: config.json, and the weights as safetensors, in one file or in several
with an index.

    config, model = load_pretrained("Qwen3-0.6B", dtype="bfloat16", param_dtype="bfloat16")
    save_pretrained(model, "mine", source="Qwen3-0.6B")

What config.json calls model_type decides: `MODEL_TYPES` are Llama 2 and 3, Mistral, Qwen 2 and 3,
Gemma 1, 2 and 3 (text) and xLSTM. What no `LanguageModel` computes is refused by name, field by
field. Files need the package safetensors (`pip install 'swr_jax[convert]'`), not torch.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from swr_jax.nn.convert_arithmetic import differences
from swr_jax.nn.convert_files import (
    CONFIG_NAME,
    Tensor,
    check_is_free,
    read_json,
    stored_tensors,
    write_checkpoint,
)
from swr_jax.nn.convert_tensors import (
    UNEMBEDDING,
    Layout,
    assemble,
    check_tensors,
    is_tied,
    take_apart,
)
from swr_jax.nn.convert_transformer import TRANSFORMERS
from swr_jax.nn.convert_xlstm import XLSTM
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig
from swr_jax.nn.swap import swap_mixers

__all__ = [
    "MODEL_TYPES",
    "convert_pretrained",
    "convert_xlstm",
    "load_pretrained",
    "load_xlstm",
    "save_pretrained",
    "swap_mixers",
]

_LAYOUTS: dict[str, Layout] = {**TRANSFORMERS, "xlstm": XLSTM}
# In the order in which a model that several can describe is written.
MODEL_TYPES = tuple(_LAYOUTS)
# Fields of config.json that are right for a model of another arithmetic too.
_KEPT = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "initializer_range",
    "use_cache",
)
_SHARD_BYTES = 5 * 10**9


def load_pretrained(
    folder: str | Path, *, dtype: DTypeLike = "float32", param_dtype: DTypeLike = "float32"
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Read a checkpoint of one of `MODEL_TYPES` into a `LanguageModel`.

    Tensors are read one after the other, so little more memory is needed than the model takes.
    Logits agree with those of transformers to a relative RMS of 1e-4 in float32.

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
      ValueError: an index that does not fit its files, or what `convert_pretrained` refuses.
    """
    return _load(folder, MODEL_TYPES, dtype, param_dtype)


def convert_pretrained(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike = "float32",
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Make a `LanguageModel` of the tensors of a checkpoint.

    Fields that say nothing of the arithmetic are ignored, such as those of training (dropout), of
    kernels and of lengths. Blocks of layer_types that repeat are scanned together; where they do
    not repeat evenly (Gemma 3 with 26 layers), all of them are one period, and compile time grows
    with them. Embeddings are tied where tie_word_embeddings says so and there is no other
    lm_head.weight.

    Args:
      fields: what config.json holds; absent ones mean what they do in transformers.
      tensors: by the names of the checkpoint; NumPy arrays, or others that read when indexed.
      dtype, param_dtype: as for `load_pretrained`.

    Raises:
      ValueError: a field of a value that no `LanguageModel` has, tensors that are missing, that
        the model does not have, or whose shape or dtype is another; all of them are named.
    """
    return _convert(fields, tensors, MODEL_TYPES, dtype, param_dtype)


def load_xlstm(
    folder: str | Path, *, dtype: DTypeLike = "float32", param_dtype: DTypeLike = "float32"
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Read an xLSTM checkpoint (arXiv 2503.13427), such as xLSTM-7B, as `load_pretrained` does.

    Raises:
      FileNotFoundError, ImportError, ValueError: as there; and another model_type.
    """
    return _load(folder, ("xlstm",), dtype, param_dtype)


def convert_xlstm(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike = "float32",
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Make a `LanguageModel` of the tensors of an xLSTM checkpoint, as `convert_pretrained` does.

    Fields that only choose kernels and their precision are ignored: gates, norms and recurrences
    are float32 here. So is add_out_norm: the last norm is always there, as in transformers.

    Raises:
      ValueError: as there; and another model_type.
    """
    return _convert(fields, tensors, ("xlstm",), dtype, param_dtype)


def save_pretrained(
    model: LanguageModel,
    folder: str | Path,
    *,
    model_type: str | None = None,
    source: str | Path | None = None,
    fields: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> None:
    """Write a model as a checkpoint that transformers loads, and `load_pretrained` too.

    What was loaded and is saved in its own dtype has the bytes that it had. The folder is written
    beside its place and moved there when it is whole. Saving needs all parameters in this process.

    Args:
      model: the model.
      folder: where to; not there yet, or empty.
      model_type: one of `MODEL_TYPES`; None: that of `source`, or the first that can describe the
        model.
      source: folder of the checkpoint that the model came from: its config.json is kept where it
        still describes the model, else only the fields that any model may have (special tokens,
        lengths); and the files of its tokenizer are copied.
      fields: more of config.json, such as max_position_embeddings, bos_token_id, eos_token_id.
      dtype: of the tensors; None: that of the parameters.
      shard_bytes: where tensors would be more, another file begins.

    Raises:
      FileExistsError: the folder holds something.
      FileNotFoundError: `source` has no config.json.
      ImportError: the package safetensors is missing.
      ValueError: no such model_type, or none can describe the model; what it cannot say is named.
    """
    folder = Path(folder)
    check_is_free(folder)
    source = None if source is None else Path(source)
    kept = {} if source is None else read_json(source / CONFIG_NAME)
    if model_type is None:
        model_type = kept.get("model_type")
    described, layout = _describe(model.config, model_type, kept)
    if fields is not None:
        described |= fields
        if found := differences(layout.config(described), model.config):
            raise ValueError(f"fields={dict(fields)!r} changes the model: " + "; ".join(found))
    stored = jnp.dtype(model.embedding.dtype if dtype is None else dtype).name
    is_old = "torch_dtype" in described and "dtype" not in described
    described["torch_dtype" if is_old else "dtype"] = stored
    sources = layout.sources(model.config, described)
    write_checkpoint(
        folder,
        described,
        take_apart(model, sources, dtype),
        companions=source,
        shard_bytes=shard_bytes,
    )


def _load(
    folder: str | Path, model_types: tuple[str, ...], dtype: DTypeLike, param_dtype: DTypeLike
) -> tuple[LanguageModelConfig, LanguageModel]:
    folder = Path(folder)
    fields = read_json(folder / CONFIG_NAME)
    with stored_tensors(folder) as tensors:
        return _convert(fields, tensors, model_types, dtype, param_dtype)


def _convert(
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model_types: tuple[str, ...],
    dtype: DTypeLike,
    param_dtype: DTypeLike,
) -> tuple[LanguageModelConfig, LanguageModel]:
    layout = _layout(fields.get("model_type"), model_types, fields)
    config = dataclasses.replace(layout.config(fields), dtype=dtype, param_dtype=param_dtype)
    config = dataclasses.replace(config, tie_embeddings=is_tied(layout, config, tensors))
    sources = layout.sources(config, fields)
    # An unembedding that is tied may be written out all the same.
    spare = {UNEMBEDDING} if config.tie_embeddings else set()
    check_tensors(config, sources, tensors, lambda name: name in spare or layout.is_ignored(name))
    return config, assemble(config, sources, tensors)


def _layout(model_type: Any, model_types: tuple[str, ...], fields: Mapping[str, Any]) -> Layout:
    if model_type in model_types:
        return _LAYOUTS[model_type]
    rule = "it must be " + ("" if len(model_types) == 1 else "one of ") + ", ".join(model_types)
    if "text_config" in fields:
        rule += "; this one has more than text: save its text model alone, with its text_config"
    raise ValueError(f"model_type={model_type!r}; {rule}")


def _describe(
    config: LanguageModelConfig, model_type: str | None, kept: Mapping[str, Any]
) -> tuple[dict[str, Any], Layout]:
    """Return fields of config.json that mean this configuration, and how they are read."""
    mixers = {*config.pattern}
    possible = TRANSFORMERS if mixers <= {"attention", "swa"} else {"xlstm": XLSTM}
    if possible is not TRANSFORMERS and mixers != {"mlstm"}:
        raise ValueError(
            f"pattern={config.pattern}; checkpoints have attention and swa alone, or mlstm alone"
        )
    if model_type is not None:
        layout = _layout(model_type, tuple(possible), {})
        described = {**kept, "tie_word_embeddings": config.tie_embeddings}
        if kept.get("model_type") == model_type and not differences(
            layout.config(described), config
        ):
            return described, layout
        possible = {model_type: layout}
    unfit = {}
    for name, layout in possible.items():
        described = layout.fields(config)
        unfit[name] = differences(layout.config(described), config)
        if not unfit[name]:
            return {name: kept[name] for name in _KEPT if name in kept} | described, layout
    nearest = min(unfit, key=lambda name: len(unfit[name]))
    raise ValueError(
        f"no checkpoint of model_type={nearest!r} describes the model: it would have "
        + "; ".join(unfit[nearest])
        + ("" if len(unfit) == 1 else f". It comes nearest among {', '.join(unfit)}")
    )
