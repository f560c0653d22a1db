"""Linear attention's state, its backends, and its memory alone for the recall workload.

Shapes: B sequences, T pairs, Q queries, H heads, Dk key and Dv value features a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import detached, tensor_bytes
from . import eager, fla, reference

IMPLEMENTATIONS = {
    "reference": reference.linear_attention,
    "eager": eager.linear_attention,
    "fla": fla.linear_attention,
}


def feature_map(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive everywhere (arXiv 2006.16236, eq. 7)."""
    return F.elu(x) + 1


@dataclass
class LinearState:
    """What the tokens so far have written: ``memory [B, H, Dk, Dv]``, the sum of their keys times values,
    and ``normaliser [B, H, Dk]``, the sum of their keys; both float32 at least."""

    memory: Tensor
    normaliser: Tensor

    def nbytes(self) -> int:
        """The bytes of both sums; they do not grow with the sequence."""
        return tensor_bytes(self.memory, self.normaliser)

    def tensors(self) -> dict[str, Tensor]:
        """Both sums."""
        return {"memory": self.memory, "normaliser": self.normaliser}

    def detach(self) -> "LinearState":
        """The same state, cut off from the graph that computed it."""
        return detached(self)


class Core:
    """Linear attention over mapped keys, one head: every pair is added, every read is a weighted mean.

    Nothing is read while writing, so both backends write with one product. States are made in float32
    on ``device``.
    """

    def __init__(self, *, key_dim: int, value_dim: int, backend: str, device: torch.device | None) -> None:
        if backend not in IMPLEMENTATIONS:
            raise ValueError(f"backend is {backend!r}; linear has {', '.join(IMPLEMENTATIONS)}")
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.device = device

    def init_state(self) -> LinearState:
        """An empty memory."""
        memory = torch.zeros(1, 1, self.key_dim, self.value_dim, device=self.device)
        return LinearState(memory, torch.zeros(1, 1, self.key_dim, device=self.device))

    def write(self, state: LinearState, keys: Tensor, values: Tensor) -> LinearState:
        """Write the pairs ``keys [T, Dk]``, ``values [T, Dv]``; their order does not matter."""
        keys = feature_map(keys)
        return LinearState(state.memory + keys.mT @ values, state.normaliser + keys.sum(0))

    def read(self, state: LinearState, queries: Tensor) -> Tensor:
        """Answer ``queries [Q, Dk]`` with ``[Q, Dv]``; an empty memory answers 0."""
        queries = feature_map(queries)
        weight = (queries @ state.normaliser[0, 0]).clamp_min(torch.finfo(queries.dtype).tiny)
        return (queries @ state.memory[0, 0]) / weight.unsqueeze(-1)

    def slot_writes(self, state: LinearState) -> None:
        """None: this memory is one matrix, without slots."""
