"""One case, in its own process."""

import os
import resource
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch

from fwpkm_bench import catalog
from fwpkm_bench.errors import UsageError
from fwpkm_bench.measurement import DivergedError, Measurement, UnsupportedError
from fwpkm_bench.spec import Case

Measure = Callable[[Case], Measurement]

STATUS = Path("/proc/self/status")
MEMORY_SHARE = 0.9  # of what is free: a case asking for more is told no, and the machine lives on


def work(case: dict[str, Any], measure: Measure | None, connection: Connection) -> None:
    """Run ``case`` and send ``{"status", "reason", "columns", "samples_ms", "warmup_ms"}`` back."""
    settle(connection)
    resolved = Case(**case)
    if resolved.device == "cpu":
        limit_memory()
    connection.send(attempt(resolved, measure))
    connection.close()


def settle(connection: Connection) -> None:
    """Leave Ctrl-C to the parent at the other end of ``connection``, and live no longer than it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()


def attempt(case: Case, measure: Measure | None = None) -> dict[str, Any]:
    """The outcome of ``case`` by its workload, or by ``measure``; every failure becomes a status and a reason
    of one line."""
    outcome: dict[str, Any] = {"status": "ok", "reason": "", "columns": {}, "samples_ms": [], "warmup_ms": []}
    try:
        measurement = (measure or catalog.load_workload(case.workload).run)(case)
    except Exception as error:  # noqa: BLE001 - whatever a layer throws is a row
        return outcome | failure(error)
    columns = {name: _plain(value) for name, value in measurement.columns.items()}
    return outcome | {
        "columns": columns,
        "samples_ms": measurement.samples_ms,
        "warmup_ms": measurement.warmup_ms,
        **({"phases": measurement.phases} if measurement.phases else {}),
    }


def failure(error: Exception) -> dict[str, str]:
    """The status and the reason, of one line, that ``error`` comes to; of a crash the whole trace too."""
    reason = _one_line(error)
    match error:
        case UnsupportedError() | UsageError():
            return {"status": "unsupported", "reason": reason}
        case NotImplementedError():
            return {"status": "unsupported", "reason": reason or "not implemented"}
        case DivergedError():
            return {"status": "diverged", "reason": reason}
        case MemoryError() | torch.OutOfMemoryError():
            return {"status": "oom", "reason": reason or "out of memory"}
    status = "oom" if "can't allocate memory" in str(error) else "crashed"
    detail = "".join(traceback.format_exception(error))
    return {"status": status, "reason": f"{type(error).__name__}: {reason}", "detail": detail}


def _plain(value: Any) -> Any:
    """A column as plain Python: what a layer counts may be a numpy or torch number."""
    return value.item() if hasattr(value, "item") else value


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""


def _end_with_parent(connection: Connection) -> None:
    """Nothing is ever sent to a worker: when its connection ends, the parent is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


def limit_memory() -> None:
    """Let allocations beyond the free memory fail here, rather than have the system kill at random."""
    if sys.platform != "linux":
        return
    free = psutil.virtual_memory().available
    used = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(used.split()[1]) * 1024 + int(free * MEMORY_SHARE)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
