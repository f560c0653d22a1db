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
from fwpkm_bench.measurement import DivergedError, Measurement, UnsupportedError
from fwpkm_bench.spec import Case

Measure = Callable[[Case], Measurement]

STATUS = Path("/proc/self/status")
MEMORY_SHARE = 0.9  # of what is free: a case asking for more is told no, and the machine lives on


def work(case: dict[str, Any], connection: Connection, measure: Measure | None = None) -> None:
    """Run ``case`` and send ``{"status", "reason", "columns", "samples_ms", "warmup_ms"}`` back."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    resolved = Case(**case)
    if resolved.device == "cpu":
        _limit_memory()
    connection.send(attempt(resolved, measure))
    connection.close()


def attempt(case: Case, measure: Measure | None = None) -> dict[str, Any]:
    """The outcome of ``case`` by its workload, or by ``measure``; every failure becomes a status and a reason
    of one line."""
    outcome: dict[str, Any] = {"status": "ok", "reason": "", "columns": {}, "samples_ms": [], "warmup_ms": []}
    try:
        measurement = (measure or catalog.load_workload(case.workload).run)(case)
    except UnsupportedError as error:
        return outcome | {"status": "unsupported", "reason": _one_line(error)}
    except NotImplementedError as error:
        return outcome | {"status": "unsupported", "reason": _one_line(error) or "not implemented"}
    except DivergedError as error:
        return outcome | {"status": "diverged", "reason": _one_line(error)}
    except (MemoryError, torch.OutOfMemoryError) as error:
        return outcome | {"status": "oom", "reason": _one_line(error) or "out of memory"}
    except Exception as error:  # noqa: BLE001 - whatever a layer throws is a row
        status = "oom" if "can't allocate memory" in str(error) else "crashed"
        reason = f"{type(error).__name__}: {_one_line(error)}"
        return outcome | {"status": status, "reason": reason, "detail": traceback.format_exc()}
    columns = {name: _plain(value) for name, value in measurement.columns.items()}
    return outcome | {
        "columns": columns,
        "samples_ms": measurement.samples_ms,
        "warmup_ms": measurement.warmup_ms,
        **({"phases": measurement.phases} if measurement.phases else {}),
    }


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


def _limit_memory() -> None:
    """Let allocations beyond the free memory fail here, rather than have the system kill at random."""
    if sys.platform != "linux":
        return
    free = psutil.virtual_memory().available
    used = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmData"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = int(used.split()[1]) * 1024 + int(free * MEMORY_SHARE)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
