"""Other mixers in the place of a trained model's attention, everything else as it was.

    config, model = swap_mixers(model, {0: "phalanx", 2: "phalanx"}, rngs=nnx.Rngs(0))

What is new has to be trained: `config.distill` of a training run names the model it learns from.
"""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util

from swr_jax.nn.attention import SlidingWindowAttention
from swr_jax.nn.blocks import MIXERS, Block, StackConfig
from swr_jax.nn.language_model import LanguageModel, LanguageModelConfig
from swr_jax.nn.phalanx import GATE_ACTIVATIONS, Phalanx

# Options of the configuration that one mixer alone reads, and its name.
MIXER_OPTIONS: dict[str, str] = {
    "window": "swa",
    "phalanx": "phalanx",
    "mlstm": "mlstm",
    "gated_delta": "gated_delta",
}
INITS = ("average", "fresh")  # of "phalanx"
_LONG = 1024  # tokens that count as all where there is no window

Parameters = dict[str, Any]  # nested, as nnx.to_pure_dict gives them
Flat = dict[tuple[str | int, ...], jax.Array]  # the same by path


def swap_mixers(
    model: LanguageModel,
    layers: Mapping[int, str],
    *,
    init: str = "average",
    rngs: nnx.Rngs,
    **options: Any,
) -> tuple[LanguageModelConfig, LanguageModel]:
    """Put other mixers of the same width in the place of attention.

    All other parameters are those of `model`, bit for bit, stacked anew where the new sequence of
    mixers has another period. `model` is left as it is.

    Args:
      model: a model, of any dtypes, on any devices.
      layers: the new mixer, a name in `MIXERS`, by the number of the layer, 0 being the first.
      init: how "phalanx" starts. "average": with the attention's own value and output projections
        (heads of values repeated where queries share them, biases left out), scaled so that it
        begins as a mean of values that fades with distance; as "fresh" where the features of all
        heads are not the model's width. "fresh": as in a new model, as all other mixers do, but
        for full attention that becomes windowed or the reverse: it keeps its parameters.
      rngs: source of the `params` keys.
      **options: of the configuration that the new mixers read, such as phalanx=PhalanxConfig(...);
        those of the model where not given.

    Returns:
      The configuration of the new model, and that model.

    Raises:
      ValueError: no layer, one that is not there, that has no attention or has the mixer already;
        a mixer or an init of no such name; an option that is not the new mixers' alone.
    """
    config = model.config
    _check_layers(config, layers)
    _check_options(config, layers, options)
    if init not in INITS:
        raise ValueError(f"init={init!r}; it must be one of {', '.join(INITS)}")
    mixers = [layers.get(layer, mixer) for layer, mixer in enumerate(layer_mixers(config))]
    new = dataclasses.replace(config, pattern=shortest_period(mixers), **options)
    definition = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(new, rngs=nnx.Rngs(0))))
    parameters = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    parameters = swapped_parameters(parameters, config, new, init=init, rngs=rngs)
    return new, nnx.merge(definition, parameters)


def layer_mixers(config: StackConfig) -> tuple[str, ...]:
    """The mixer of every layer, from the first to the last."""
    return config.pattern * config.num_periods


def is_attention(config: StackConfig, mixer: str) -> bool:
    """Whether a name in `MIXERS` stands for attention."""
    made = nnx.eval_shape(lambda: MIXERS[mixer](config, nnx.Rngs(0)))
    return isinstance(made, SlidingWindowAttention)


