"""A side's process, as the one that compares sees it."""

import contextlib
import time
from pathlib import Path
from typing import Any

from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.executors.local import PATIENCE_S, epitaph, process_context, uninterrupted


class SideError(Exception):
    """A side that could not do what it was told."""

    def __init__(self, side: Side, status: str, reason: str, detail: str = "") -> None:
        super().__init__(f"side {side.name}, {side.label}: {status}: {reason}")
        self.status = status
        self.detail = detail  # the trace, where there is one


class Remote:
    """The process of one side and one case; a context manager that ends it.

    Raises:
        SideError: also in `call`; the process is of no use then.
    """

    def __init__(self, side: Side, request: dict[str, Any], timeout_s: float) -> None:
        from fwpkm_bench.comparing import bench

        self.side, self.timeout_s = side, timeout_s
        context = process_context()
        self._connection, theirs = context.Pipe()
        package, root = (None if path is None else str(path) for path in (side.package, side.root))
        own = dict(request)
        if side.backend is not None:
            own["backend"] = (side.backend,)
        if side.root is not None:
            own["layers"] = tuple(_within(name, side.root) for name in own["layers"])
        layer = own["layers"][0]
        own["settings"] = {name: v for name, v in side.settings.items() if name.rpartition(".")[0] == layer}
        self._process: Any = context.Process(target=bench.serve, args=(package, root, own, theirs))
        self._started = time.monotonic()
        with uninterrupted():
            self._process.start()
        theirs.close()
        try:
            self._answer()
        except SideError:
            self.stop()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """What the side's `Bench` answers."""
        with contextlib.suppress(OSError):  # it is gone; how it ended is said below
            self._connection.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            if not self._connection.poll(self.timeout_s):
                raise SideError(self.side, "timeout", f"no answer in {self.timeout_s:g} s; raise --timeout")
            answer = self._connection.recv()
        except (EOFError, OSError):
            self._process.join(PATIENCE_S)
            after_s = time.monotonic() - self._started
            raise SideError(self.side, "crashed", epitaph(self._process.exitcode, after_s)) from None
        if answer["status"] != "ok":
            raise SideError(self.side, answer["status"], answer["reason"], answer.get("detail", ""))
        return answer.get("result")

    def stop(self) -> None:
        """End the process."""
        self._connection.close()
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._process.close()

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _within(name: str, root: Path) -> str:
    """``path/to/file.py:Class``, the path relative to the repository, as the side ``root`` has it."""
    path, colon, rest = name.rpartition(":")
    return f"{root / path}{colon}{rest}" if path.endswith(".py") and not Path(path).is_absolute() else name
