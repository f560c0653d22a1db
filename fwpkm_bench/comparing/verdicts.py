"""From the turns of two sides to a verdict, by order statistics and resampling alone.

A round has two turns of each of three processes: B, and two of A. What counts of it is the logarithm of B's
time over A's, in which a drift of the machine that is linear over the round cancels. The rounds of an
invocation (fresh processes of each side) share its luck, so invocations are resampled first and the rounds in
them second (Kalibera and Jones, "Rigorous benchmarking in reasonable time", 2013).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import fisher_exact, mannwhitneyu, norm, t

CONFIDENCE = 0.95
SIGNIFICANT = 0.01
RESAMPLES = 4000
LEAST_INVOCATIONS = 4  # fewer make no interval
LEAST_SAMPLES = 6  # of one run
AGAIN = "A again"  # a second process of side A
LEAST_PEAKS = 3
PAGE_NOISE_BYTES = 16 * 2**20  # resident size: what a process happens to touch, seen here up to 13 MiB


@dataclass(frozen=True)
class Turn:
    """One turn of one side, in milliseconds a call."""

    side: str  # "A", "B" or `AGAIN`
    invocation: int
    round: int
    ms: float


@dataclass(frozen=True)
class Ratio:
    """Of two times, with the interval of `CONFIDENCE`; without where there are too few invocations."""

    ratio: float
    lo: float | None
    hi: float | None

    @property
    def spread(self) -> float:
        """The interval's upper end over its lower, less 1."""
        return float("inf") if self.lo is None or self.hi is None else self.hi / self.lo - 1


@dataclass(frozen=True)
class Speed:
    """What the turns say: B's time over A's, and A's own over A's, which would be 1 without noise."""

    verdict: str  # "faster", "slower", "same", "ambiguous"
    time: Ratio
    noise: Ratio
    p_value: float
    reason: str = ""


def speed(turns: Sequence[Turn], threshold: float) -> Speed:
    """The verdict on B: ``slower`` or ``faster`` by more than ``threshold`` and the noise floor, and surely;
    ``same`` where the whole interval lies within the threshold."""
    found, noise = time_ratio(turns, "B"), time_ratio(turns, AGAIN)
    p_value = mann_whitney(turns)
    if found.lo is None or found.hi is None or noise.lo is None or noise.hi is None:
        count = len({turn.invocation for turn in turns})
        reason = f"{count} of the {LEAST_INVOCATIONS} invocations that an interval needs: raise --budget"
        return Speed("ambiguous", found, noise, p_value, reason)
    band = 1 + max(threshold, 1 / noise.lo - 1, noise.hi - 1)
    return _judged(found, noise, p_value, threshold, band)


def _judged(found: Ratio, noise: Ratio, p_value: float, threshold: float, band: float) -> Speed:
    assert found.lo is not None
    assert found.hi is not None
    sure = p_value < SIGNIFICANT
    if found.ratio > band and found.lo > 1 and sure:
        return Speed("slower", found, noise, p_value)
    if found.ratio < 1 / band and found.hi < 1 and sure:
        return Speed("faster", found, noise, p_value)
    if 1 / (1 + threshold) < found.lo and found.hi < 1 + threshold:
        return Speed("same", found, noise, p_value)
    reason = f"neither surely within {threshold:.0%} nor surely beyond it and the noise; raise --budget"
    return Speed("ambiguous", found, noise, p_value, reason)


def apart(a: Sequence[float], b: Sequence[float], threshold: float) -> Speed:
    """The verdict on samples that were taken in two runs: as `speed`, without rounds to cancel a drift and
    without a noise floor."""
    unknown = Ratio(float("nan"), None, None)
    middle = float(np.median(b) / np.median(a))
    if min(len(a), len(b)) < LEAST_SAMPLES:
        reason = f"{len(a)} and {len(b)} samples; {LEAST_SAMPLES} make an interval"
        return Speed("ambiguous", Ratio(middle, None, None), unknown, 1.0, reason)
    generator = np.random.default_rng(0)
    medians = [
        np.median(generator.choice(np.array(side), size=(RESAMPLES, len(side))), axis=1) for side in (a, b)
    ]
    found = Ratio(middle, *_interval(medians[1] / medians[0]))
    p_value = float(mannwhitneyu(a, b, alternative="two-sided").pvalue)
    return _judged(found, unknown, p_value, threshold, 1 + threshold)


def time_ratio(turns: Sequence[Turn], side: str) -> Ratio:
    """The time of ``side`` over that of A."""
    invocations = _log_ratios(turns, side)
    middle = float(np.exp(np.median(np.concatenate(invocations)))) if invocations else float("nan")
    if len(invocations) < LEAST_INVOCATIONS:
        return Ratio(middle, None, None)
    low, high = _interval(_resampled_medians(invocations))
    wider = _small_sample(len(invocations))
    centre = np.log(middle)
    return Ratio(middle, *(float(np.exp(centre + wider * (end - centre))) for end in (low, high)))


