"""Cases run one after the other on this machine, each in a process of its own.

The processes are forked from a server that has imported torch once, so that a case starts in
milliseconds, with nothing of the case before it in memory.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from fwpkm_bench.spec import Case

PATIENCE_S = 5.0  # for a process that has sent its outcome to end


def process_context() -> Any:
    """What starts processes that have torch imported already, where the system can fork."""
    context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
    if sys.platform != "win32":
        context.set_forkserver_preload(["fwpkm_bench.worker"])
    return context


class LocalExecutor:
    """Runs cases; `stop` ends the one that is running."""

    def __init__(self) -> None:
        self._context = process_context()
        self._process: Any = None

    def run(self, case: Case, timeout_s: float, measure: Any = None) -> dict[str, Any]:
        """The outcome of ``case`` (see `worker.attempt`), also where its process did not live to tell.

        ``measure``: a picklable function for the workload's own ``run``.
        """
        from fwpkm_bench import worker

        ours, theirs = self._context.Pipe()
        self._process = self._context.Process(
            target=worker.work, args=(dataclasses.asdict(case), theirs, measure)
        )
        started = time.monotonic()
        with uninterrupted():
            self._process.start()
        theirs.close()
        try:
            if not ours.poll(timeout_s):
                return _failed("timeout", f"no result after {timeout_s:g} s; raise --timeout and add --retry")
            return ours.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE_S)
            return _failed("crashed", epitaph(self._process.exitcode, time.monotonic() - started))
        finally:
            self.stop()
            ours.close()

    def stop(self) -> None:
        """End the process of the case, if it still runs."""
        process, self._process = self._process, None
        if process is None or process.pid is None:
            return
        process.join(0.2)
        if process.is_alive():
            process.kill()
            process.join()
        process.close()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end: half a message to the server of processes would end it with a traceback."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    for late in arrived:
        signal.raise_signal(late)


def _failed(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "columns": {}, "samples_ms": [], "warmup_ms": []}


def epitaph(code: int | None, after_s: float) -> str:
    """How a process ended that did not say so itself."""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system kills so when memory runs out)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint} after {after_s:.1f} s"
    return f"the process ended with exit code {code} after {after_s:.1f} s"
