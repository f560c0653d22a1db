"""What each phase of a call takes, computes and moves, and how far that is from what the device can do.

All figures are of a step: one call in ``prefill`` and ``train``, one token in ``decode``.
"""

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fwpkm_bench.measure.ceilings import Ceilings, measure_ceilings
from fwpkm_bench.measure.counting import Counts, OperatorCounter
from fwpkm_bench.measure.memory import keep_freed_memory
from fwpkm_bench.measure.phase_clock import OTHER, PhaseClock
from fwpkm_bench.measure.timing import Sampler, sampler
from fwpkm_bench.measurement import Measurement
from fwpkm_bench.profiling.folder import CASE, PHASES, write_table
from fwpkm_bench.spec import Case
from fwpkm_bench.stats import median_interval
from fwpkm_bench.workloads import throughput

LEAST_PAIRS, MOST_PAIRS = 3, 25  # of calls, one with the clock on and one with it off
EXPLAINED = 1 / 3  # of a phase's time: a ceiling that explains less is not what bounds it
IDLE = 20  # operators faster than so many empty ones are calls more than work
SMALL_OPERATORS = 2000
MS = 1e3  # of a second


@dataclass(frozen=True)
class PhaseTable:
    """``rows``: one a phase; ``total``: the same of the whole step, with what the clock costs."""

    rows: list[dict[str, Any]]
    total: dict[str, Any]


def measure_phases(case: Case) -> PhaseTable:
    """The phases of ``case`` of workload ``throughput``, measured in this process."""
    dtype = getattr(torch, case.dtype)
    before = measure_ceilings(case.device, dtype)
    mode = throughput.prepared(case)
    mode.start()
    keep_freed_memory(case.device)
    clock = PhaseClock(case.device)
    calls = Calls(case, mode, clock, sampler(case.device))
    calls.warm_up()
    calls.take_pairs()
    counts = calls.count()
    after = measure_ceilings(case.device, dtype)  # the better counts: something else may have had the cores
    ceilings = Ceilings(max(before.flops, after.flops), max(before.bytes, after.bytes))
    return table(calls, counts, ceilings, operator_floor_us(case.device))


def measure_with_phases(case: Case) -> Measurement:
    """What the workload measures of ``case``, and then its phases in two more calls, timed and counted.

    Where these fail, the column ``phases_missing`` says why, and what was measured stands.
    """
    modes: list[throughput.Prefill] = []
    measured = throughput.run(case, modes.append)
    calls = Calls(case, modes[0], PhaseClock(case.device), sampler(case.device))
    calls.index = 1  # the context of decode may have to be read in afresh
    try:
        calls.take_one()
        counts = calls.count()
    except (MemoryError, RuntimeError) as error:  # torch's own for memory is one of these
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return dataclasses.replace(measured, columns=measured.columns | {"phases_missing": reason})
    flops, moved = (float(str(measured.columns[f"ceiling_{n}_per_s"])) for n in ("tflop", "gb"))
    ceilings = Ceilings(flops * 1e12, moved * 1e9)
    rows = rows_of(calls, counts, ceilings, operator_floor_us(case.device))
    return dataclasses.replace(measured, phases=rows)


class Calls:
    """Calls of one mode, with the clock on and off in turn."""

    def __init__(self, case: Case, mode: throughput.Prefill, clock: PhaseClock, sample: Sampler) -> None:
        self.case, self.mode, self.clock, self.sample = case, mode, clock, sample
        self.index = 0
        self.off_ms: list[float] = []
        self.on_ms: list[float] = []
        self.phases_ms: list[dict[str, float]] = []

    @property
    def steps(self) -> int:
        return self.mode.steps

    def warm_up(self) -> None:
        """One call of each kind, or one alone where it takes longer than the budget."""
        if self._call(lambda call: call()) <= self.case.budget_s * MS:
            self._call(self._listened)

    def take_pairs(self) -> None:
        """Pairs of calls within the budget, but `LEAST_PAIRS` unless one alone exceeds it."""
        started, longest = time.perf_counter(), 0.0
        while True:
            began = time.perf_counter()
            self._pair()
            now = time.perf_counter()
            longest = max(longest, now - began)
            pairs, spent = len(self.on_ms), now - started
            within = spent + longest <= self.case.budget_s
            if pairs >= MOST_PAIRS or (not within and (pairs >= LEAST_PAIRS or longest > self.case.budget_s)):
                return

    def take_one(self) -> None:
        """One call with the clock on."""
        self.on_ms.append(self._call(self._listened))
        self.phases_ms.append(self.clock.milliseconds())

    def count(self) -> dict[str, Counts]:
        """What the operators of one more call compute and move; the call's time is nobody's."""
        counter = OperatorCounter(lambda: self.clock.current)

        def counted(call: Callable[[], Any]) -> None:
            with counter:
                self._listened(call)

        self._call(counted)
        return counter.phases

    def _pair(self) -> None:
        for on in (False, True) if len(self.on_ms) % 2 else (True, False):
            if on:
                self.take_one()
            else:
                self.off_ms.append(self._call(lambda call: call()))

    def _listened(self, call: Callable[[], Any]) -> Any:
        return self.clock.run(self.mode.layer, call)

    def _call(self, how: Callable[[Callable[[], Any]], Any]) -> float:
        self.mode.prepare(self.index)
        index, self.index = self.index, self.index + 1
        return self.sample(lambda: how(lambda: self.mode.call(index)))[0]


