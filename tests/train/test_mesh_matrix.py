"""Loss and gradients over every mesh of eight devices, for every pattern, against one device."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from mesh_cases import collectives
from training_cases import VOCAB, random_batch

from swr_jax.data import DataConfig
from swr_jax.nn.blocks import GatedDeltaConfig, MLSTMConfig, PhalanxConfig
from swr_jax.nn.language_model import LanguageModelConfig
from swr_jax.train.config import MeshConfig, TrainConfig
from swr_jax.train.sharding import MESH_AXES, batch_sharding, make_mesh, put_batch
from swr_jax.train.state import init_state, make_blueprint
from swr_jax.train.step import gradient_and_sums

FLOAT32 = 1e-5
BATCH, LENGTH = 8, 64
PATTERNS = (("attention",), ("phalanx", "attention"), ("swa",), ("swa", "mlstm"), ("gated_delta",))
MESHES = [
    (data, fsdp, tensor, 8 // (data * fsdp * tensor))
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    if data * fsdp * tensor <= 8
]


def config_of(pattern: tuple[str, ...]) -> TrainConfig:
    """Three periods of width 32, eight heads; a window reaches over two cuts into eight parts."""
    return TrainConfig(
        model=LanguageModelConfig(
            vocab_size=VOCAB,
            features=32,
            depth=3 * len(pattern),
            pattern=pattern,
            num_heads=8,
            num_kv_heads=4,
            window=12,
            mlp_features=96,
            norm_epsilon=1e-3,  # A norm would magnify what rounding does to small heads.
            phalanx=PhalanxConfig(head_dim=4, block_size=4),
            mlstm=MLSTMConfig(num_heads=8, chunk_size=16),
            gated_delta=GatedDeltaConfig(num_heads=8, head_dim=4, chunk_size=16),
        ),
        data=DataConfig(sequence_length=LENGTH, batch_size=BATCH),
    )


@functools.cache
def parameters(pattern: tuple[str, ...]):
    """Initial parameters, of any mesh."""
    config = config_of(pattern)
    return jax.device_get(init_state(config, make_blueprint(config, mesh_of((1, 1, 1, 1)))).params)


def mesh_of(sizes: tuple[int, ...]) -> Mesh:
    sizes = dict(zip(MESH_AXES, sizes, strict=True))
    return make_mesh(MeshConfig(**sizes), jax.devices()[: math.prod(sizes.values())])


def run(pattern: tuple[str, ...], sizes: tuple[int, ...]):
    """Loss, gradient of every parameter, and the compiled program."""
    mesh = mesh_of(sizes)
    blueprint = make_blueprint(config_of(pattern), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, blueprint.abstract.params)
    params = jax.device_put(parameters(pattern), shardings)
    batch = put_batch(random_batch(BATCH, LENGTH), batch_sharding(mesh))
    step = jax.jit(
        lambda params, batch: gradient_and_sums(blueprint, params, batch, mesh=mesh, z_loss=1e-3),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    step = step.lower(params, batch).compile()
    gradient, sums = step(params, batch)
    return float(sums["nats"] / sums["weight"]), jax.device_get(gradient), step.as_text()


@functools.cache
def on_one_device(pattern: tuple[str, ...]):
    """Loss and gradient to compare with."""
    return run(pattern, (1, 1, 1, 1))[:2]


def check(pattern: tuple[str, ...], sizes: tuple[int, ...]) -> str:
    """Compare loss and every parameter's gradient; return the compiled program."""
    loss, gradient, program = run(pattern, sizes)
    wanted_loss, wanted = on_one_device(pattern)
    assert loss == pytest.approx(wanted_loss, rel=FLOAT32)
    for (path, got), exact in zip(
        jax.tree.leaves_with_path(gradient), jax.tree.leaves(wanted), strict=True
    ):
        error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
        assert error <= FLOAT32, f"{jax.tree_util.keystr(path)}: {error:.2e}"
    return program


def shapes(program: str) -> set[tuple[int, ...]]:
    """Shapes of all arrays of a compiled program."""
    found = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program)
    return {tuple(map(int, shape.split(","))) for shape in found}


def name_of(sizes: tuple[int, ...]) -> str:
    return " ".join(f"{axis}{n}" for axis, n in zip(MESH_AXES, sizes, strict=True) if n > 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
@pytest.mark.parametrize("pattern", PATTERNS, ids="+".join)
def test_every_mesh_computes_what_one_device_does(pattern, sizes):
    found = shapes(check(pattern, sizes))
    split = dict(zip(MESH_AXES, sizes, strict=True))
    if split["tensor"] > 1:  # No device ever holds logits over the whole vocabulary,
        assert [shape for shape in found if VOCAB in shape] == []
    if split["sequence"] > 1 and "attention" not in pattern:  # nor features of all tokens of a row.
        rows = BATCH // (split["data"] * split["fsdp"])
        assert [shape for shape in found if len(shape) > 2 and shape[:2] == (rows, LENGTH)] == []


def test_one_gathering_in_each_layer_of_full_attention():
    """Of keys and values, whose gradients are added up on their way back; one of identifiers."""
    sent = collectives(check(("attention",), (1, 1, 1, 8)))
    assert sent.pop("all-reduce") <= 4  # of the loss, and of the gradients of parameters
    assert sent == {"all-gather": 2, "reduce-scatter": 1}


def test_no_gathering_at_all_in_layers_of_windows():
    """From the left neighbour keys and values, and identifiers; gradients back. No logits."""
    program = check(("swa",), (1, 1, 2, 4))
    sent = collectives(program)
    sent.pop("all-reduce")
    assert sent == {"collective-permute": 3}
    assert [shape for shape in shapes(program) if VOCAB in shape] == []
