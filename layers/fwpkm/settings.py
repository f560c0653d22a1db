"""The settings of the memory, and of the layer around it."""

import math
from dataclasses import dataclass

from ..contract import require_positive

SCORES = ("idw", "dot")
WRITE_RULES = ("paper", "authors", "projected")
BOUNDARIES = ("carry", "drop")
SCOPES = ("per_sequence", "shared")


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """How the memory is addressed and written; the defaults are the paper's (arXiv 2601.00671).

    Attributes:
        topk: slots read per head and token.
        chunk_size: tokens between two writes.
        lookahead: the query of token t learns the target of token t + lookahead.
        score: ``"idw"`` (inverse-distance weighting) or ``"dot"``.
        learning_rate: step of both writes.
        addressing_weight: weight of the addressing loss; 0 leaves the keys as they are.
        write_rule: ``"paper"`` (eq. 13-15), ``"authors"`` (their code) or ``"projected"`` (one write
            makes the next read exact).
        boundary: ``"carry"`` writes a pair with the chunk in which its target arrives; ``"drop"`` loses
            the pairs that cross a chunk's end, as the authors' training does.
        scope: ``"per_sequence"`` or ``"shared"``, one memory for all sequences of a batch.
    """

    topk: int = 8
    chunk_size: int = 512
    lookahead: int = 1
    score: str = "idw"
    learning_rate: float = 1.0
    addressing_weight: float = 1.0
    write_rule: str = "authors"
    boundary: str = "carry"
    scope: str = "per_sequence"

    def __post_init__(self) -> None:
        require_positive(self, "topk", "chunk_size")
        if isinstance(self.lookahead, bool) or not isinstance(self.lookahead, int) or self.lookahead < 0:
            raise ValueError(f"lookahead must be a whole number of at least 0, got {self.lookahead!r}")
        for name, choices in (
            ("score", SCORES),
            ("write_rule", WRITE_RULES),
            ("boundary", BOUNDARIES),
            ("scope", SCOPES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "addressing_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Settings(MemorySettings):
    """The layer: `MemorySettings` and the sizes of the projections and tables.

    Attributes:
        width: model width D.
        key_dim: query features per head, both halves together.
        value_dim: features of a slot.
        n_subkeys: sub-keys per half; the memory has ``n_subkeys ** 2`` slots.
        heads: heads H that read one value table jointly.
    """

    width: int = 512
    key_dim: int = 512
    value_dim: int = 512
    n_subkeys: int = 512
    heads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "width", "key_dim", "value_dim", "n_subkeys", "heads")
        if self.key_dim % 2:
            raise ValueError(f"key_dim must be even (it is split into two halves), got {self.key_dim}")
        if self.value_dim < 2:
            raise ValueError(f"value_dim must be at least 2 (targets are z-scored), got {self.value_dim}")
        if self.topk > self.n_subkeys:
            raise ValueError(f"topk must be at most n_subkeys ({self.n_subkeys}), got {self.topk}")
