"""The mLSTM by its kernels, on simulated accelerators, through the operator."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mlstm_cases import Kind, draw
from simulation import SIMULATED

from swr_jax import MLSTMState, mlstm
from swr_jax.ops import dispatch
from swr_jax.ops import reference_mlstm as ref
from swr_jax.ops.mlstm_evaluation import KERNELS

BFLOAT16 = 4e-3
# Overlapping queries and keys: no denominator is a difference of large numbers.
KIND = Kind(f=2.0, overlap=1.0, packed=0.02)


def problem_of(length):
    """Arguments whose q, k and v bfloat16 holds, with those of `mlstm` and cotangents."""
    drawn = draw(length, (KIND,), heads=1, qk_dim=64, v_dim=64)
    low = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in drawn.inputs[:3]]
    bar = np.asarray(jnp.asarray(drawn.h_bar, jnp.bfloat16), np.float32)
    return drawn._replace(inputs=(*low, *drawn.inputs[3:]), h_bar=bar)


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"input_gate": "sigmoid"}, marks=pytest.mark.slow)], ids=str
)
def test_a_kernel_is_the_default_and_agrees_with_float64(monkeypatch, name, options):
    """Documents, a state before and after, every gradient; in the precision of a model."""
    problem = problem_of(70)
    kernels = importlib.import_module(KERNELS[name])
    calls, chunkwise = [], kernels.chunkwise

    def watched(*arrays, chunk_size, **others):
        calls.append(chunk_size)
        return chunkwise(*arrays, chunk_size=chunk_size, **others)

    monkeypatch.setattr(kernels, "chunkwise", watched)

    def run(q, k, v, i, f, *state):
        q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
        return mlstm(
            *(q, k, v, i, f),
            chunk_size=64,
            initial_state=MLSTMState(*state),
            segment_ids=problem.segment_ids,
            return_state=True,
            **options,
        )

    bars = (jnp.asarray(problem.h_bar, jnp.bfloat16), MLSTMState(*problem.state_bar))
    with SIMULATED[name]():
        (h, last), pull = jax.vjp(run, *problem.inputs, *problem.state)
        gradients = jax.block_until_ready(pull(bars))
    assert calls == [64]
    given = {"initial_state": problem.state, "segment_ids": problem.segment_ids} | options
    wanted_h, wanted_last = ref.recurrence(*problem.inputs, **given)
    wanted = ref.gradients(*problem.inputs, problem.h_bar, problem.state_bar, **given)
    errors = {"h": ref_error(h, wanted_h)}
    errors |= {name: ref_error(getattr(last, name), x) for name, x in wanted_last._asdict().items()}
    for name, got in zip(wanted, gradients, strict=True):
        errors[f"d{name}"] = ref_error(got, wanted[name])
    assert max(errors.values()) <= BFLOAT16, errors


def ref_error(actual, expected):
    actual = np.asarray(actual, np.float64)
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("kind", "has"),
    [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GH200 480GB", True), ("NVIDIA B200", False)],
)
def test_products_of_hopper_are_not_its_successors(monkeypatch, kind, has):
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("gpu", kind))
    assert "mosaic_gpu" in dispatch.candidates(None)
    assert dispatch.has_wgmma() == has