def _small_sample(count: int) -> float:
    """How much too narrow a bootstrap interval from ``count`` values is: ``t / z * sqrt(n / (n - 1))``
    (Hesterberg, "What teachers should know about the bootstrap", 2015, section 4)."""
    tail = 1 - (1 - CONFIDENCE) / 2
    return float(t.ppf(tail, count - 1) / norm.ppf(tail) * np.sqrt(count / (count - 1)))


def _resampled_medians(invocations: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Medians over invocations drawn with replacement, and within each over its rounds drawn likewise."""
    count, most = len(invocations), max(map(len, invocations))
    lengths = np.array([len(values) for values in invocations])
    padded = np.full((count, most), np.nan)
    for row, values in zip(padded, invocations, strict=True):
        row[: len(values)] = values
    generator = np.random.default_rng(0)
    chosen = generator.integers(count, size=(RESAMPLES, count))
    place = generator.random((RESAMPLES, count, most)) * lengths[chosen][..., None]
    drawn = padded[chosen[..., None], place.astype(int)]
    drawn[np.arange(most) >= lengths[chosen][..., None]] = np.nan  # an invocation keeps its number of rounds
    return np.nanmedian(drawn.reshape(RESAMPLES, -1), axis=1)


def mann_whitney(turns: Sequence[Turn]) -> float:
    """The two-sided p-value that the processes of A and those of B are equally fast: one value a process, the
    mean logarithm of its turns over that of its invocation."""
    logs: dict[tuple[int, str], list[float]] = {}
    for turn in turns:
        logs.setdefault((turn.invocation, turn.side), []).append(float(np.log(turn.ms)))
    means = {key: float(np.mean(values)) for key, values in logs.items()}
    sides: dict[str, list[float]] = {"A": [], "B": []}
    for (invocation, side), mean in means.items():
        everyone = np.mean([value for (other, _), value in means.items() if other == invocation])
        sides["B" if side == "B" else "A"].append(float(mean - everyone))
    if not all(sides.values()):
        return 1.0
    return float(mannwhitneyu(sides["A"], sides["B"], alternative="two-sided").pvalue)


def memory(a: Sequence[int], b: Sequence[int], threshold: float, *, resident: bool) -> str:
    """``more`` or ``less`` where all of B's peaks lie beyond all of A's and their medians beyond
    ``threshold``. Of ``resident`` sizes, which allocators round and pages blur, a few are needed: fewer than
    `LEAST_PEAKS` are ``ambiguous``."""
    least = PAGE_NOISE_BYTES if resident else 0
    middle_a, middle_b = float(np.median(a)), float(np.median(b))
    more = min(b) > max(a) + least and middle_b > middle_a * (1 + threshold)
    less = max(b) < min(a) - least and middle_b < middle_a / (1 + threshold)
    if not (more or less):
        return "same"
    if resident and min(len(a), len(b)) < LEAST_PEAKS:
        return "ambiguous"
    return "more" if more else "less"


def memory_and_state(
    peaks_a: list[int], peaks_b: list[int], state_a: int, state_b: int, threshold: float, device: str
) -> str:
    """Of peak memory and of state together: ``more`` where either is."""
    said = {
        memory(peaks_a, peaks_b, threshold, resident=device == "cpu"),
        memory([state_a], [state_b], threshold, resident=False),
    }
    return next((verdict for verdict in ("more", "less", "ambiguous") if verdict in said), "same")


def recall(a: tuple[int, int], b: tuple[int, int], threshold: float) -> str:
    """``higher`` or ``lower`` where B's share, ``(right, asked)``, is significantly another (Fisher's test),
    and by more than ``threshold`` as a ratio."""
    share_a, share_b = a[0] / a[1], b[0] / b[1]
    table = [[right, asked - right] for right, asked in (a, b)]
    if fisher_exact(table).pvalue >= SIGNIFICANT:
        return "same"
    if share_b < share_a / (1 + threshold):
        return "lower"
    return "higher" if share_b > share_a * (1 + threshold) else "same"


def _interval(resampled: NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    lo, hi = np.quantile(resampled, [tail, 1 - tail])
    return float(lo), float(hi)


def _log_ratios(turns: Sequence[Turn], side: str) -> list[NDArray[np.float64]]:
    """For each invocation the logarithms of its rounds' ratios."""
    found: dict[int, list[float]] = {}
    for (invocation, _), logs in _rounds(turns, side).items():
        found.setdefault(invocation, []).append(float(np.mean(logs[side]) - np.mean(logs["A"])))
    return [np.array(values) for values in found.values()]


def _rounds(turns: Sequence[Turn], side: str) -> dict[tuple[int, int], dict[str, list[float]]]:
    """By invocation and round, the logarithms of the times of A and of ``side``; B's are set against both
    processes of A."""
    grouped: dict[tuple[int, int], dict[str, list[float]]] = {}
    for turn in turns:
        name = "A" if side == "B" and turn.side == AGAIN else turn.side
        if name in ("A", side):
            logs = grouped.setdefault((turn.invocation, turn.round), {"A": [], side: []})
            logs[name].append(float(np.log(turn.ms)))
    return {key: logs for key, logs in grouped.items() if all(logs.values())}
