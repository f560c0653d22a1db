"""Sweep -> Cases -> Rows: what runs next, what is left, and when to leave out."""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwpkm_bench.errors import UsageError, choose
from fwpkm_bench.executors.local import LocalExecutor
from fwpkm_bench.measure.environment import describe
from fwpkm_bench.spec import DEVICES, Case, Sweep, cases
from fwpkm_bench.store import RunFolder
from fwpkm_bench.tables import write_tables

FIRST_GUESS_S = 3.0
TABLE_EVERY_S = 5.0
TABLE_SHARE = 0.05  # of the time of a run, at most, for tables before its end
HOPELESS = ("oom", "timeout")  # at one length, so at every longer one


@dataclass(frozen=True)
class Progress:
    """Where a run stands, handed to the display before and after each case."""

    case: Case
    done: int
    total: int
    left_s: float
    outcome: dict[str, Any] | None = None


def plan(sweep: Sweep) -> list[Case]:
    """The cases in the order in which they run: short sequences first, within a length at random.

    So all layers are measured side by side at each length, and a drift of the machine hits all alike.
    """
    shuffle = random.Random(sweep.digest)
    planned: list[Case] = []
    for _, group in itertools.groupby(cases(sweep), key=lambda case: case.seq):
        block = list(group)
        shuffle.shuffle(block)
        planned += block
    return planned


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    choose("device", device, DEVICES)
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                "device cuda is not there: torch sees no GPU; use --device cpu (see fwpkm-bench doctor)"
            )


def run(
    sweep: Sweep,
    out: Path,
    command: str,
    show: Callable[[Progress], None],
    *,
    retry: bool = False,
    profile: bool = False,
) -> None:
    """Run what is missing of ``sweep`` in the folder ``out``; its tables are true whenever this ends.

    ``retry``: the cases that failed count as missing. ``profile``: keep the phases of each case of the
    workload ``throughput`` too, from calls after the timed ones.
    """
    check_device(sweep.device)
    planned = plan(sweep)
    executor = LocalExecutor()
    with RunFolder(out, sweep.digest) as folder:
        environment = describe()
        folder.start({"command": command, "sweep": dataclasses.asdict(sweep), "environment": environment})
        commit = (environment["git"] or {}).get("commit")
        try:
            due = 0.0
            finished = [r for r in folder.records if r["status"] == "ok" or not retry]
            for record in _records(planned, finished, sweep.timeout_s, executor, show, profile):
                folder.append({**record, "commit": commit})
                if (began := time.monotonic()) > due:
                    write_tables(out)
                    took = time.monotonic() - began
                    due = began + max(TABLE_EVERY_S, took / TABLE_SHARE)
        finally:
            executor.stop()
            write_tables(out)


def _records(
    planned: list[Case],
    finished: list[dict[str, Any]],
    timeout_s: float,
    executor: LocalExecutor,
    show: Callable[[Progress], None],
    profile: bool,
) -> Iterator[dict[str, Any]]:
    known = {record["case_id"] for record in finished}
    left = [case for case in planned if case.case_id not in known]
    estimate = Estimate()
    hopeless: dict[str, str] = {}
    by_id = {case.case_id: case for case in planned}
    for record in finished:
        if (case := by_id.get(record["case_id"])) is not None:
            estimate.learn(case, record["elapsed_s"])
            _note_hopeless(hopeless, case, record)
    for index, case in enumerate(left):
        done = len(planned) - len(left) + index
        show(Progress(case, done, len(planned), estimate.seconds(left[index:])))
        started = time.monotonic()
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if case.series in hopeless:
            outcome = {"status": "skipped", "reason": hopeless[case.series], "columns": {}}
        else:
            phased = _phased() if profile and case.workload == "throughput" else None
            outcome = executor.run(case, timeout_s, phased)
        elapsed = time.monotonic() - started
        record = {"case_id": case.case_id, "case": dataclasses.asdict(case), **outcome}
        record |= {"started_at": began, "elapsed_s": round(elapsed, 3)}
        estimate.learn(case, elapsed)
        _note_hopeless(hopeless, case, record)
        yield record
        show(Progress(case, done + 1, len(planned), estimate.seconds(left[index + 1 :]), record))


def _phased() -> Callable[[Case], Any]:
    """The measurement that looks at phases too; it brings torch along, which planning does without."""
    from fwpkm_bench.profiling.phases import measure_with_phases

    return measure_with_phases


def _note_hopeless(hopeless: dict[str, str], case: Case, record: dict[str, Any]) -> None:
    if record["status"] in HOPELESS:
        hopeless.setdefault(case.series, f"{record['status']} at the shorter length {case.seq} already")


class Estimate:
    """How long cases take, from the shorter cases of the same series."""

    def __init__(self) -> None:
        self._times: dict[str, list[tuple[int, float]]] = {}

    def learn(self, case: Case, elapsed_s: float) -> None:
        self._times.setdefault(case.series, []).append((case.seq, elapsed_s))

    def seconds(self, left: list[Case]) -> float:
        return sum(self._one(case) for case in left)

    def _one(self, case: Case) -> float:
        times = sorted(self._times.get(case.series, []))
        if not times:
            return FIRST_GUESS_S
        seq, elapsed = times[-1]
        growth = 1.0  # exponent of the last doubling, between constant and quadratic
        if len(times) > 1 and times[-2][1] > 0 and seq > times[-2][0]:
            growth = math.log(elapsed / times[-2][1]) / math.log(seq / times[-2][0])
        return elapsed * max(1.0, case.seq / seq) ** min(2.0, max(0.0, growth))
