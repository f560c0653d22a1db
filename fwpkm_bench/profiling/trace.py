"""One call under torch's profiler: a trace for Perfetto or chrome://tracing, and its operators as a table."""

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fwpkm_bench.measure.memory import keep_freed_memory
from fwpkm_bench.measure.phase_clock import PhaseClock
from fwpkm_bench.measurement import Measurement
from fwpkm_bench.profiling.folder import OPERATORS, TRACE, write_table
from fwpkm_bench.spec import Case
from fwpkm_bench.workloads import throughput

MOST_TOKENS = 8192  # of all sequences in a call, so that its trace stays within a few MiB
DECODED = 32
QUIET = "9"  # the profiler's own messages


def record(case: Case, *, folder: Path) -> Measurement:
    """Write ``trace.json.gz`` and ``operators.csv`` of one call, a shorter one where the case's is long."""
    os.environ.setdefault("KINETO_LOG_LEVEL", QUIET)
    if case.mode != "decode":
        case = dataclasses.replace(case, seq=min(case.seq, max(1, MOST_TOKENS // case.batch)))
    mode = throughput.prepared(case)
    clock = PhaseClock(case.device, labels=True)
    _take(mode, case, 0, lambda call: call())
    keep_freed_memory(case.device)
    plain_ms = _take(mode, case, 1, lambda call: call())
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[kinds.CPU, kinds.CUDA] if case.device == "cuda" else [kinds.CPU]
    ) as profiler:
        traced_ms = _take(mode, case, 2, lambda call: clock.run(mode.layer, call))
    profiler.export_chrome_trace(str(folder / TRACE))
    write_table(folder / OPERATORS, operators(profiler, set(clock.entered())))
    tokens = case.batch * (DECODED if case.mode == "decode" else case.seq)
    return Measurement({"tokens": tokens, "plain_ms": plain_ms, "traced_ms": traced_ms})


def _take(mode: throughput.Prefill, case: Case, index: int, how: Callable[..., Any]) -> float:
    """Milliseconds of one call; of ``decode`` the last tokens of a chunk, whose write is among them."""
    if isinstance(mode, throughput.Decode):
        mode.prepare(0)
        if before := -DECODED % mode.chunk:
            mode.steps = before
            mode.call(0)
        mode.steps = DECODED
    else:
        mode.prepare(index)
    synchronize = torch.cuda.synchronize if case.device == "cuda" else lambda: None
    synchronize()
    started = time.perf_counter()
    how(lambda: mode.call(index))
    synchronize()
    return (time.perf_counter() - started) * 1e3


def operators(profiler: Any, ranges: set[str]) -> list[dict[str, Any]]:
    """One row an operator or named range, those that take the longest themselves first."""
    rows = []
    for event in profiler.key_averages():
        rows.append(
            {
                "operator": event.key,
                "kind": "range" if event.key in ranges else "operator",
                "calls": event.count,
                "self_cpu_ms": event.self_cpu_time_total / 1e3,
                "cpu_ms": event.cpu_time_total / 1e3,
                "self_device_ms": event.self_device_time_total / 1e3,
                "device_ms": event.device_time_total / 1e3,
            }
        )
    cpu, device = (sum(row[name] for row in rows) for name in ("self_cpu_ms", "self_device_ms"))
    for row in rows:
        row["self_cpu_share"] = row["self_cpu_ms"] / cpu if cpu else None
        row["self_device_share"] = row["self_device_ms"] / device if device else None
        if not device:  # nothing ran on one
            row["self_device_ms"] = row["device_ms"] = None
    return sorted(rows, key=lambda row: -(row["self_device_ms"] or row["self_cpu_ms"]))
