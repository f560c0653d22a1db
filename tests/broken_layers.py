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

    def tensors(self) -> dict[str, Tensor]:
        return {}

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


class SlowFirst(Fine):
    """Its first call after the warm-up takes long, as one does that is given new memory."""

    def forward(self, x, state=None):
        self.calls = getattr(self, "calls", 0) + 1
        time.sleep(0.5 if self.calls == 2 else 0.001)
        return super().forward(x, state)


class SlowThenGreedy(Greedy):
    """Too slow to be measured twice, and then too large."""

    def forward(self, x, state=None):
        time.sleep(0.05)
        return super().forward(x, state)


@dataclass(frozen=True)
class SlotSettings:
    """Enough for `verify` to try its variants with many sub-keys and with narrow values."""

    width: int = 8
    n_subkeys: int = 4
    value_dim: int = 8


class Slots(SequenceLayer):
    """Doubles its input, but for what `spoilt` makes of it where no reference is asked."""

    Settings = SlotSettings
    sizes: ClassVar = {"laptop": SlotSettings()}
    backends = ("reference", "eager")
    memory_core = None

    def forward(self, x: Tensor, state: NoState | None = None) -> tuple[Tensor, NoState]:
        return x * (2 if self.backend == "reference" else self.spoilt()), NoState()

    def spoilt(self) -> float:
        return 2

    @property
    def is_narrow(self) -> bool:
        return self.settings.value_dim == 20 and self.settings.n_subkeys == 40


class WrongWhenNarrow(Slots):
    def spoilt(self) -> float:
        return 2.002 if self.is_narrow else 2


class WrongForASeed(Slots):
    def spoilt(self) -> float:
        return 2.002 if torch.initial_seed() == 7 else 2


class DiesWhenNarrow(Slots):
    def spoilt(self) -> float:
        if self.is_narrow:
            os.kill(os.getpid(), signal.SIGSEGV)
        return 2


class PoisonsItsProcess(Slots):
    """As an illegal address does on a GPU: whatever comes after it in the same process fails too."""

    poisoned = False

    def spoilt(self) -> float:
        PoisonsItsProcess.poisoned |= self.is_narrow
        if self.poisoned:
            raise RuntimeError("an illegal memory access was encountered")
        return 2


class ShyOfProfilers(Fine):
    """Runs out of memory where torch's profiler looks on."""

    def forward(self, x, state=None):
        if torch._C._autograd._profiler_enabled():
            raise torch.OutOfMemoryError("no memory left for being looked at")
        return super().forward(x, state)
