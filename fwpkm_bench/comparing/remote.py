"""A side's process, as the one that compares sees it."""

from pathlib import Path
from typing import Any

from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.executors.child import Child, ChildDiedError


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
        package, root = (None if path is None else str(path) for path in (side.package, side.root))
        own = dict(request)
        if side.backend is not None:
            own["backend"] = (side.backend,)
        if side.root is not None:
            own["layers"] = tuple(_within(name, side.root) for name in own["layers"])
        layer = own["layers"][0]
        own["settings"] = {name: v for name, v in side.settings.items() if name.rpartition(".")[0] == layer}
        self._child = Child(bench.serve, package, root, own)
        try:
            self._answer()
        except SideError:
            self.stop()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """What the side's `Bench` answers."""
        self._child.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._child.receive(self.timeout_s)
        except TimeoutError:
            reason = f"no answer in {self.timeout_s:g} s; raise --timeout"
            raise SideError(self.side, "timeout", reason) from None
        except ChildDiedError as error:
            raise SideError(self.side, "crashed", str(error)) from None
        if answer["status"] != "ok":
            raise SideError(self.side, answer["status"], answer["reason"], answer.get("detail", ""))
        return answer.get("result")

    def stop(self) -> None:
        """End the process."""
        self._child.stop(patience_s=0.0)

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _within(name: str, root: Path) -> str:
    """``path/to/file.py:Class``, the path relative to the repository, as the side ``root`` has it."""
    path, colon, rest = name.rpartition(":")
    return f"{root / path}{colon}{rest}" if path.endswith(".py") and not Path(path).is_absolute() else name
