"""Timing one call fairly: warm-up until it settles, as many samples as the budget allows."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MIN_SAMPLES = 5
MAX_SAMPLES = 25
SETTLED = 0.05  # warm-up ends when the medians of two neighbouring windows differ by less
WINDOW = 3
L2_FLUSH_BYTES = 256 * 2**20

Sampler = Callable[[Callable[[], Any]], tuple[float, Any]]


@dataclass(frozen=True)
class Timing:
    """The samples of one call, in milliseconds, and how they were taken."""

    samples_ms: list[float]
    warmup_ms: list[float]
    method: str


def measure(
    call: Callable[[int], Any],
    *,
    device: str,
    budget_s: float,
    prepare: Callable[[int], None] = lambda index: None,
    inspect: Callable[[Any], None] = lambda result: None,
    sample: Sampler | None = None,
) -> Timing:
    """Time ``call(i)``, ``i`` counting up so that inputs can rotate.

    A call that is slower than half the budget is timed as often as the budget allows, down to once;
    it must have been warmed up by the caller on something shorter. Every other call first warms up.
    Outside the timing and the budget, ``prepare(i)`` runs before each call, and ``inspect`` gets what the
    first one returned. ``sample`` is that of `sampler`, made before if its memory must not count.
    """
    sample = sample or sampler(device)
    warmup: list[float] = []
    samples: list[float] = []
    spent, index = 0.0, 0

    def take(into: list[float]) -> float:
        nonlocal spent, index
        prepare(index)
        started = time.perf_counter()
        milliseconds, result = sample(lambda: call(index))
        spent += time.perf_counter() - started
        into.append(milliseconds)
        if index == 0:
            inspect(result)
        index += 1
        return milliseconds / 1e3

    while take(warmup) <= budget_s / 2 and not _settled(warmup) and spent < budget_s / 4:
        pass
    if warmup[-1] / 1e3 > budget_s / 2:
        samples, warmup = warmup[-1:], warmup[:-1]
    longest = max([*warmup, *samples]) / 1e3
    while not samples or (len(samples) < MAX_SAMPLES and spent + longest <= budget_s):
        take(samples)
        if len(samples) >= MIN_SAMPLES and spent > budget_s / 2:
            break
    return Timing(samples, warmup, "cuda_events,l2_flushed" if device == "cuda" else "perf_counter")


def _settled(durations: list[float]) -> bool:
    if len(durations) < 2 * WINDOW:
        return False
    before = statistics.median(durations[-2 * WINDOW : -WINDOW])
    after = statistics.median(durations[-WINDOW:])
    return abs(after - before) <= SETTLED * before


def sampler(device: str) -> Sampler:
    """How to time one call on ``device``."""
    return cuda_sampler() if device == "cuda" else cpu_sample


def cpu_sample(call: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds of ``call`` by the system's finest clock, and what it returned."""
    started = time.perf_counter_ns()
    result = call()
    return (time.perf_counter_ns() - started) / 1e6, result


def cuda_sampler() -> Sampler:
    """Like `cpu_sample`, by events on the GPU; its level-2 cache is overwritten before each sample."""
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def sample(call: Callable[[], Any]) -> tuple[float, Any]:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda.synchronize()
        start.record()
        result = call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)), result

    return sample
