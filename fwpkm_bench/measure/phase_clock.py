"""How long each phase of a call takes: ranges that layers name, on the clock of the device.

Times are exclusive: a range inside another interrupts it, and what no range covers is ``other``, so that
the phases of a call add up to it.
"""

import bisect
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fwpkm_bench.kernels.phases import listening

OTHER = "other"
BACKWARD = "backward"
PROJECTIONS = "projections"
PROJECTING = (nn.Linear, nn.RMSNorm, nn.LayerNorm)  # modules whose calls are ``projections`` in any layer


class PhaseClock:
    """Listens to the ranges of one call after another; `run` makes one.

    On a CPU it reads the system's finest clock where a phase begins; on a GPU it records an event there, and
    an NVTX range for other tools. ``labels``: torch's profiler is to see the ranges too.

    What autograd does in a backward pass is told apart by when its nodes were made: a node of the forward
    pass's ``projections`` works for ``backward: projections``. Ranges that a backward pass names itself are
    ``backward: name``.
    """

    def __init__(self, device: str, *, labels: bool = False) -> None:
        self._cuda = device == "cuda"
        self._labels = labels
        self._clear()

    def _clear(self) -> None:
        self._marks: list[tuple[Any, str]] = []  # when each phase began
        self._made: list[tuple[int, str]] = []  # autograd's counter then
        self._entered: dict[str, int] = defaultdict(int)
        self._stack: list[str] = []
        self._open: list[Any] = []
        self._base = OTHER
        self._backward = False
        self._finished: Any = None

    @property
    def current(self) -> str:
        """The phase that is running."""
        return self._stack[-1] if self._stack else self._base

    def run(self, layer: nn.Module, call: Callable[[], Any]) -> Any:
        """``call()``, listened to; ``layer`` is the one that it calls."""
        self._clear()
        with self._attached(layer), listening(self):
            self._mark()
            result = call()
            self._finished = self._stamp()
        return result

    def milliseconds(self) -> dict[str, float]:
        """What the last call spent in each phase, in the order in which they first began."""
        stamps = [stamp for stamp, _ in self._marks] + [self._finished]
        if self._cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = defaultdict(float)
        for (begin, name), end in zip(self._marks, stamps[1:], strict=True):
            spent[name] += begin.elapsed_time(end) if self._cuda else (end - begin) / 1e6
        return dict(spent)

    def spans(self) -> list[tuple[Any, str]]:
        """When each phase of the last call began: nanoseconds of `time.perf_counter_ns`, events on a GPU."""
        return list(self._marks)

    def entered(self) -> dict[str, int]:
        """How often the last call entered each phase."""
        return dict(self._entered)

    def push(self, name: str) -> None:
        """A range begins."""
        name = f"{BACKWARD}: {name}" if self._backward else name
        self._stack.append(name)
        self._entered[name] += 1
        if self._cuda:
            torch.cuda.nvtx.range_push(name)
        if self._labels:
            label = torch.profiler.record_function(name)
            label.__enter__()
            self._open.append(label)
        self._mark()

    def pop(self) -> None:
        """The innermost range ends."""
        self._stack.pop()
        if self._cuda:
            torch.cuda.nvtx.range_pop()
        if self._labels:
            self._open.pop().__exit__(None, None, None)
        self._mark()

    def _mark(self) -> None:
        self._marks.append((self._stamp(), self.current))
        if not self._backward:
            self._made.append((torch.autograd._get_sequence_nr(), self.current))

    def _stamp(self) -> Any:
        if not self._cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def _attached(self, layer: nn.Module) -> Iterator[None]:
        """Hooks on the projections of ``layer``, and one that looks for the backward pass to come."""

        def begin(_module: nn.Module, _arguments: Any) -> None:
            self.push(PROJECTIONS)

        def end(_module: nn.Module, _arguments: Any, _result: Any) -> None:
            self.pop()

        handles = [layer.register_forward_hook(self._after_forward)]
        for module in layer.modules():
            if isinstance(module, PROJECTING):
                handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after_forward(self, _layer: nn.Module, _arguments: Any, result: Any) -> None:
        y = result[0] if isinstance(result, tuple) else result
        if not isinstance(y, torch.Tensor) or y.grad_fn is None:
            return
        starts = [number for number, _ in self._made]
        for node in _nodes(y.grad_fn):
            name = self._made[max(0, bisect.bisect_right(starts, node._sequence_nr()) - 1)][1]
            phase = BACKWARD if name == OTHER else f"{BACKWARD}: {name}"
            node.register_prehook(lambda _grads, phase=phase: self._go_back_to(phase))
        self._backward = True
        self._go_back_to(BACKWARD)

    def _go_back_to(self, phase: str) -> None:
        if phase != self._base:
            self._base = phase
            self._entered[phase] += 1
            if not self._stack:
                self._mark()


def _nodes(root: Any) -> Iterator[Any]:
    """The nodes of the graph behind ``root``, without those that only add up gradients of leaves."""
    seen, left = {root}, [root]
    while left:
        node = left.pop()
        yield node
        for after, _ in node.next_functions:
            if after is not None and after not in seen and type(after).__name__ != "AccumulateGrad":
                seen.add(after)
                left.append(after)
