"""The gated delta rule's state, its backends, and its memory alone for the recall workload.

Shapes: B sequences, T pairs, Q queries, H heads, Dk key and Dv value features a head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import detached, tensor_bytes
from . import eager, fla, reference

IMPLEMENTATIONS = {
    "reference": reference.gated_delta_rule,
    "eager": eager.gated_delta_rule,
    "fla": fla.gated_delta_rule,
}


@dataclass
class State:
    """What the tokens so far have written: ``memory [B, H, Dk, Dv]``, float32 at least."""

    memory: Tensor

    def nbytes(self) -> int:
        """The bytes of the memory; they do not grow with the sequence."""
        return tensor_bytes(self.memory)

    def tensors(self) -> dict[str, Tensor]:
        """The memory."""
        return {"memory": self.memory}

    def detach(self) -> "State":
        """The same state, cut off from the graph that computed it."""
        return detached(self)


class Core:
    """The delta rule without gates (beta 1, no decay) over L2-normalised keys, one head.

    A pair that was just written is recalled exactly; each later one disturbs it by as much as their
    keys overlap. States are made in float32 on ``device``.
    """

    def __init__(self, *, key_dim: int, value_dim: int, backend: str, device: torch.device | None) -> None:
        if backend not in IMPLEMENTATIONS:
            raise ValueError(f"backend is {backend!r}; gdn has {', '.join(IMPLEMENTATIONS)}")
        self.shape = (1, 1, key_dim, value_dim)
        self.backend = backend
        self.device = device

    def init_state(self) -> State:
        """An empty memory."""
        return State(torch.zeros(self.shape, device=self.device))

    def write(self, state: State, keys: Tensor, values: Tensor) -> State:
        """Write the pairs ``keys [T, Dk]``, ``values [T, Dv]`` in order."""
        if keys.shape[0] == 0:
            return state
        keys = F.normalize(keys, dim=-1)[None, :, None]  # [1, T, 1, Dk]
        strength = keys.new_ones(keys.shape[:3])
        pairs = (keys, keys, values[None, :, None], strength, torch.zeros_like(strength))
        return State(IMPLEMENTATIONS[self.backend](*pairs, state.memory)[1])

    def read(self, state: State, queries: Tensor) -> Tensor:
        """Answer ``queries [Q, Dk]`` with ``[Q, Dv]``."""
        return F.normalize(queries, dim=-1) @ state.memory[0, 0]

    def slot_writes(self, state: State) -> None:
        """None: this memory is one matrix, without slots."""
