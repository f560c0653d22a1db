"""What one side does, in a process of its own, when it is told to."""

import dataclasses
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fwpkm_bench import parity, spec, worker
from fwpkm_bench.comparing.place import Place, lend
from fwpkm_bench.errors import UsageError
from fwpkm_bench.measure.memory import PeakMemory, keep_freed_memory
from fwpkm_bench.measure.timing import sampler
from fwpkm_bench.measurement import UnsupportedError
from fwpkm_bench.spec import Case, Sweep
from fwpkm_bench.workloads import recall, throughput

SETTLING_S = 0.3  # of calls before the first that counts
LONG_S = 2.0  # a first call that long settles by itself
BLOCK = 2**20  # elements
AFTER = 64  # tokens read on with the state that a first call left


def serve(place: Place | None, request: dict[str, Any], connection: Connection) -> None:
    """Answer ``(method, arguments)`` of a `Bench` until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    asked: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, asked), daemon=True).start()
    try:
        if place is not None:
            place.enter()
        bench = Bench(place, request)
        connection.send({"status": "ok"})
    except UsageError as error:
        connection.send({"status": "usage", "reason": str(error)})
        return
    except Exception as error:  # noqa: BLE001 - a side that fails is a result
        connection.send(worker.failure(error))
        return
    while True:
        method, arguments = asked.get()
        try:
            connection.send({"status": "ok", "result": getattr(bench, method)(**arguments)})
        except Exception as error:  # noqa: BLE001 - a side that fails is a result
            connection.send(worker.failure(error))


def _listen(connection: Connection, asked: queue.Queue[Any]) -> None:
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone


class Bench:
    """One side of one case. ``request`` has the fields of a `Sweep` that comes to that case; the settings are
    resolved here, with the side's own defaults."""

    def __init__(self, place: Place | None, request: dict[str, Any]) -> None:
        self.request = request
        (layer,) = request["layers"]
        if place is not None:
            place.check(layer)
        self.case = self.resolve("throughput")
        if place is not None:
            place.check(layer)  # again: what it imported
        if self.case.device == "cpu":
            worker.limit_memory()

    def resolve(self, workload: str) -> Case:
        """The case of ``workload``."""
        return spec.cases(Sweep(**self.request, workloads=(workload,)))[0]

    def outcome(
        self, into: str, parameters: str, *, dtype: str, device: str, seed: int, draw: bool
    ) -> dict[str, Any]:
        """Write output, state and gradients on random inputs, at a small size, to the file ``into``.

        ``draw``: draw the parameters and write them to the file ``parameters``; else read them from there.
        Where ``dtype`` is empty it is float32, or bfloat16 for a backend that computes in nothing wider.
        """
        settings = shrunk(self.case.layer_settings)
        layer = throughput.build_layer(dataclasses.replace(self.case, layer_settings=settings, seed=seed))
        half = self.case.backend in getattr(layer, "half_backends", ())  # an older side may not say
        dtype = dtype or ("bfloat16" if half else "float32")
        if draw:
            save_file(layer.state_dict(), parameters)
        else:
            _load(layer, load_file(parameters))
        kind = getattr(torch, dtype)
        found = parity.outcome(layer.to(device, kind), device, kind, seed)
        save_file({name: tensor.double().cpu().contiguous() for name, tensor in found.items()}, into)
        return {"exact": not half and self.case.backend != "fla"}  # fla-core computes in tf32

    def start(self, into: str) -> dict[str, Any]:
        """Build the case and run it until it has settled. Where ``into`` names a file, the first call's
        results go there, and what is returned tells the parameters too."""
        case = self.case
        self.mode = throughput.prepared(case)
        self.sample = sampler(case.device)
        memory = PeakMemory(case.device)
        self.mode.start()
        self.index = 0
        first_ms, result = self._call()
        peak = memory.peak_bytes()
        keep_freed_memory(case.device)
        self.mode.inspect(result)
        if into:
            save_file(self._outputs(result), into)
        del result
        started = time.perf_counter()
        milliseconds = first_ms
        while first_ms < 1e3 * LONG_S and time.perf_counter() - started < SETTLING_S:
            milliseconds, _ = self._call()
        return {
            "backend": case.backend,
            "settings": case.layer_settings,
            "peak_memory_bytes": peak,
            "state_bytes": self.mode.state_bytes,
            "call_ms": milliseconds,
            "step_tokens": self.mode.step_tokens,
            "parameters": fingerprint(self.mode.layer) if into else None,
        }

    def turn(self, calls: int, warm: bool) -> list[float]:
        """Milliseconds a step of each of ``calls`` calls, after one that is not timed where ``warm``: another
        process had the caches."""
        if warm:
            self._call()
        return [self._call()[0] / self.mode.steps for _ in range(calls)]

    def recall(self) -> dict[str, Any]:
        """The columns of the recall workload at the case's length."""
        return dict(recall.run(self.resolve("recall")).columns)

    def phases(self) -> list[dict[str, Any]]:
        """A row a phase of the case; a side without named ranges has one, ``other``."""
        lend("phases")
        from fwpkm_bench.profiling.phases import measure_phases  # listens to the side's own kernels

        return measure_phases(self.case).rows

    def _call(self) -> tuple[float, Any]:
        self.mode.prepare(self.index)
        found = self.sample(lambda: self.mode.call(self.index))
        self.index += 1
        return found

    def _outputs(self, result: Any) -> dict[str, Tensor]:
        """Outputs, what the state makes of some more tokens, and the gradient of the input."""
        if isinstance(result, list):  # of decoded tokens
            found = {"output": torch.cat(result, 1)}
        else:
            more = self.mode.inputs[-1][:, :AFTER].detach()
            with torch.no_grad():
                found = {"output": result[0], "output after": self.mode.layer(more, result[1].detach())[0]}
        if (gradient := self.mode.inputs[0].grad) is not None:
            found["gradient: x"] = gradient
        return {name: tensor.detach().float().cpu().contiguous() for name, tensor in found.items()}


def _load(layer: Any, parameters: dict[str, Tensor]) -> None:
    """Raises `UnsupportedError` where the names or shapes of the parameters are others."""
    mine = {name: list(tensor.shape) for name, tensor in layer.state_dict().items()}
    given = {name: list(tensor.shape) for name, tensor in parameters.items()}
    if mine != given:
        others = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
        raise UnsupportedError(
            f"its parameters are not those of side A, so results cannot be compared: {', '.join(others)}"
        )
    layer.load_state_dict(parameters)


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with every size at most that of `parity.SMALL`: at full size a reference takes minutes."""
    small = {name: min(v, parity.SMALL[name]) if name in parity.SMALL else v for name, v in settings.items()}
    if "topk" in small and "n_subkeys" in small:
        small["topk"] = min(small["topk"], small["n_subkeys"])
    return small


def fingerprint(layer: Any) -> list[float]:
    """Two numbers for each parameter: equal where the parameters are."""
    numbers = []
    for parameter in layer.parameters():
        blocks = parameter.detach().flatten().split(BLOCK)  # a table is not copied whole
        numbers.append(sum(float(block.sum(dtype=torch.float64)) for block in blocks))
        numbers.append(sum(float(block.double().square().sum()) for block in blocks))
    return numbers
