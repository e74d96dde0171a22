"""TPU kernels of the mLSTM and of the gated delta rule, compiled by the TPU's own compiler."""

import pytest

from pallas_kernels import targets
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
    chip = targets.chip_named(chip)
    function, arguments = entry.build(chip)
    report = targets.compile_for(
        chip,
        function,
        *arguments,
        launches=entry.launches,
        bytes_minimum=entry.bytes_minimum,
        matrix_flops=entry.matrix_flops,
        name=entry.name,
    )
    assert targets.broken_budgets(report, entry.budget(chip)) == []
