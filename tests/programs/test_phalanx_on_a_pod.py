"""Phalanx in a scanned, rematerialised, sharded model, compiled by the TPU's compiler for a pod."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding

from pallas_kernels import targets
from swr_jax.nn import LanguageModel, LanguageModelConfig

pytestmark = pytest.mark.targets

SIZES = {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 2}
BATCH, TIME, FEATURES = 4, 384, 4096
# Elements of one device's part of [B, T, M]; of no parameter's part is it a divisor.
PART = BATCH * TIME * FEATURES // 16
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%[\w.-]+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?(%[\w.-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def program():
    """Text of a loss's gradient, by all parameters, of a model of Phalanx layers on v5e:4x4."""
    config = LanguageModelConfig(
        vocab_size=256,
        features=FEATURES,
        depth=3,
        pattern=("phalanx",),
        mlp_features=FEATURES,
        remat="full",
        dtype="bfloat16",
    )
    devices = np.array(targets.devices("v5e", "4x4", kernels=False)).reshape(tuple(SIZES.values()))
    mesh = Mesh(devices, tuple(SIZES), axis_types=(AxisType.Auto,) * 4)
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    definition, parameters = nnx.split(model)
    rules = {"heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}

    def place(variable):
        axes = (rules.get(name) for name in variable.get_metadata("out_sharding"))
        sharding = NamedSharding(mesh, jax.P(*axes))
        value = variable.get_value()
        return variable.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    parameters = jax.tree.map(place, parameters, is_leaf=lambda x: isinstance(x, nnx.Variable))
    tokens = NamedSharding(mesh, jax.P("data", "sequence"))
    tokens = jax.ShapeDtypeStruct((BATCH, TIME), jnp.int32, sharding=tokens)

    def loss(parameters, tokens, segment_ids):
        logits = nnx.merge(definition, parameters)(tokens, segment_ids=segment_ids)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1))

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).lower(parameters, tokens, tokens)
        return lowered.compile().as_text()


def layers(program):
    """Computations with a kernel of ours in them: the bodies of the two scans over layers."""
    computations = dict(_COMPUTATION.findall(program))
    bodies = [name for name, body in computations.items() if "tpu_custom_call" in body]
    return computations, bodies


def test_kernels_are_in_the_loops_over_layers(program):
    computations, bodies = layers(program)
    kernels = [re.findall(r"%(swr_\w+?)(?:\.\d+)? = ", computations[name]) for name in bodies]
    backward = ["swr_gated_backward", "swr_gated_forward"]  # the second one rematerialised
    assert sorted(map(sorted, kernels)) == [backward, ["swr_gated_forward"]]


def test_nothing_is_transposed_or_copied_between_projections_and_kernels(program):
    computations, bodies = layers(program)
    found, seen, waiting = [], set(), list(bodies)
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        seen.add(name)
        for line in computations[name].splitlines():
            waiting += re.findall(r"(?:calls|to_apply)=(%[\w.-]+)", line)
            if instruction := _INSTRUCTION.match(line):
                size = math.prod(int(n) for n in instruction[1].split(",") if n)
                if size % PART == 0 and instruction[2] in ("copy", "transpose"):
                    found.append(line.strip())
    assert found == []


def test_only_a_carrier_travels_along_the_sequence(program):
    computations, bodies = layers(program)
    for name in bodies:
        shapes = re.findall(
            r"= \(?\w+\[([\d,]*)\]\S*.* collective-permute(?:-start)?\(", computations[name]
        )
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        # The carrier of one row of the batch over this device's heads, once each way.
        assert sizes
        assert set(sizes) == {BATCH // SIZES["data"] * FEATURES // SIZES["tensor"]}
