"""Compilations beside one another: what a record keeps, and what is known of the kernels."""

import json

import jax
import jax.numpy as jnp
import pytest

from swr_jax.benchmark import gated_delta_tpu_baselines, mlstm_tpu_baselines
from swr_jax.benchmark.records import RecordError, predictions_of_others


@pytest.fixture
def written(tmp_path):
    def write(version=jax.__version__):
        rows = [{"contestant": name, "seconds": 1.0, "jax": version} for name in ("XLA", "kernels")]
        path = tmp_path / "record.json"
        path.write_text(json.dumps({"environment": {"commit": "abc"}, "predictions": rows}))
        return path

    return write


def test_what_is_not_compiled_again_is_kept_with_where_it_is_from(written):
    found = predictions_of_others(written(), ("kernels",), jax.__version__)
    assert [row["contestant"] for row in found["predictions"]] == ["XLA"]
    assert found["kept_environment"] == {"commit": "abc"}


def test_what_another_jax_compiled_is_not_kept(written):
    with pytest.raises(RecordError, match=r"0\.1\.2"):
        predictions_of_others(written("0.1.2"), ("kernels",), jax.__version__)


def test_without_a_record_all_is_to_be_compiled(tmp_path):
    with pytest.raises(RecordError, match="predict all"):
        predictions_of_others(tmp_path / "none.json", ("kernels",), jax.__version__)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (mlstm_tpu_baselines, {"mlstm_forward", "mlstm_keeping_forward", "mlstm_backward"}),
        (
            gated_delta_tpu_baselines,
            {"gated_delta_forward", "gated_delta_keeping_forward", "gated_delta_backward"},
        ),
    ],
)
def test_every_kernel_says_how_it_cuts_its_work_up(module, names):
    q, v = (jax.ShapeDtypeStruct((8, 8192, 16, size), jnp.bfloat16) for size in (128, 256))
    tilings = module.OPERATOR.tilings(1 << 24, q, q, v)
    assert set(tilings) == names
    for tiling in tilings.values():
        assert 16 % tiling.heads == 0
        assert tiling.chunks * tiling.chunk == 8192
