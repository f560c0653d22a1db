"""Intervals and quantiles of few samples, without a distribution assumed."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054


def median_interval(samples: Sequence[float]) -> tuple[float, float] | None:
    """A 95% interval of the median from order statistics (binomial, no distribution assumed).

    With 2 to 5 samples no such interval reaches 95% and the range is given: its coverage is
    ``1 - 2^(1-n)``, 50% to 94%. With one sample there is none.
    """
    n = len(samples)
    if n < 2:
        return None
    ordered = sorted(samples)
    cumulative, below = 0.0, 0
    for i in range(n // 2):  # the largest count whose tail stays within 2.5%
        cumulative += math.comb(n, i) / 2**n
        if cumulative > 0.025:
            break
        below = i
    return ordered[below], ordered[n - 1 - below]


def wilson_interval(right: int, asked: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share, ``right`` of ``asked``."""
    share = right / asked
    denominator = 1 + Z95**2 / asked
    centre = (share + Z95**2 / (2 * asked)) / denominator
    half = Z95 * math.sqrt(share * (1 - share) / asked + Z95**2 / (4 * asked**2)) / denominator
    return max(0.0, centre - half), min(1.0, centre + half)


def timing_columns(samples_ms: Sequence[float], tokens: int) -> dict[str, float | int | None]:
    """Latency quantiles, and tokens a second with its interval, of calls that each read ``tokens``."""
    p20, p50, p80 = np.quantile(samples_ms, [0.2, 0.5, 0.8])
    interval = median_interval(samples_ms)
    slow, fast = (None, None) if interval is None else (tokens / (ms / 1e3) for ms in reversed(interval))
    return {
        "tokens_per_s": tokens / (p50 / 1e3),
        "tokens_per_s_lo": slow,
        "tokens_per_s_hi": fast,
        "latency_ms_p20": float(p20),
        "latency_ms_p50": float(p50),
        "latency_ms_p80": float(p80),
        "samples": len(samples_ms),
    }
