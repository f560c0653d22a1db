"""Memory over the time of a case's first call: what lives in tensors and as what, and what the process holds.

Every tensor that an operator makes is followed until its storage is freed, so that each moment's bytes can
be split once the call has ended and it is known which storages its state and its gradients lie in. A thread
samples what the system says of the process. Both slow the call down: its times are its own.
"""

import gzip
import json
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fwpkm_bench.measure.memory import PeakMemory
from fwpkm_bench.measure.phase_clock import PhaseClock
from fwpkm_bench.measurement import Measurement
from fwpkm_bench.profiling.folder import MEMORY, MEMORY_SPLIT, SNAPSHOT, write_table
from fwpkm_bench.profiling.gpu import GPU
from fwpkm_bench.spec import Case
from fwpkm_bench.workloads import throughput

KINDS = ("weights", "inputs", "state", "gradients", "activations")
PERIOD_S = {"cpu": 0.002, "cuda": 0.01}  # asking a GPU's driver takes a millisecond
MOST_ROWS = 2000
HISTORY = 100_000  # allocations in a snapshot


def record(case: Case, *, folder: Path) -> Measurement:
    """Write ``memory.csv`` and ``memory_split.csv`` of the first call, on a GPU the allocator's history too.

    There is no optimiser in a case, so its column is empty.
    """
    mode = throughput.prepared(case)
    mode.start()
    mode.prepare(0)
    clock = PhaseClock("cpu")  # allocations happen in the host's time, also those of a GPU's memory
    tensors = LiveTensors(
        {"weights": mode.layer.parameters(), "inputs": _inputs(mode), "state": _state(mode)}
    )
    with tensors:  # the first operator that is followed imports a part of torch
        torch.empty(0)
    peak = PeakMemory(case.device)
    history = case.device == "cuda"
    if history:
        torch.cuda.memory._record_memory_history(max_entries=HISTORY, context=None)
    with Sampler(case.device) as sampler:
        started = time.perf_counter_ns()
        with tensors:
            result = clock.run(mode.layer, lambda: mode.call(0))
        stopped = time.perf_counter_ns()
    figures: dict[str, Any] = {"call_ms": (stopped - started) / 1e6}
    figures |= {"peak_bytes": peak.peak_bytes(), "total_bytes": peak.total_bytes()}
    if history:
        figures["snapshot_missing"] = _write_snapshot(folder / SNAPSHOT)
    state = getattr(mode, "state", None) or result[1]
    gradients = [t.grad for t in (*mode.layer.parameters(), *mode.inputs) if t.grad is not None]
    tensors.name("gradients", gradients)
    tensors.name("state", _tensors_in(state))
    rows = merged(sampler.samples, tensors.history(), clock.spans(), started, stopped)
    write_table(folder / MEMORY, rows)
    split = [{"what": kind, **row} for kind, row in tensors.split().items()]
    split[KINDS.index("state")]["used_bytes"] = state.nbytes()
    split.append({"what": "optimizer"})
    write_table(folder / MEMORY_SPLIT, split)
    return Measurement(figures | {"peak_tensor_bytes": tensors.peak()})


def _inputs(mode: throughput.Prefill) -> list[Tensor]:
    more = [getattr(mode, name) for name in ("cotangent", "tokens") if hasattr(mode, name)]
    return [*mode.inputs, *more]


def _state(mode: throughput.Prefill) -> list[Tensor]:
    """The tensors of the state that the call starts from."""
    return list(_tensors_in(getattr(mode, "state", None)))


def _tensors_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors that ``value`` holds in its fields, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
        return
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif hasattr(value, "__dict__"):
        inner = vars(value).values()
    if depth:
        for part in inner:
            yield from _tensors_in(part, depth - 1)


