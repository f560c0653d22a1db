"""What one side does, in a process of its own, when it is told to.

The process is forked from a server that has torch and this tool imported; then the side's own copy of the
layers and their kernels is put before the tool's.
"""

import dataclasses
import importlib
import os
import queue
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import fwpkm_bench
from fwpkm_bench import parity, spec, worker
from fwpkm_bench.measure.memory import PeakMemory, keep_freed_memory
from fwpkm_bench.measure.timing import sampler
from fwpkm_bench.spec import Case, Sweep
from fwpkm_bench.workloads import recall, throughput

TOOL = Path(fwpkm_bench.__file__).parent
SETTLING_S = 1.0  # of calls before the first that counts


def serve(package: str | None, root: str | None, request: dict[str, Any], connection: Connection) -> None:
    """Answer ``(method, arguments)`` of a `Bench` until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    asked: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_listen, args=(connection, asked), daemon=True).start()
    try:
        if root is not None:
            os.chdir(root)
        if package is not None:
            enter(package)
        bench = Bench(request)
        connection.send({"status": "ok"})
    except Exception as error:  # noqa: BLE001 - a side that fails is a result
        connection.send(worker.failure(error))
        return
    while True:
        method, arguments = asked.get()
        try:
            connection.send({"status": "ok", "result": getattr(bench, method)(**arguments)})
        except Exception as error:  # noqa: BLE001 - a side that fails is a result
            connection.send(worker.failure(error))


def enter(package: str) -> None:
    """From now on ``fwpkm_bench.layers`` and ``fwpkm_bench.kernels`` are those of the folder ``package``."""
    for part in ("layers", "kernels"):
        own = f"fwpkm_bench.{part}"
        for name in [n for n in sys.modules if n == own or n.startswith(f"{own}.")]:
            del sys.modules[name]
        if hasattr(fwpkm_bench, part):
            delattr(fwpkm_bench, part)
    fwpkm_bench.__path__.insert(0, package)
    kernels = importlib.import_module("fwpkm_bench.kernels")
    kernels.__path__.append(str(TOOL / "kernels"))  # what the tool itself needs and an older side lacks


def _listen(connection: Connection, asked: queue.Queue[Any]) -> None:
    try:
        while True:
            asked.put(connection.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone


class Bench:
    """One side of one case. ``request`` has the fields of a `Sweep` that comes to that case; the settings are
    resolved here, with the side's own defaults."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.case = self.resolve("throughput")
        if self.case.device == "cpu":
            worker.limit_memory()

    def resolve(self, workload: str) -> Case:
        """The case of ``workload``."""
        return spec.cases(Sweep(**self.request, workloads=(workload,)))[0]

    def resolved(self) -> dict[str, Any]:
        """The backend and the settings that run."""
        return {"backend": self.case.backend, "settings": self.case.layer_settings}

    def outcome(self, into: str, parameters: str, *, dtype: str, device: str, seed: int, draw: bool) -> None:
        """Write output, state and gradients on random inputs, at a small size, to the file ``into``.

        ``draw``: draw the parameters and write them to the file ``parameters``; else read them from there.
        """
        settings = shrunk(self.case.layer_settings)
        layer = throughput.build_layer(dataclasses.replace(self.case, layer_settings=settings, seed=seed))
        if draw:
            save_file(layer.state_dict(), parameters)
        else:
            layer.load_state_dict(load_file(parameters))
        kind = getattr(torch, dtype)
        found = parity.outcome(layer.to(device, kind), device, kind, seed)
        save_file({name: tensor.double().cpu().contiguous() for name, tensor in found.items()}, into)

    def start(self, into: str) -> dict[str, Any]:
        """Build the case and run it until it has settled; the outputs of the first call go to ``into``."""
        case = self.case
        dtype = getattr(torch, case.dtype)
        layer = throughput.build_layer(case).to(device=case.device, dtype=dtype)
        self.mode = throughput.MODES[case.mode](case, layer, dtype)
        self.sample = sampler(case.device)
        memory = PeakMemory(case.device)
        self.mode.start()
        self.index = 0
        first_ms, result = self._call()
        peak = memory.peak_bytes()
        keep_freed_memory(case.device)
        self.mode.inspect(result)
        if into:
            self._write(result, into)
        del result
        started = time.perf_counter()
        milliseconds = first_ms
        while first_ms < 1e3 * SETTLING_S and time.perf_counter() - started < SETTLING_S:
            milliseconds, _ = self._call()
        return {
            **self.resolved(),
            "peak_memory_bytes": peak,
            "state_bytes": self.mode.state_bytes,
            "call_ms": milliseconds,
            "step_tokens": self.mode.step_tokens,
            "parameters": fingerprint(layer),
        }

    def turn(self, calls: int) -> list[float]:
        """Milliseconds a step of each of ``calls`` calls."""
        return [self._call()[0] / self.mode.steps for _ in range(calls)]

    def recall(self) -> dict[str, Any]:
        """The columns of the recall workload at the case's length."""
        return dict(recall.run(self.resolve("recall")).columns)

    def phases(self) -> list[dict[str, Any]]:
        """A row a phase of the case; a side without named ranges has one, ``other``."""
        from fwpkm_bench.profiling.phases import measure_phases  # listens to the side's own kernels

        return measure_phases(self.case).rows

    def _call(self) -> tuple[float, Any]:
        self.mode.prepare(self.index)
        found = self.sample(lambda: self.mode.call(self.index))
        self.index += 1
        return found

    def _write(self, result: Any, into: str) -> None:
        outputs = result if isinstance(result, list) else [result[0]]
        found = {"output": torch.cat(outputs, 1).detach().float().cpu().contiguous()}
        if (gradient := self.mode.inputs[0].grad) is not None:
            found["gradient: x"] = gradient.float().cpu().contiguous()
        save_file(found, into)


def shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with every size at most that of `parity.SMALL`: at full size a reference takes minutes."""
    small = {name: min(v, parity.SMALL[name]) if name in parity.SMALL else v for name, v in settings.items()}
    if "topk" in small and "n_subkeys" in small:
        small["topk"] = min(small["topk"], small["n_subkeys"])
    return small


def fingerprint(layer: Any) -> list[float]:
    """Two numbers for each parameter: equal where the parameters are."""
    with torch.no_grad():
        return [float(x) for p in layer.parameters() for x in (p.double().sum(), p.double().norm())]
