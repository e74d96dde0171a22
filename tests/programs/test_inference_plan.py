"""Steps of generation planned for chips that are not here, by their compilers."""

import dataclasses

import pytest

from pallas_kernels.targets import CHIPS
from swr_jax.train.config import make_train_config
from swr_jax.train.inference_plan import make_inference_plan

pytestmark = pytest.mark.targets

FEATURES, DEPTH, HEADS, STREAMS, CONTEXT, CHUNK = 256, 4, 2, 8, 512, 64


def config(pattern=("phalanx", "attention"), **mesh):
    model = {
        "vocab_size": 512,
        "features": FEATURES,
        "depth": DEPTH,
        "pattern": list(pattern),
        "num_heads": HEADS,
        "dtype": "bfloat16",
    }
    data = {"sequence_length": 64, "batch_size": 8}  # of training: not looked at
    return make_train_config({"model": model, "data": data, "mesh": {"data": 1} | mesh})


def plan(mode: str, topology: str, pattern=("phalanx", "attention"), **mesh):
    sizes = {"streams": STREAMS, "context": CONTEXT, "chunk": CHUNK}
    return make_inference_plan(config(pattern, **mesh), topology, mode=mode, **sizes)


@pytest.fixture(scope="module")
def decoding():
    return plan("decode", "v5e:2x2", data=2, tensor=2)


def test_states_are_split_over_streams_and_heads(decoding):
    layers = DEPTH // 2
    cache = layers * CONTEXT * (2 * 2 * FEATURES + 4) + layers * 2 * 4
    # Local state and one carrier, and a decay for each of its heads of 16; float32.
    recurrence = layers * 4 * (2 * FEATURES + FEATURES // 16 + 2)
    assert decoding["state_bytes_per_stream"] == cache + recurrence
    # Two devices share the streams, two the heads; segments and positions are whole on the latter.
    split = layers * (CONTEXT * 2 * 2 * FEATURES + 4 * (2 * FEATURES + FEATURES // 16))
    whole = cache + recurrence - split
    logits = 512 * 4 + 4  # and the number of tokens drawn
    assert decoding["held"]["states"] == STREAMS // 2 * (split // 2 + whole + logits)
    assert decoding["held"]["parameters"] < 2 * decoding["parameters"] * 0.6
    assert decoding["fits"]
    assert decoding["memory"] >= sum(decoding["held"].values())


def test_a_step_takes_longer_than_its_floor(decoding):
    floor = sum(decoding["held"].values()) / CHIPS["v5e"].hbm_bytes_per_second
    assert decoding["floor_seconds"] == pytest.approx(floor)
    assert decoding["seconds"] > floor
    assert decoding["tokens_per_second"] == pytest.approx(STREAMS / decoding["seconds"])
    # Heads that are split are summed after every mixer and network; streams need nobody.
    assert decoding["collectives"]["all-reduce"]["calls"] >= 2 * DEPTH
    assert "all-to-all" not in decoding["collectives"]


def test_prefill_reads_a_chunk_of_every_prompt():
    found = plan("prefill", "v5e:2x2", data=2, tensor=2)
    assert found["tokens_per_step"] == STREAMS * CHUNK
    assert found["kernels"]["swr_gated_forward"]["calls"] == DEPTH // 2
    assert found["seconds"] > found["floor_seconds"]


def test_prefill_has_kernels_for_mlstm_too():
    found = plan("prefill", "v5e:2x2", pattern=("mlstm",), data=2, tensor=2)
    assert any(name.startswith("mlstm") for name in found["kernels"]), found["kernels"]


def test_decoding_moves_a_long_cache_once():
    """It is read, and the new token is written into it: no copy of it in between."""
    wide = config(("attention",), data=1)
    wide = dataclasses.replace(
        wide, model=dataclasses.replace(wide.model, features=2048, num_heads=16, depth=2)
    )
    found = make_inference_plan(wide, "v5e:1x1", mode="decode", streams=8, context=8192)
    assert found["temporary"] < 0.01 * found["held"]["states"]
    assert found["seconds"] < 5 * found["floor_seconds"]


@pytest.mark.parametrize("pattern", [("swa", "mlstm"), ("swa", "gated_delta"), ("phalanx",)])
def test_a_bounded_state_does_not_grow_with_the_context(pattern):
    sizes = {"streams": 4, "mode": "decode"}
    short, long = (
        make_inference_plan(config(pattern, data=4), "v5e:2x2", context=context, **sizes)
        for context in (64, 65_536)
    )
    assert short["state_bytes_per_stream"] == long["state_bytes_per_stream"]
    assert short["held"] == long["held"]


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_hopper_is_planned_too(mode):
    found = plan(mode, "h100:1x1x1")
    assert found["fits"]
    assert found["memory"] >= sum(found["held"].values())
    assert found["floor_seconds"] == pytest.approx(sum(found["held"].values()) / 3.35232e12)
    assert "seconds" not in found  # that compiler estimates nothing


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "serve"}, "mode='serve': must be one of decode, prefill"),
        ({"streams": 6}, r"streams=6: must be a multiple of mesh.data x mesh.fsdp = 4 x 1 = 4"),
        ({"context": 0}, "context=0"),
        ({"mode": "prefill", "chunk": 48}, "chunk_size=48; it must be a power of two"),
        ({"mode": "prefill", "context": 32, "chunk": 64}, "chunk=64: must be at most context=32"),
    ],
)
def test_what_does_not_fit_is_said(changed, message):
    options = {"mode": "decode", "streams": 8, "context": 512} | changed
    with pytest.raises(ValueError, match=message):
        make_inference_plan(config(data=4), "v5e:2x2", **options)
