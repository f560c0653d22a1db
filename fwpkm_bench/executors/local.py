"""Cases run one after the other on this machine, each in a process of its own."""

import dataclasses
from typing import Any

from fwpkm_bench.executors.child import Child, ChildDiedError
from fwpkm_bench.spec import Case


class LocalExecutor:
    """Runs cases; `stop` ends the one that is running."""

    def __init__(self) -> None:
        self._child: Child | None = None

    def run(self, case: Case, timeout_s: float, measure: Any = None) -> dict[str, Any]:
        """The outcome of ``case`` (see `worker.attempt`), also where its process did not live to tell.

        ``measure``: a picklable function for the workload's own ``run``.
        """
        from fwpkm_bench import worker

        self._child = Child(worker.work, dataclasses.asdict(case), measure)
        try:
            return self._child.receive(timeout_s)
        except TimeoutError:
            return _failed("timeout", f"no result after {timeout_s:g} s; raise --timeout and add --retry")
        except ChildDiedError as error:
            return _failed("crashed", str(error))
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process of the case, if it still runs."""
        child, self._child = self._child, None
        if child is not None:
            child.stop()


def _failed(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "columns": {}, "samples_ms": [], "warmup_ms": []}
