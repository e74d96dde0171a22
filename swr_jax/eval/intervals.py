"""95 % confidence intervals: of a share of right answers, and of a ratio of sums."""

import math
from collections.abc import Sequence

import numpy as np

_Z = 1.959963984540054  # the normal distribution has 95 % within so many standard deviations


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Interval of a probability after `successes` of `trials` independent tries (Wilson, 1927).

    Unlike the normal approximation it stays within [0, 1] and has a width at 0 and at `trials`.

    Raises:
        ValueError: no trial, or successes out of [0, trials].
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(
            f"successes={successes} of trials={trials}; there must be at least 1 trial, and "
            "successes in [0, trials]"
        )
    share, weight = successes / trials, _Z**2 / trials
    centre = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    # At the ends the two terms are equal but for rounding.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float] | None:
    """Percentile bootstrap of sum(numerators) / sum(denominators) over units drawn together.

    Args:
        numerators: one number per unit.
        denominators: likewise, above 0 in sum.
        seed: of NumPy's generator.
        resamples: how often all units are drawn, with replacement.

    Returns:
        The interval, or None for fewer than 8 units, from which nothing can be said.

    Raises:
        ValueError: lengths that differ.
    """
    numerators, denominators = (np.asarray(x, np.float64) for x in (numerators, denominators))
    if numerators.shape != denominators.shape:
        raise ValueError(
            f"numerators has shape {numerators.shape} and denominators {denominators.shape}; they "
            "must agree: one number each per unit"
        )
    units = len(numerators)
    if units < 8:
        return None
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(units, np.full(units, 1 / units), size=resamples)
    low, high = np.quantile(counts @ numerators / (counts @ denominators), [0.025, 0.975])
    return float(low), float(high)
