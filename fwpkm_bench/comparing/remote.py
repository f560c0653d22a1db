"""A side's process, as the one that compares sees it."""

from pathlib import Path
from typing import Any

from fwpkm_bench import catalog
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.executors.child import Child, ChildDiedError

USAGE = "usage"  # the status of what the user asked for and the side has not
SHARED = " (three processes share the memory while two sides are timed)"


class SideError(Exception):
    """A side that could not do what it was told."""

    def __init__(self, side: Side, status: str, reason: str) -> None:
        super().__init__(f"side {side.name}, {side.label}: {status}: {reason}")
        self.status, self.reason = status, reason


class Remote:
    """The process of one side and one case; a context manager that ends it.

    Raises:
        SideError: also in `call`; the process is of no use then.
    """

    def __init__(self, side: Side, request: dict[str, Any], timeout_s: float) -> None:
        from fwpkm_bench.comparing import bench

        self.side, self.timeout_s = side, timeout_s
        self._child = Child(bench.serve, bench.Place.of(side), _own(side, request))
        try:
            self._answer()
        except BaseException:
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
            reason = answer["reason"] + (SHARED if answer["status"] == "oom" else "")
            raise SideError(self.side, answer["status"], reason)
        return answer.get("result")

    def stop(self) -> None:
        """End the process."""
        self._child.stop(patience_s=0.0)

    def __enter__(self) -> "Remote":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _own(side: Side, request: dict[str, Any]) -> dict[str, Any]:
    """``request`` with the side's backend and settings; a layer's file is the one of the side's copy."""
    (layer,) = request["layers"]
    place = layer
    if side.root is not None and catalog.is_file(layer) and not Path(layer).is_absolute():
        place = f"{side.root / layer}"
    parts = ((*full.rpartition("."), values) for full, values in side.settings.items())
    settings = {f"{place}.{name}": values for owner, _, name, values in parts if owner == layer}
    own = request | {"layers": (place,), "settings": settings}
    return own if side.backend is None else own | {"backend": (side.backend,)}
