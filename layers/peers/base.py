"""What the adapters share."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..contract import SequenceLayer, require_positive
from . import require


@dataclass(frozen=True, kw_only=True)
class FwPKMSizes:
    """What ``fwpkm`` and its peers have in common."""

    width: int = 512
    key_dim: int = 512
    value_dim: int = 512
    n_subkeys: int = 512
    topk: int = 8
    chunk_size: int = 512
    learning_rate: float = 1.0
    addressing_weight: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "width", "key_dim", "value_dim", "n_subkeys", "topk", "chunk_size")
        if self.key_dim % 2:
            raise ValueError(f"key_dim must be even (it is split into two halves), got {self.key_dim}")
        if self.topk > self.n_subkeys:
            raise ValueError(f"topk must be at most n_subkeys ({self.n_subkeys}), got {self.topk}")


class PeerLayer(SequenceLayer):
    """Somebody else's implementation behind the contract: one backend, and no memory core of its own.

    Its cost is that of the layer of ours that it is held against, so that both have the same work to do.
    """

    backends = ("theirs",)
    memory_core = None  # type: ignore[assignment]  # not offered: recall is ours to define
    peer: ClassVar[str]  # its name in PEERS

    def __init__(self, settings: Any, backend: str) -> None:
        super().__init__(settings, backend)
        require(self.peer)

    def state_from(self, tensors: dict[str, Tensor]) -> Any:
        """Refused: what they carry is theirs to define, and lives as long as the process."""
        raise NotImplementedError(f"a state of {self.peer} cannot be loaded")


def check_batch(sequences: int, batch: int) -> None:
    """Refuse a state of another number of sequences than x has."""
    if sequences != batch:
        raise ValueError(f"state is of {sequences} sequences, x of {batch}; give one a row")
