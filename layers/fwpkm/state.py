"""What a memory carries from call to call: what every state can do, and the dense one of the reference."""

from typing import Protocol, Self

import torch
from torch import Tensor

from ..contract import tensor_bytes
from . import reference
from .settings import MemorySettings


class FwPKMState(Protocol):
    """A memory between two calls. A call uses up the state that it is given; `clone` keeps one."""

    settings: MemorySettings
    spent: bool
    batch: int
    pending_tokens: int  # read, but not written: their chunk is not full

    def reserve(self, tokens: int) -> None:
        """Make room at once for what ``tokens`` more tokens a sequence can touch."""
        ...

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Keys ``[S, H, 2, n, h]`` and values ``[S, n*n, value_dim]`` as they stand, pending not written."""
        ...

    def flush(self) -> Self:
        """Write what is pending as a shorter chunk; the state is used up and its successor returned."""
        ...

    def nbytes(self) -> int:
        """Bytes that must be carried: keys, touched rows with their slots, pending tokens."""
        ...

    def clone(self) -> Self:
        """A copy to come back to."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds but for the initial table, by name."""
        ...

    def detach(self) -> Self:
        """The same state, cut off from the graph that computed it; this one is used up."""
        ...


class ReferenceState:
    """One dense `reference.Memory` for each of S memories."""

    def __init__(self, memories: list[reference.Memory], settings: MemorySettings) -> None:
        self.memories = memories
        self.settings = settings
        self.spent = False
        self.batch = sum(len(memory.query) for memory in memories)
        self.pending_tokens = memories[0].target.shape[1]
        self.key_shape = memories[0].keys.shape
        self.value_shape = memories[0].values.shape

    def tensors(self) -> dict[str, Tensor]:
        names = ("keys", "values", "query", "gate", "target")
        return {name: torch.stack([getattr(m, name) for m in self.memories]) for name in names}

    def reserve(self, tokens: int) -> None:
        """Nothing: the tables are whole."""

    def materialize(self) -> tuple[Tensor, Tensor]:
        return (
            torch.stack([memory.keys for memory in self.memories]),
            torch.stack([memory.values for memory in self.memories]),
        )

    def flush(self) -> Self:
        check_unspent(self)
        memories = [
            reference.write(memory, self.settings, None)[0] if memory.target.shape[1] else memory
            for memory in self.memories
        ]
        self.spent = True
        return type(self)(memories, self.settings)

    def nbytes(self) -> int:
        return sum(tensor_bytes(m.keys, m.values, m.query, m.gate, m.target) for m in self.memories)

    def clone(self) -> Self:
        check_unspent(self)
        return type(self)(list(self.memories), self.settings)

    def detach(self) -> Self:
        def cut(m: reference.Memory) -> reference.Memory:
            parts = (m.keys, m.values, m.query, m.gate, m.target)
            return reference.Memory(*(part.detach() for part in parts))

        check_unspent(self)
        self.spent = True
        return type(self)([cut(memory) for memory in self.memories], self.settings)


def check_unspent(state: FwPKMState) -> None:
    """Refuse a state that an earlier call has advanced."""
    if state.spent:
        raise ValueError(
            "state was used up by an earlier call; pass the state that call returned, "
            "or keep a state.clone() to come back to"
        )
