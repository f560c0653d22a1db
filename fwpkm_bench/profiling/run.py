"""Profile -> parts -> one folder: each part in a process of its own, so that none takes another along."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fwpkm_bench.executors.local import LocalExecutor
from fwpkm_bench.measure.environment import describe
from fwpkm_bench.profiling import phases
from fwpkm_bench.profiling.folder import PARTS, ProfileFolder, write_profile, write_table
from fwpkm_bench.profiling.spec import Profile
from fwpkm_bench.spec import Case

Outcome = dict[str, Any]  # part, status, reason, elapsed_s
Part = Callable[[Case, Path, float, LocalExecutor], tuple[str, str]]


def run(
    profile: Profile, case: Case, out: Path, command: str, show: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run the parts of ``profile`` and leave what they wrote in the folder ``out``, unless all failed."""
    outcomes: list[Outcome] = []
    executor = LocalExecutor()
    try:
        with ProfileFolder(out) as folder:
            for name in profile.chosen_parts(case):
                started = time.monotonic()
                status, reason = PART[name](case, folder.work, profile.timeout_s, executor)
                elapsed = round(time.monotonic() - started, 3)
                outcomes.append({"part": name, "status": status, "reason": reason, "elapsed_s": elapsed})
                show(outcomes[-1])
            if any(outcome["status"] == "ok" for outcome in outcomes):
                write_table(folder.work / PARTS, outcomes)
                content = {"command": command, "case_id": case.case_id, "case": dataclasses.asdict(case)}
                write_profile(folder.work, content | {"parts": outcomes, "environment": describe()})
                folder.keep()
    finally:
        executor.stop()
    return outcomes


def _in_process(
    measure: Callable[..., Any], case: Case, folder: Path, timeout_s: float, executor: LocalExecutor
) -> tuple[str, str]:
    """``measure(case, folder=folder)`` in a process of its own, as a case of a sweep is."""
    outcome = executor.run(case, timeout_s, partial(measure, folder=folder))
    return outcome["status"], outcome["reason"]


PART: dict[str, Part] = {
    "phases": partial(_in_process, phases.record),
}
