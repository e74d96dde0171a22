"""What decoding and reading prompts would take on chips that are not here.

The steps are those of `swr_jax.generate`: `decode` draws one token for each of B streams that have
a context behind them; `prefill` reads one chunk of each of B prompts, the last of such a context.
Parameters lie on a mesh as in training, in the dtype of the computation; states are split over
streams by `data` and `fsdp`, and over heads by `tensor`. Memory is what the chip's compiler
allocates, times are made as in `swr_jax.train.plan`, with one more, which GPUs have too: the floor,
in which memory at its peak moves parameters and states once.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from pallas_kernels import targets
from swr_jax.generate.sampling import GREEDY, SamplingArrays
from swr_jax.generate.streams import Streams, check_chunk, decode, new_streams, read_piece
from swr_jax.nn.attention import AttentionState
from swr_jax.nn.language_model import LanguageModel, num_parameters
from swr_jax.ops.gated_delta import GatedDeltaState
from swr_jax.ops.mlstm_state import MLSTMState
from swr_jax.ops.state import RecurrenceState
from swr_jax.train.config import TrainConfig
from swr_jax.train.plan import compile_step, parse_topology, step_times
from swr_jax.train.sharding import BATCH_AXES, logical_axes, make_mesh, param_shardings

MODES = ("decode", "prefill")

# Where a state's arrays [periods, B, ...] have their heads; others are whole on every device.
_HEADS: dict[type, dict[str, int]] = {
    AttentionState: {"keys": 3, "values": 3},
    RecurrenceState: {"local": 2, "carriers": 3, "decays": 3},
    MLSTMState: {"memory": 2, "normalizer": 2, "stabilizer": 2},
    GatedDeltaState: {"memory": 2},
}


def make_inference_plan(
    config: TrainConfig, topology: str, *, mode: str, streams: int, context: int, chunk: int = 512
) -> dict[str, Any]:
    """Compile a step of generation for a topology, and say what it would take.

    Args:
        config: with the model and the mesh; `model.vocab_size` set.
        topology: such as "v5e:2x2" or "h100:1x1x1"; see `swr_jax.train.plan.parse_topology`.
        mode: "decode" or "prefill".
        streams: B, side by side.
        context: tokens that full attention has room for.
        chunk: tokens of each prompt that are read at once.

    Returns:
        A JSON-able record, as `make_plan` returns it: of a device and one step.

    Raises:
        ValueError: an option out of range, or the mesh does not fit the topology or the streams.
        MissingCompilerError: the optional dependency `targets` is not installed.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: must be one of {', '.join(MODES)}")
    if context < 1:
        raise ValueError(f"context={context}: must be at least 1")
    if mode == "prefill":
        check_chunk(chunk)
        if chunk > context:
            raise ValueError(f"chunk={chunk}: must be at most context={context}")
    name, shape = parse_topology(topology)
    chip = targets.CHIPS[name]
    devices = targets.devices(name, shape, kernels=False)
    mesh = make_mesh(config.mesh, devices)
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if streams < 1 or streams % parts:
        raise ValueError(
            f"streams={streams}: must be a multiple of mesh.data x mesh.fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {parts}"
        )
    model_config = dataclasses.replace(config.model, param_dtype=config.model.dtype, remat="none")
    model = nnx.eval_shape(lambda: LanguageModel(model_config, rngs=nnx.Rngs(0)))
    graphdef, variables = nnx.split(model, nnx.Param)
    params = _parameters(variables, mesh)
    abstract = jax.eval_shape(lambda: new_streams(model, streams, max_length=context))
    placed = _placed(abstract, mesh)

    def split(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, jax.P(BATCH_AXES))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    options = jax.tree.map(split, SamplingArrays.of([GREEDY] * streams))
    tokens = split(jax.ShapeDtypeStruct((streams, chunk), jnp.int32))

    def trace() -> jax.stages.Traced:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # operators split along its axes
            if mode == "decode":
                return decode.trace(graphdef, params, placed, options, steps=1)
            return read_piece.trace(graphdef, params, placed, tokens)

    held = {"parameters": _device_bytes(params), "states": _device_bytes(placed)}
    found, program, cost = compile_step(trace, chip, devices[0])
    advanced = streams * (chunk if mode == "prefill" else 1)
    plan = {
        "mode": mode,
        "topology": topology,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "streams": streams,
        "context": context,
        "tokens_per_step": advanced,
        "parameters": num_parameters(model),
        "state_bytes_per_stream": _bytes(abstract.state) // streams,
        "memory_limit": chip.memory_bytes,
        "held": held,
        "floor_seconds": sum(held.values()) / chip.hbm_bytes_per_second,
        **found,
    }
    if program is None:
        return plan
    plan |= step_times(chip, program, cost)
    if "seconds" in plan:
        plan["tokens_per_second"] = advanced / plan["seconds"]
    return plan


def _parameters(variables: nnx.State, mesh: Mesh) -> Any:
    params = nnx.to_pure_dict(variables)
    shardings = param_shardings(params, logical_axes(variables), mesh)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        params,
        shardings,
    )


def _placed(streams: Streams, mesh: Mesh) -> Streams:
    """Streams with a place on the mesh for every array."""

    def place(x: jax.ShapeDtypeStruct, batch_axis: int, heads_axis: int | None):
        spec: list[Any] = [None] * x.ndim
        spec[batch_axis] = BATCH_AXES
        if heads_axis is not None and x.shape[heads_axis] % mesh.shape["tensor"] == 0:
            spec[heads_axis] = "tensor"
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, jax.P(*spec)))

    def place_state(state: Any) -> Any:
        heads = _HEADS.get(type(state))
        if heads is None:  # an array outside of these
            return place(state, 1, None)
        return dataclasses.replace(
            state,
            **{
                field.name: place(value, 1, heads.get(field.name))
                for field in dataclasses.fields(state)
                if isinstance(value := getattr(state, field.name), jax.ShapeDtypeStruct)
            },
        )

    return Streams(
        logits=place(streams.logits, 0, None),
        state=jax.tree.map(place_state, streams.state, is_leaf=lambda x: type(x) in _HEADS),
        drawn=place(streams.drawn, 0, None),
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )
