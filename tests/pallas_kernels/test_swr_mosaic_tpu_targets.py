"""The TPU kernels compiled by the TPU's own compiler, with no TPU at hand."""

import pytest
from kernel_budgets import assert_within_budget

from pallas_kernels.swr.entries_tpu import entries

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
    assert_within_budget(entry, chip)
