"""Run one case and nothing else, for tools that watch a process from outside.

``python -m fwpkm_bench.profiling.one_case CASE.json RESULT.json --seconds 5`` or ``--calls 1``.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fwpkm_bench.measure.memory import keep_freed_memory
from fwpkm_bench.measure.phase_clock import PhaseClock
from fwpkm_bench.measurement import Measurement
from fwpkm_bench.spec import Case
from fwpkm_bench.worker import attempt
from fwpkm_bench.workloads import throughput

LEAST_CALLS = 2


def measure(case: Case, *, seconds: float, calls: int) -> Measurement:
    """Call ``case`` so many times, or for so long; a tool that can looks at these calls alone."""
    mode = throughput.prepared(case)
    mode.start()
    keep_freed_memory(case.device)
    mode.prepare(0)
    mode.call(0)
    if case.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    taken = profiled_calls(case, mode, seconds, calls)
    if case.device == "cuda":
        torch.cuda.profiler.stop()
    step_ms = statistics.median(taken) / mode.steps
    return Measurement({"calls": len(taken), "step_ms": step_ms, "steps_a_call": mode.steps})


def profiled_calls(case: Case, mode: throughput.Prefill, seconds: float, calls: int) -> list[float]:
    """The calls that count: what profilers of the host look for by this name. Returns their milliseconds."""
    clock = PhaseClock(case.device)
    taken: list[float] = []
    while len(taken) < calls or sum(taken) < seconds * 1e3:
        mode.prepare(1 + len(taken))
        started = time.perf_counter()
        if case.device == "cuda":  # with NVTX ranges
            clock.run(mode.layer, partial(mode.call, 1 + len(taken)))
            torch.cuda.synchronize()
        else:
            mode.call(1 + len(taken))
        taken.append((time.perf_counter() - started) * 1e3)
    return taken


def main() -> None:
    """Write the outcome, as of a case of a sweep, to the second file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--calls", type=int, default=LEAST_CALLS)
    asked = parser.parse_args()
    fields: dict[str, Any] = json.loads(asked.case.read_text(encoding="utf-8"))
    outcome = attempt(Case(**fields), partial(measure, seconds=asked.seconds, calls=asked.calls))
    asked.result.write_text(json.dumps(outcome), encoding="utf-8")


if __name__ == "__main__":
    main()
