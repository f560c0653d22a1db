"""Phil Wang's packages ``fast-weight-product-key-memory`` and ``product-key-memory``.

Shapes: B sequences, T tokens, D model width, n sub-keys per half.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..contract import Cost, require_positive, tensor_bytes
from ..fwpkm import FwPKM
from ..pkm import ProductKeyMemory
from ..pkm import State as PKMState
from .base import FwPKMSizes, PeerLayer, check_batch


@dataclass(frozen=True, kw_only=True)
class FwPKMSettings(FwPKMSizes):
    """Sizes as those of ``fwpkm``, at one head, and two habits of theirs that are off for the comparison.

    Attributes:
        key_loss_weight: how much the keys learn from the loss of the values; theirs is 1, the paper's 0.
        boundary_embed: ask with a learned embedding in place of the last token of each chunk; theirs is on.
    """

    key_loss_weight: float = 0.0
    boundary_embed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.addressing_weight > 0:
            raise ValueError(f"addressing_weight must be above 0, got {self.addressing_weight}")


@dataclass
class FwPKMState:
    """Their ``Memories``: a dense table of changes a sequence, and the tokens that are not yet written."""

    memories: Any

    def tensors(self) -> dict[str, Tensor]:
        """What they carry, by name; the last token is a view of the cached ones."""
        found = self.memories._asdict().items()
        return {name: part for name, part in found if isinstance(part, Tensor)}

    def nbytes(self) -> int:
        """The bytes of all that they carry."""
        return tensor_bytes(*self.tensors().values())

    def detach(self) -> "FwPKMState":
        """The same state, cut off from the graph that computed it."""
        return FwPKMState(
            self.memories._replace(**{name: part.detach() for name, part in self.tensors().items()})
        )


class LucidrainsFwPKM(PeerLayer):
    """``fwPKM`` of fast-weight-product-key-memory.

    It differs from ``fwpkm``: a chunk's last query learns the value of the chunk's first token, not of the
    next one; the values take ``w e / N`` (our ``write_rule="paper"``); the target is normalised by the
    biased standard deviation; the gate is one output; the initial tables have other scales. A chunk is
    written when the next token arrives.
    """

    Settings: TypeAlias = FwPKMSettings
    sizes: ClassVar = {
        "laptop": FwPKMSettings(width=256, key_dim=256, value_dim=256),
        "paper": FwPKMSettings(),
    }
    peer = "peer:lucidrains-fwpkm"

    def __init__(self, settings: FwPKMSettings, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        from fast_weight_product_key_memory import fwPKM

        self.memory = fwPKM(
            settings.width,
            heads=1,
            chunk_size=settings.chunk_size,
            num_memories=settings.n_subkeys**2,
            dim_queries_keys=settings.key_dim // 2,  # theirs counts one half
            dim_values=settings.value_dim,
            learning_rate=settings.learning_rate,
            topk=settings.topk,
            addressing_loss_weight=settings.addressing_weight,
            mse_loss_weight_to_keys=settings.key_loss_weight,
            use_boundary_embed=settings.boundary_embed,
        )

    def init_state(self, batch_size: int) -> FwPKMState:
        """No changes yet for ``batch_size`` sequences."""
        return FwPKMState(self.memory.init_memories(batch_size))

    def forward(self, x: Tensor, state: FwPKMState | None = None) -> tuple[Tensor, FwPKMState]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            NotImplementedError: ``x`` is not float32, the only type that they write.
        """
        self.check_input(x)
        if x.dtype != torch.float32:
            raise NotImplementedError(f"{self.peer} runs in float32 alone, not in {x.dtype}")
        if state is not None:
            check_batch(len(state.memories.memory_values), len(x))
        past = None if state is None else state.memories
        y, memories = self.memory(x, past_memories=past, return_next_memories=True)
        return y, FwPKMState(memories)

    def cost(self, batch: int, seq: int) -> Cost:
        """What ``fwpkm`` of these sizes must do."""
        s = self.settings
        with torch.device("meta"):
            ours = FwPKM(
                FwPKM.Settings(
                    width=s.width,
                    key_dim=s.key_dim,
                    value_dim=s.value_dim,
                    n_subkeys=s.n_subkeys,
                    topk=s.topk,
                    chunk_size=s.chunk_size,
                )
            )
        return ours.cost(batch, seq)


@dataclass(frozen=True)
class PKMSettings:
    """Sizes as those of ``pkm``; their values are as wide as the model, with no projection behind them."""

    width: int = 256
    heads: int = 4
    n_subkeys: int = 512
    topk: int = 32
    key_dim: int = 128

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "n_subkeys", "topk", "key_dim")
        if self.topk > self.n_subkeys:
            raise ValueError(f"topk must be at most n_subkeys, got {self.topk} and {self.n_subkeys}")
        if self.key_dim % 2:
            raise ValueError(f"key_dim must be even, two halves, got {self.key_dim}")


class LucidrainsPKM(PeerLayer):
    """``PKM`` of product-key-memory.

    It differs from ``pkm``: each half of a query is layer-normalised, where ours takes one root mean square
    over both; the read is the output, without Meta's gate and projection.
    """

    Settings: TypeAlias = PKMSettings
    sizes: ClassVar = {"laptop": PKMSettings(), "paper": PKMSettings(width=512, key_dim=512)}
    peer = "peer:lucidrains-pkm"

    def __init__(self, settings: PKMSettings, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        from product_key_memory import PKM

        self.memory = PKM(
            settings.width,
            heads=settings.heads,
            num_keys=settings.n_subkeys,
            topk=settings.topk,
            dim_head=settings.key_dim // 2,  # theirs counts one half
        )

    def init_state(self, batch_size: int) -> PKMState:
        """A state of no bytes: each token is read alone."""
        return PKMState(batch_size)

    def forward(self, x: Tensor, state: PKMState | None = None) -> tuple[Tensor, PKMState]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with."""
        self.check_input(x)
        state = self.init_state(len(x)) if state is None else state
        check_batch(state.batch_size, len(x))
        return self.memory(x), state

    def cost(self, batch: int, seq: int) -> Cost:
        """What ``pkm`` of these sizes must do, though it has two more projections."""
        s = self.settings
        with torch.device("meta"):
            ours = ProductKeyMemory(
                ProductKeyMemory.Settings(
                    width=s.width,
                    heads=s.heads,
                    n_subkeys=s.n_subkeys,
                    topk=s.topk,
                    key_dim=s.key_dim,
                    value_dim=s.width,
                )
            )
        return ours.cost(batch, seq)
