"""Profile -> parts -> one folder: each part in a process of its own, so that none takes another along."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fwpkm_bench.executors.local import LocalExecutor
from fwpkm_bench.measure.environment import describe
from fwpkm_bench.measurement import UnsupportedError
from fwpkm_bench.profiling import host, memory, page, phases, pictures, trace
from fwpkm_bench.profiling.folder import PARTS, ProfileFolder, write_profile, write_table
from fwpkm_bench.profiling.spec import Profile
from fwpkm_bench.spec import Case

Outcome = dict[str, Any]  # part, status, reason, elapsed_s, figures
Part = Callable[[Case, Path, float, LocalExecutor], Outcome]


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
                outcome = {"part": name, **PART[name](case, folder.work, profile.timeout_s, executor)}
                outcomes.append(outcome | {"elapsed_s": round(time.monotonic() - started, 3)})
                show(outcomes[-1])
            if any(outcome["status"] == "ok" for outcome in outcomes):
                names = ("part", "status", "reason", "elapsed_s")
                write_table(folder.work / PARTS, [{name: o[name] for name in names} for o in outcomes])
                content = {"command": command, "case_id": case.case_id, "case": dataclasses.asdict(case)}
                write_profile(folder.work, content | {"parts": outcomes, "environment": describe()})
                try:
                    pictures.draw_all(folder.work)
                    page.write(folder.work)
                finally:
                    folder.keep()
    finally:
        executor.stop()
    return outcomes


def _in_process(
    measure: Callable[..., Any], case: Case, folder: Path, timeout_s: float, executor: LocalExecutor
) -> Outcome:
    """``measure(case, folder=folder)`` in a process of its own, as a case of a sweep is."""
    found = executor.run(case, timeout_s, partial(measure, folder=folder))
    return {"status": found["status"], "reason": found["reason"], "figures": found["columns"]}


def _watched(
    tool: Callable[[Case, Path, float], dict[str, Any]],
    case: Case,
    folder: Path,
    timeout_s: float,
    _executor: LocalExecutor,
) -> Outcome:
    """What ``tool`` finds out in processes that it starts itself."""
    try:
        return {"status": "ok", "reason": "", "figures": tool(case, folder, timeout_s)}
    except UnsupportedError as error:
        return {"status": "unsupported", "reason": str(error), "figures": {}}
    except (OSError, ValueError, KeyError) as error:
        return {"status": "crashed", "reason": f"{type(error).__name__}: {error}", "figures": {}}


PART: dict[str, Part] = {
    "phases": partial(_in_process, phases.record),
    "trace": partial(_in_process, trace.record),
    "host": partial(_watched, host.sample),
    "memory": partial(_in_process, memory.record),
    "kernels": partial(_watched, host.kernels),
    "ncu": partial(_watched, host.compute),
    "nsys": partial(_watched, host.systems),
}