def shortest_period[T: Hashable](sequence: Sequence[T]) -> tuple[T, ...]:
    """The shortest beginning of a sequence that, repeated, is all of it."""
    sequence = tuple(sequence)
    sizes = (size for size in range(1, len(sequence) + 1) if len(sequence) % size == 0)
    repeats = ((sequence[:size], len(sequence) // size) for size in sizes)
    return next(period for period, count in repeats if period * count == sequence)


def swapped_parameters(
    parameters: Parameters,
    old: LanguageModelConfig,
    new: LanguageModelConfig,
    *,
    init: str = "average",
    rngs: nnx.Rngs,
) -> Parameters:
    """Parameters of a model that differs in some layers' mixers; may be traced.

    Args:
      parameters: of the old model.
      old, new: configurations of the same depth, equal in all that both read.
      init, rngs: as for `swap_mixers`.

    Returns:
      Parameters of the new model, stacked as its pattern says, in its dtype.
    """
    stored = traverse_util.flatten_dict(parameters)
    blocks = []
    for layer, (was, now) in enumerate(zip(layer_mixers(old), layer_mixers(new), strict=True)):
        block = _block(stored, old, layer)
        if was != now:
            attention = {path[1:]: value for path, value in block.items() if path[0] == "mixer"}
            mixer = _new_mixer(attention, old, new, now, init=init, rngs=rngs)
            block = {path: value for path, value in block.items() if path[0] != "mixer"}
            block |= {("mixer", *path): value for path, value in mixer.items()}
        blocks.append(block)
    made = {path: value for path, value in stored.items() if path[0] != "periods"}
    for place in range(len(new.pattern)):
        stack = blocks[place :: len(new.pattern)]
        for path in stack[0]:
            made["periods", place, *path] = jnp.stack([block[path] for block in stack])
    return traverse_util.unflatten_dict(
        {path: value.astype(new.param_dtype) for path, value in made.items()}
    )


def _block(stored: Flat, config: LanguageModelConfig, layer: int) -> Flat:
    """Parameters of one layer's block."""
    period, place = divmod(layer, len(config.pattern))
    head = ("periods", place)
    return {path[2:]: value[period] for path, value in stored.items() if path[:2] == head}


def _new_mixer(
    attention: Flat,
    old: LanguageModelConfig,
    new: LanguageModelConfig,
    name: str,
    *,
    init: str,
    rngs: nnx.Rngs,
) -> Flat:
    """Parameters of a mixer that takes the place of attention."""
    mixer = Block(new, name, rngs=rngs).mixer  # The block scales its last projection.
    if isinstance(mixer, SlidingWindowAttention):
        return attention
    made = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(mixer, nnx.Param)))
    output = attention["output", "kernel"]
    if init == "average" and isinstance(mixer, Phalanx) and output.shape[0] == new.features:
        kernel = attention["value", "kernel"]
        heads = kernel.reshape(new.features, old.num_kv_heads or old.num_heads, -1)
        group = output.shape[0] // kernel.shape[1]  # query heads that share a head of values
        values = jnp.repeat(heads, group, axis=1).reshape(new.features, -1)
        shares = jnp.repeat(_share_of_skip(mixer), mixer.head_dim)
        made |= {("output", "kernel"): output, ("value", "kernel"): values * shares}
        if mixer.post_gate is not None:
            made["post_gate", "bias"] = jnp.ones_like(made["post_gate", "bias"])
    return made


def _share_of_skip(mixer: Phalanx) -> jax.Array:
    """What the values of each head [H] are multiplied by, for weights over tokens to sum to 1.

    y = c * SWR(a, b * v) + v is a sum over tokens with weights c b a^n, and 1 more for the last.
    They are counted as of gates in the middle of where they start and a window of mean length.
    """
    if mixer.fixed_decay is None:
        decay = mixer.decay_max * nnx.sigmoid(mixer.decay.bias[...].astype(jnp.float32))
    else:
        decay = jnp.full(mixer.num_heads, mixer.fixed_decay, jnp.float32)
    before = 1.0 if mixer.pre_gate is None else 0.5
    after = 1.0 if mixer.post_gate is None else GATE_ACTIVATIONS[mixer.gate_activation](1.0)
    steps = jnp.arange(_LONG)
    reach = _LONG if mixer.lookback is None else mixer.block_size * (mixer.lookback + 0.5)
    is_global = jnp.arange(mixer.num_heads) >= mixer.num_heads - mixer.global_heads
    seen = jnp.where(is_global[:, None], True, steps < reach)
    return 1 / (1 + before * after * jnp.sum(seen * decay[:, None] ** steps, axis=1))


def _check_layers(config: LanguageModelConfig, layers: Mapping[int, str]) -> None:
    if not layers:
        raise ValueError("layers={}; name at least one layer, as {0: 'phalanx'}")
    mixers = layer_mixers(config)
    for layer, mixer in layers.items():
        if type(layer) is not int or not 0 <= layer < config.depth:
            raise ValueError(
                f"layers has {layer!r}; it must be the number of a layer, from 0 to "
                f"{config.depth - 1}"
            )
        if mixer not in MIXERS:
            raise ValueError(
                f"layers[{layer}]={mixer!r}; it must be one of {', '.join(sorted(MIXERS))}"
            )
        if mixer == mixers[layer]:
            raise ValueError(f"layers[{layer}]={mixer!r} is the mixer it has already; leave it out")
        if not is_attention(config, mixers[layer]):
            raise ValueError(
                f"layers[{layer}]={mixer!r}, but layer {layer} is {mixers[layer]!r}; only "
                "attention can be replaced"
            )


def _check_options(
    config: LanguageModelConfig, layers: Mapping[int, str], options: Mapping[str, Any]
) -> None:
    kept = {mixer for layer, mixer in enumerate(layer_mixers(config)) if layer not in layers}
    for name, value in options.items():
        mixer = MIXER_OPTIONS.get(name)
        if mixer not in layers.values():
            allowed = sorted(n for n, m in MIXER_OPTIONS.items() if m in layers.values())
            raise ValueError(
                f"{name}={value!r} is no option of the new mixers alone; these have "
                f"{', '.join(allowed) or 'none'}"
            )
        if mixer in kept and value != getattr(config, name):
            raise ValueError(
                f"{name}={value!r}, but other layers are {mixer!r} with "
                f"{name}={getattr(config, name)!r}; a model has one such option for all"
            )