class LiveTensors(TorchDispatchMode):
    """A context manager that follows the storages of all tensors that operators return.

    ``known``: tensors that are there before, by the name of what they are; the first name counts.
    """

    def __init__(self, known: dict[str, Iterable[Tensor]]) -> None:
        super().__init__()
        self._names: dict[int, str] = {}  # of the storage's number
        self._numbers: dict[int, int] = {}  # of the storages that live, by address
        self._bytes: dict[int, int] = {}
        self._events: list[tuple[int, int, int]] = []  # when, of which storage, by how much
        self._lock = threading.Lock()
        for name, tensors in known.items():
            for tensor in tensors:
                number = self._follow(tensor)
                if number is not None:
                    self._names.setdefault(number, name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> int | None:
        if tensor.layout != torch.strided:
            return None
        storage = tensor.untyped_storage()
        address = storage._cdata
        with self._lock:
            if address in self._numbers:
                return self._numbers[address]
            number = self._numbers[address] = len(self._bytes)
            self._bytes[number] = storage.nbytes()
            self._events.append((time.perf_counter_ns(), number, storage.nbytes()))
        weakref.finalize(storage, self._freed, address, number).atexit = False
        return number

    def _freed(self, address: int, number: int) -> None:
        with self._lock:
            self._numbers.pop(address, None)
            self._events.append((time.perf_counter_ns(), number, -self._bytes[number]))

    def name(self, what: str, tensors: Iterable[Tensor]) -> None:
        """Say what the storages of ``tensors`` are; weights, and what was named before, stay so."""
        for tensor in tensors:
            number = self._numbers.get(tensor.untyped_storage()._cdata)
            if number is not None:
                self._names.setdefault(number, what)

    def history(self) -> list[tuple[int, dict[str, int]]]:
        """The bytes of each kind after each change."""
        now = dict.fromkeys(KINDS, 0)
        found = []
        for when, number, change in sorted(self._events, key=lambda event: event[0]):
            now[self._names.get(number, "activations")] += change
            found.append((when, dict(now)))
        return found

    def split(self) -> dict[str, dict[str, int]]:
        """Of each kind: bytes at its own highest, at the highest of all, and at the end."""
        history = [kinds for _, kinds in self.history()]
        highest = max(history, key=lambda kinds: sum(kinds.values()))
        return {
            kind: {
                "highest_bytes": max(kinds[kind] for kinds in history),
                "bytes_at_peak": highest[kind],
                "bytes_at_end": history[-1][kind],
            }
            for kind in KINDS
        }

    def peak(self) -> int:
        """The most bytes that lived in tensors at a time."""
        return max(sum(kinds.values()) for _, kinds in self.history())


class Sampler:
    """A context manager; a thread asks the system what this process holds, every few milliseconds."""

    def __init__(self, device: str) -> None:
        self.samples: list[tuple[int, dict[str, Any]]] = []
        self._period = PERIOD_S[device]
        self._ask = _gpu_sample(GPU()) if device == "cuda" else _resident(psutil.Process())
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            self.samples.append((time.perf_counter_ns(), self._ask()))
            if self._stop.wait(self._period):
                return

    def __enter__(self) -> "Sampler":
        self.samples.append((time.perf_counter_ns(), self._ask()))
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        self._thread.join()
        self.samples.append((time.perf_counter_ns(), self._ask()))


def _resident(process: psutil.Process) -> Callable[[], dict[str, Any]]:
    return lambda: {"resident_bytes": process.memory_info().rss}


def _gpu_sample(gpu: GPU) -> Callable[[], dict[str, Any]]:
    def ask() -> dict[str, Any]:
        held = {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
        }
        return held | gpu.read()

    return ask


def merged(
    samples: list[tuple[int, dict[str, Any]]],
    history: list[tuple[int, dict[str, int]]],
    spans: list[tuple[int, str]],
    started: int,
    stopped: int,
) -> list[dict[str, Any]]:
    """One row a sample of the call, with the highest moment of the tensors since the sample before it."""
    step = 1 + len(samples) // MOST_ROWS
    samples = [s for i, s in enumerate(samples) if not i % step or i == len(samples) - 1]
    rows = []
    change, span, now = 0, 0, dict.fromkeys(KINDS, 0)
    while change < len(history) and history[change][0] < started:
        now, change = history[change][1], change + 1
    for when, sample in samples:
        highest, at = now, min(max(when, started), stopped)
        while change < len(history) and history[change][0] <= when:
            moment, now = history[change]
            change += 1
            if sum(now.values()) > sum(highest.values()):
                highest, at = now, min(moment, stopped)
        while span + 1 < len(spans) and spans[span + 1][0] <= at:
            span += 1
        row: dict[str, Any] = {"time_ms": (when - started) / 1e6, "phase": spans[span][1], **sample}
        rows.append(
            row | {f"{kind}_bytes": count for kind, count in highest.items()} | {"optimizer_bytes": None}
        )
    return rows


def _write_snapshot(path: Path) -> str:
    """The allocator's segments and its history as JSON: nothing has to be unpickled to read it.

    Returns why there is none, or nothing.
    """
    try:
        snapshot = torch.cuda.memory._snapshot()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        json.dump(snapshot, file, default=str)
    return ""
