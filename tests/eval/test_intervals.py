"""Intervals hold the truth as often as they say."""

import math

import numpy as np
import pytest

from swr_jax.eval.intervals import bootstrap_ratio, wilson


@pytest.mark.parametrize(("right", "trials"), [(0, 10), (1, 7), (5, 10), (99, 100), (30, 30)])
def test_ends_of_wilson_are_where_the_normal_test_turns(right, trials):
    low, high = wilson(right, trials)
    share = right / trials
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if end not in (0.0, 1.0):
            deviation = abs(share - end) / math.sqrt(end * (1 - end) / trials)
            assert deviation == pytest.approx(1.959964, rel=1e-5)


def test_wilson_of_nothing_right_is_as_published():
    # z^2 / (n + z^2), with z^2 = 3.8415
    assert wilson(0, 10) == (0.0, pytest.approx(3.8415 / 13.8415, rel=1e-4))


def test_bootstrap_holds_the_ratio_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    held = 0
    for trial in range(300):
        bytes_ = rng.uniform(50, 150, size=60)
        bits = bytes_ * (2.5 + rng.normal(size=60))
        low, high = bootstrap_ratio(bits, bytes_, seed=trial, resamples=400)
        held += low <= 2.5 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_bootstrap_says_nothing_of_few_units():
    assert bootstrap_ratio([1.0] * 7, [1.0] * 7) is None
    assert bootstrap_ratio([2.0] * 8, [1.0] * 8) == (2.0, 2.0)


def test_impossible_counts_are_refused():
    for right, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match=f"successes={right} of trials={trials}"):
            wilson(right, trials)
    with pytest.raises(ValueError, match="they must agree"):
        bootstrap_ratio([1.0, 2.0], [1.0])
