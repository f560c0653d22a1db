"""A process for work that may not live to tell, and what is said of it then."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fwpkm_bench

# What processes may be asked to run is read once, so that an edit meanwhile changes nothing in a run.
PRELOADED = ["fwpkm_bench.worker", "fwpkm_bench.comparing.bench"]
TOOL = Path(fwpkm_bench.__file__).parents[1]
PATIENCE_S = 5.0  # for a process that has sent its outcome to end


class ChildDiedError(Exception):
    """The process ended without having sent what was waited for; the message says how."""


class Child:
    """A process that sends messages, and may be sent some: ``target(*args, connection)``.

    Processes are forked from a server that has imported torch once, so that they start in milliseconds, with
    nothing of another's in memory.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context: Any = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
        if sys.platform != "win32":
            context.set_forkserver_preload(PRELOADED)
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(*args, theirs))
        self._started = time.monotonic()
        with _uninterrupted(), _own_package_first():
            self._process.start()
        theirs.close()

    def send(self, message: Any) -> None:
        """Tell it something; if it is gone, `receive` says how it ended."""
        with contextlib.suppress(OSError):
            self._ours.send(message)

    def receive(self, timeout_s: float) -> Any:
        """Its next message.

        Raises:
            TimeoutError: it takes longer than ``timeout_s``, and goes on.
            ChildDiedError: it is gone.
        """
        try:
            if self._ours.poll(timeout_s):
                return self._ours.recv()
        except (EOFError, OSError) as error:
            self._process.join(PATIENCE_S)
            after = time.monotonic() - self._started
            raise ChildDiedError(_epitaph(self._process.exitcode, after)) from error
        raise TimeoutError

    def stop(self, patience_s: float = 0.2) -> None:
        """End it, if it still runs after ``patience_s``."""
        self._process.join(patience_s)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()
        self._ours.close()


@contextlib.contextmanager
def _own_package_first() -> Iterator[None]:
    """Have the server of processes, if it starts now, import this package and not one in the folder that the
    user happens to stand in."""
    path = os.pathsep.join(filter(None, (str(TOOL), os.environ.get("PYTHONPATH"))))
    changed = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
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


def _epitaph(code: int | None, after_s: float) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system kills so when memory runs out)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint} after {after_s:.1f} s"
    return f"the process ended with exit code {code} after {after_s:.1f} s"
