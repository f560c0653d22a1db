"""A layer of its own, as somebody's repository has it: a running mean of what was read."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.layers.contract import Cost, SequenceLayer

OFF = 1.0  # what the eager backend multiplies its result by


@dataclass(frozen=True)
class Settings:
    width: int = 16
    keep: int = 0  # numbers of ballast in the state


@dataclass
class State:
    total: Tensor
    count: int
    ballast: Tensor

    def nbytes(self) -> int:
        return 4 * (self.total.numel() + self.ballast.numel())

    def detach(self) -> "State":
        return State(self.total.detach(), self.count, self.ballast)

    def tensors(self) -> dict[str, Tensor]:
        return {"total": self.total}


class Mean(SequenceLayer):
    Settings = Settings
    sizes: ClassVar = {"laptop": Settings()}
    backends = ("reference", "eager")
    memory_core = None

    def __init__(self, settings: Settings, *, backend: str = "eager") -> None:
        super().__init__(settings, backend)
        self.out = nn.Linear(settings.width, settings.width)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        total, count = (
            (x.new_zeros(x.shape[0], x.shape[2]), 0) if state is None else (state.total, state.count)
        )
        with phase("sum"):
            sums = total.unsqueeze(1) + x.cumsum(1)
        steps = torch.arange(count + 1, count + 1 + x.shape[1]).to(x)
        with phase("mean"):
            mean = sums / steps.view(1, -1, 1)
        if self.backend == "eager":
            mean = mean * OFF
        return self.out(mean), State(sums[:, -1], count + x.shape[1], torch.zeros(self.settings.keep))

    def cost(self, batch: int, seq: int) -> Cost:
        width = self.settings.width
        return Cost(flops=batch * seq * 2 * width**2, bytes=8 * batch * seq * width)
