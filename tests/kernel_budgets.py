"""Entries of the kernels' catalogue, compiled for chips that are not here."""

from pallas_kernels import targets


def assert_within_budget(entry, chip):
    """A kernel, compiled for a chip by name, takes no more than it may."""
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
