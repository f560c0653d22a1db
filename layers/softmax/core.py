"""The key-value cache, the backends, and the cache alone as a memory for the recall workload.

Shapes: B sequences, T tokens, Q queries, G key heads, Dk key and Dv value features a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..contract import detached, tensor_bytes
from . import eager, fused, reference

IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "reference": reference.softmax_attention,
    "eager": eager.softmax_attention,
    **fused.IMPLEMENTATIONS,
}
SCORES = 2**23  # scores held at a time by a read of the memory core: 32 MiB in float32


@dataclass
class State:
    """The keys and values of all ``length`` tokens so far, in buffers ``[B, G, room, Dk or Dv]``.

    Where no gradient is wanted, tokens are written into the room that is left. ``filled`` is shared by all
    states on the same buffers and says how much is taken, so that a second branch gets its own copy.
    """

    key_buffer: Tensor
    value_buffer: Tensor
    length: int
    filled: list[int] = field(default_factory=lambda: [0])

    @property
    def keys(self) -> Tensor:
        """The keys so far, ``[B, G, length, Dk]``."""
        return self.key_buffer[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """The values so far, ``[B, G, length, Dv]``."""
        return self.value_buffer[:, :, : self.length]

    def nbytes(self) -> int:
        """The bytes of the keys and values so far, without the room behind them."""
        return tensor_bytes(self.keys, self.values)

    def detach(self) -> "State":
        """The same state, cut off from the graph that computed it."""
        return detached(self)

    def tensors(self) -> dict[str, Tensor]:
        """The keys and values so far."""
        return {"keys": self.keys, "values": self.values}

    def append(self, keys: Tensor, values: Tensor) -> "State":
        """The state with ``keys [B, G, T, Dk]`` and ``values [B, G, T, Dv]`` behind those it has."""
        room_is_free = self.filled[0] == self.length
        total = self.length + keys.shape[2]
        buffers = [
            _append(buffer, self.length, new, room_is_free)
            for buffer, new in ((self.key_buffer, keys), (self.value_buffer, values))
        ]
        filled = self.filled if buffers[0] is self.key_buffer else [total]
        filled[0] = total
        return State(buffers[0], buffers[1], total, filled)


def _append(buffer: Tensor, length: int, new: Tensor, room_is_free: bool) -> Tensor:
    """``buffer`` with ``new`` written at ``length``, in place if nobody else needs what is there."""
    used, total = buffer[:, :, :length], length + new.shape[2]
    if torch.is_grad_enabled():
        return torch.cat((used, new), dim=2)
    reusable = not buffer.requires_grad and buffer.is_inference() == torch.is_inference_mode_enabled()
    if total > buffer.shape[2] or not reusable or not room_is_free:
        # A quarter more room each time: copies stay rare, and little of a long cache lies idle.
        room = max(total, length + length // 4)
        buffer = new.new_empty((*new.shape[:2], room, new.shape[3]))
        buffer[:, :, :length] = used
    buffer[:, :, length:total] = new
    return buffer


class Core:
    """A memory that keeps every pair: ``read = softmax(q K^T / sqrt(Dk)) V`` over all of them, one head.

    States are made in float32 on ``device``.
    """

    def __init__(self, *, key_dim: int, value_dim: int, backend: str, device: torch.device | None) -> None:
        if backend not in IMPLEMENTATIONS:
            raise ValueError(f"backend is {backend!r}; softmax has {', '.join(IMPLEMENTATIONS)}")
        self.key_dim = key_dim
        self.value_dim = value_dim
        self.backend = backend
        self.device = device

    def init_state(self) -> State:
        """An empty memory."""
        keys = torch.empty(1, 1, 0, self.key_dim, device=self.device)
        return State(keys, torch.empty(1, 1, 0, self.value_dim, device=self.device), 0)

    def write(self, state: State, keys: Tensor, values: Tensor) -> State:
        """Append the pairs ``keys [T, Dk]``, ``values [T, Dv]``."""
        return state.append(keys[None, None], values[None, None])

    def read(self, state: State, queries: Tensor) -> Tensor:
        """Answer ``queries [Q, Dk]`` with ``[Q, Dv]``; an empty memory answers 0.

        The reference weighs all queries at once, the others as many as bound the scores to `SCORES`.
        """
        keys, values = state.keys[0, 0], state.values[0, 0]
        block = queries.shape[0] if self.backend == "reference" else max(1, SCORES // max(1, state.length))
        scaled = queries * self.key_dim**-0.5
        return torch.cat([(part @ keys.mT).softmax(-1) @ values for part in scaled.split(max(1, block))])

    def slot_writes(self, state: State) -> None:
        """None: every pair has its own place, and none is written twice."""
