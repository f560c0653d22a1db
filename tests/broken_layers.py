"""Layers that fail in every way a layer can, for the sweep to tell about."""

import os
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fwpkm_bench.layers.contract import Cost, SequenceLayer


@dataclass(frozen=True)
class Settings:
    width: int = 8


class NoState:
    def nbytes(self) -> int:
        return 0

    def detach(self) -> "NoState":
        return self


class Fine(SequenceLayer):
    """Returns its input."""

    Settings = Settings
    sizes: ClassVar = {"laptop": Settings()}
    backends = ("reference", "eager")
    memory_core = None

    def __init__(self, settings: Settings, *, backend: str) -> None:
        super().__init__(settings, backend)

    def forward(self, x: Tensor, state: NoState | None = None) -> tuple[Tensor, NoState]:
        return x.clone(), NoState()

    def cost(self, batch: int, seq: int) -> Cost:
        return Cost(flops=1, bytes=1)


class Raises(Fine):
    def forward(self, x, state=None):
        raise RuntimeError("the layer broke\nand said more")


class Segfaults(Fine):
    def forward(self, x, state=None):
        os.kill(os.getpid(), signal.SIGSEGV)


class Exits(Fine):
    def forward(self, x, state=None):
        os._exit(7)


class Greedy(Fine):
    """Wants more memory than any machine has, from 64 tokens on."""

    def forward(self, x, state=None):
        return (x if x.shape[1] < 64 else torch.empty(2**46)), NoState()


class Sleeps(Fine):
    def forward(self, x, state=None):
        time.sleep(60)


class Diverges(Fine):
    def forward(self, x, state=None):
        return x / 0 - x / 0, NoState()


class ReferenceOnly(Fine):
    backends = ("reference",)


class SlowThenGreedy(Greedy):
    """Too slow to be measured twice, and then too large."""

    def forward(self, x, state=None):
        time.sleep(0.05)
        return super().forward(x, state)


class ShyOfProfilers(Fine):
    """Runs out of memory where torch's profiler looks on."""

    def forward(self, x, state=None):
        if torch._C._autograd._profiler_enabled():
            raise torch.OutOfMemoryError("no memory left for being looked at")
        return super().forward(x, state)
