"""The Triton kernels of flash-linear-attention (package ``fla-core``) between the projections of our layers.

They are the backend ``fla`` of ``gdn`` and ``linear``, under a name of their own. Shapes: B sequences,
T tokens, D model width.
"""

from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from ..contract import Cost, SequenceLayer
from ..gdn import GatedDeltaNet
from ..linear import LinearAttention
from .base import PeerLayer


class CudaPeer(PeerLayer):
    """A layer of ours, whose memory is computed by one of fla's kernels."""

    kind: ClassVar[type[SequenceLayer]]

    def __init__(self, settings: Any, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        self.ours = self.kind(settings, backend="fla")

    def init_state(self, batch_size: int) -> Any:
        """An empty memory for ``batch_size`` sequences."""
        return self.ours.init_state(batch_size)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with."""
        y, state = self.ours(x, state)
        return y, state

    def cost(self, batch: int, seq: int) -> Cost:
        """That of our layer, whose projections these are."""
        return self.ours.cost(batch, seq)


class FlaGatedDeltaNet(CudaPeer):
    """``fla.ops.gated_delta_rule``, the same rule as ``gdn``."""

    Settings: TypeAlias = GatedDeltaNet.Settings
    sizes: ClassVar = GatedDeltaNet.sizes
    peer = "peer:fla-gdn"
    kind = GatedDeltaNet


class FlaLinearAttention(CudaPeer):
    """``fla.ops.linear_attn.chunk_linear_attn`` with its normaliser, the same sums as ``linear``."""

    Settings: TypeAlias = LinearAttention.Settings
    sizes: ClassVar = LinearAttention.sizes
    peer = "peer:fla-linear"
    kind = LinearAttention
