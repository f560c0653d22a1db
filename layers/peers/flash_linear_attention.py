"""The Triton kernels of flash-linear-attention (package ``fla-core``) between the projections of our layers.

They run on CUDA alone. Shapes: B sequences, T tokens, D model width, H heads, Dk key and Dv value features
a head.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Cost, tensor_bytes
from ..gdn import GatedDeltaNet
from ..gdn import State as GDNState
from ..linear import LinearAttention, feature_map
from .base import PeerLayer, check_batch


class CudaPeer(PeerLayer):
    """A layer of ours, ``self.ours``, whose memory is computed by one of fla's kernels."""

    ours: Any

    def check(self, x: Tensor) -> None:
        """Refuse a bad shape, and a device that their kernels do not run on."""
        self.check_input(x)
        if not x.is_cuda:
            raise NotImplementedError(f"{self.peer} runs on cuda alone; this is {x.device.type}")

    def cost(self, batch: int, seq: int) -> Cost:
        """That of our layer, whose projections these are."""
        return self.ours.cost(batch, seq)


class FlaGatedDeltaNet(CudaPeer):
    """``fla.ops.gated_delta_rule.chunk_gated_delta_rule``, the same rule as ``gdn``."""

    Settings: TypeAlias = GatedDeltaNet.Settings
    sizes: ClassVar = GatedDeltaNet.sizes
    peer = "peer:fla-gdn"

    def __init__(self, settings: Any, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        self.ours = GatedDeltaNet(settings)

    def init_state(self, batch_size: int) -> GDNState:
        """An empty memory for ``batch_size`` sequences."""
        return self.ours.init_state(batch_size)

    def forward(self, x: Tensor, state: GDNState | None = None) -> tuple[Tensor, GDNState]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with."""
        self.check(x)
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        if state is not None:
            check_batch(len(state.memory), len(x))
        ours, split = self.ours, (self.settings.heads, -1)
        output, memory = chunk_gated_delta_rule(
            F.normalize(F.silu(ours.query(x).unflatten(-1, split)), dim=-1),
            F.normalize(F.silu(ours.key(x).unflatten(-1, split)), dim=-1),
            ours.value(x).unflatten(-1, split),
            g=-ours.log_decay_rate.exp() * F.softplus(ours.decay(x) + ours.decay_bias),
            beta=torch.sigmoid(ours.beta(x)),
            initial_state=None if state is None else state.memory,
            output_final_state=True,
        )
        gated = ours.norm(output) * F.silu(ours.gate(x).unflatten(-1, split))
        return ours.out(gated.flatten(-2)), GDNState(memory)


@dataclass
class FlaLinearState:
    """What their kernel hands back: S, and with it, as of fla-core 0.6, the sum of the keys."""

    final: Any
    batch_size: int

    def tensors(self) -> dict[str, Tensor]:
        """Its parts."""
        parts = self.final if isinstance(self.final, tuple) else (self.final,)
        return dict(zip(("memory", "normaliser"), parts, strict=False))

    def nbytes(self) -> int:
        """The bytes of its parts."""
        return tensor_bytes(*self.tensors().values())

    def detach(self) -> "FlaLinearState":
        """The same state, cut off from the graph that computed it."""
        parts = tuple(part.detach() for part in self.tensors().values())
        return FlaLinearState(parts if isinstance(self.final, tuple) else parts[0], self.batch_size)


class FlaLinearAttention(CudaPeer):
    """``fla.ops.linear_attn.chunk_linear_attn`` with its normaliser, the same sums as ``linear``."""

    Settings: TypeAlias = LinearAttention.Settings
    sizes: ClassVar = LinearAttention.sizes
    peer = "peer:fla-linear"

    def __init__(self, settings: Any, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        self.ours = LinearAttention(settings)

    def init_state(self, batch_size: int) -> FlaLinearState:
        """An empty memory for ``batch_size`` sequences."""
        empty = self.ours.init_state(batch_size)
        return FlaLinearState((empty.memory, empty.normaliser.unsqueeze(1)), batch_size)

    def forward(self, x: Tensor, state: FlaLinearState | None = None) -> tuple[Tensor, FlaLinearState]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            NotImplementedError: ``state`` came from an older fla-core, which hands back no sum of the keys.
        """
        self.check(x)
        from fla.ops.linear_attn import chunk_linear_attn

        if state is not None:
            check_batch(state.batch_size, len(x))
            if not isinstance(state.final, tuple):
                raise NotImplementedError(
                    f"{self.peer} goes on only with an fla-core that returns the sum of the keys, as 0.6 does"
                )
        ours, split = self.ours, (self.settings.heads, -1)
        output, final = chunk_linear_attn(
            feature_map(ours.query(x).unflatten(-1, split)),
            feature_map(ours.key(x).unflatten(-1, split)),
            ours.value(x).unflatten(-1, split),
            initial_state=None if state is None else state.final,
            output_final_state=True,
            normalize=True,
        )
        return ours.out(output.flatten(-2)), FlaLinearState(final, len(x))
