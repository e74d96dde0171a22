"""The TPU kernels compiled by the TPU's own compiler, with no TPU at hand."""

import pytest

from pallas_kernels import targets
from pallas_kernels.catalogue import default_budget
from pallas_kernels.swr.entries_tpu import entries
from pallas_kernels.targets.budgets import broken_budgets

pytestmark = pytest.mark.targets

CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


@pytest.mark.parametrize(
    ("entry", "chip"),
    [
        pytest.param(entry, chip, id=f"{entry.name}-{chip}")
        for entry in entries()
        for chip in CHIPS
        # The oldest chip and the newest have the windowed kernels compiled, which have more states.
        if chip in ("v5e", "v5p", "v6e") or "exact" not in entry.name
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
        name=entry.name,
    )
    assert broken_budgets(report, default_budget(chip)) == []