def rows_of(
    calls: Calls, counts: dict[str, Counts], ceilings: Ceilings, floor_us: float
) -> list[dict[str, Any]]:
    """One row a phase: what ``calls`` with the clock on took, and what the counted one did."""
    entered, steps = calls.clock.entered(), calls.steps
    names = list(dict.fromkeys(name for call in calls.phases_ms for name in call))
    names.sort(key=lambda name: name == OTHER)
    samples = {name: [call.get(name, 0.0) / steps for call in calls.phases_ms] for name in names}
    whole = sum(map(statistics.median, samples.values()))
    rows = []
    for name in names:
        row: dict[str, Any] = {"phase": name, "entered": entered.get(name, 1) / steps}
        row |= _timed("ms", samples[name])
        row["share"] = row["ms_p50"] / whole
        rows.append(row | against_roofline(row["ms_p50"], counts[name], steps, ceilings, floor_us))
    return rows


def table(calls: Calls, counts: dict[str, Counts], ceilings: Ceilings, floor_us: float) -> PhaseTable:
    """The rows of `rows_of`, and the step as a whole."""
    rows, steps = rows_of(calls, counts, ceilings, floor_us), calls.steps
    ratios = [on / off for on, off in zip(calls.on_ms, calls.off_ms, strict=True)]
    low, high = median_interval(ratios) or (None, None)
    total: dict[str, Any] = {
        **_timed("ms", [ms / steps for ms in calls.on_ms]),
        **_timed("off_ms", [ms / steps for ms in calls.off_ms]),
        "overhead_ratio": statistics.median(ratios),
        "overhead_ratio_lo": low,
        "overhead_ratio_hi": high,
        "samples": len(ratios),
        "steps_a_call": steps,
        "tokens_a_step": calls.mode.step_tokens,
        "threads": torch.get_num_threads(),
    }
    every = Counts(*(sum(getattr(c, f) for c in counts.values()) for f in Counts.__dataclass_fields__))
    total |= against_roofline(total["off_ms_p50"], every, steps, ceilings, floor_us)
    floors = [row["roofline_ms"] for row in rows]
    total |= {
        "phases_roofline_ms": None if None in floors else sum(floors),
        "ceiling_tflop_per_s": ceilings.flops / 1e12,
        "ceiling_gb_per_s": ceilings.bytes / 1e9,
        "operator_floor_us": floor_us,
    }
    return PhaseTable(rows, total)


def _timed(name: str, samples: list[float]) -> dict[str, Any]:
    low, high = median_interval(samples) or (None, None)
    return {f"{name}_p50": statistics.median(samples), f"{name}_lo": low, f"{name}_hi": high}


def against_roofline(
    ms: float, counts: Counts, steps: int, ceilings: Ceilings, floor_us: float
) -> dict[str, Any]:
    """Rates, the time that each ceiling of the device asks for, and what bounds the phase.

    ``compute`` or ``memory``, whichever ceiling asks for more, if that is a third of ``ms`` at the least;
    ``overhead`` where the operators are hardly more than calls; ``neither`` where they work but are far from
    both ceilings, as searching and scattered rows are. Where Triton kernels were launched, operations and
    bytes are not known and stay empty, and so does all that follows from them.
    """
    hidden = counts.launches > 0
    seconds, operators = ms / MS, counts.operators / steps
    flops, moved = (None if hidden else n / steps for n in (counts.flops, counts.bytes))
    found: dict[str, Any] = {
        "operators": operators,
        "us_an_operator": ms * 1e3 / operators if operators else None,
        "launches": counts.launches / steps,
        "flops": flops,
        "bytes": moved,
        "tflop_per_s": None if flops is None or not seconds else flops / seconds / 1e12,
        "gb_per_s": None if moved is None or not seconds else moved / seconds / 1e9,
    }
    compute = None if flops is None else flops / ceilings.flops * MS
    memory = None if moved is None else moved / ceilings.bytes * MS
    roofline = None if compute is None or memory is None else max(compute, memory)
    called = operators + counts.launches / steps
    if roofline is not None and roofline >= EXPLAINED * ms:
        bound = "compute" if roofline == compute else "memory"
    elif called and ms * 1e3 / called <= IDLE * floor_us:
        bound = "overhead"
    else:
        bound = "unknown" if hidden else "neither"
    found |= {
        "compute_ms": compute,
        "memory_ms": memory,
        "roofline_ms": roofline,
        "distance": ms / roofline if roofline else None,
        "bound": bound,
    }
    return found


def operator_floor_us(device: str) -> float:
    """What calling an operator that does next to nothing takes, in microseconds."""
    a, b = (torch.ones(8, device=device) for _ in range(2))
    best: dict[str, list[float]] = defaultdict(list)
    for _ in range(5):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter_ns()
        for _ in range(SMALL_OPERATORS):
            torch.add(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best["us"].append((time.perf_counter_ns() - started) / 1e3 / SMALL_OPERATORS)
    return statistics.median(best["us"])


def record(case: Case, *, folder: Path) -> Measurement:
    """Measure ``case`` and write ``phases.csv`` and ``case.csv``."""
    found = measure_phases(case)
    write_table(folder / PHASES, [{"case_id": case.case_id, **row} for row in found.rows])
    write_table(folder / CASE, [{"case_id": case.case_id, **found.total}])
    return Measurement(found.total)
