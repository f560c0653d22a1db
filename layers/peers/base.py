"""What the adapters share."""

from typing import Any, ClassVar

from torch import Tensor

from ..contract import SequenceLayer
from . import require


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
