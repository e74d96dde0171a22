"""TPU kernels of the mLSTM and of the gated delta rule, compiled by the TPU's own compiler."""

import pytest
from kernel_budgets import assert_within_budget

from pallas_kernels.gated_delta import entries_tpu as gated_delta
from pallas_kernels.mlstm import entries_tpu as mlstm

pytestmark = pytest.mark.targets


def marks(entry, chip):
    """Slow: what another chip of the same cores, or almost the same kernel, shows as well."""
    if not entry.name.startswith("gated_delta/") or chip == "v5e":
        return ()
    shown = chip in ("v4", "v5p") or entry.name.endswith("keeping")
    return (pytest.mark.slow,) if shown else ()


@pytest.mark.parametrize(
    ("entry", "chip"),
    [
        pytest.param(entry, chip, id=f"{entry.name}-{chip}", marks=marks(entry, chip))
        for entry in (*mlstm.entries(), *gated_delta.entries())
        for chip in entry.chips
    ],
)
def test_kernels_stay_within_their_budget(entry, chip):
    assert_within_budget(entry, chip)
