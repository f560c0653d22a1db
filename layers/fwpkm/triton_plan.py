"""The chunks that a call is cut into, and where their tokens lie.

Shapes: B sequences, A tokens addressed in a call (the l left over count again with each chunk), P written.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .overlay import OverlayState


@dataclass(frozen=True)
class Step:
    """A chunk of a call. Queries are counted from the first one that was carried in."""

    start: int  # its first query
    stop: int
    own: int  # how many of them, the last ones, are the chunk's own; 0 where nothing is written
    new: int  # how many of them, the last ones, came with this call
    pairs: int  # how many of them, the first ones, are written
    first: int  # its place among the tokens addressed in the call
    first_pair: int  # among those that are written
    first_peek: int  # among those that are read alone

    @property
    def length(self) -> int:
        """The tokens that it addresses."""
        return self.stop - self.start

    @property
    def rows(self) -> slice:
        """Its tokens among those addressed in the call."""
        return slice(self.first, self.first + self.length)


@dataclass
class Plan:
    """The chunks of a call, and what is left over and pending after it."""

    steps: list[Step] = field(default_factory=list)
    addressed: int = 0
    pairs: int = 0
    peeks: int = 0
    carried: int = 0
    pending: int = 0

    @classmethod
    def of(cls, state: OverlayState, tokens: int, flush: bool) -> "Plan":
        """What ``tokens`` more tokens make of ``state``."""
        settings = state.settings
        plan = cls(carried=state.carried, pending=state.pending_tokens)
        start, stop = 0, plan.carried + plan.pending
        while start < tokens or (flush and plan.pending):
            new = min(tokens - start, settings.chunk_size - plan.pending)
            start, stop = start + new, stop + new
            plan.pending += new
            full = plan.pending == settings.chunk_size or settings.boundary == "drop"
            if full or (flush and start == tokens):
                length = plan.carried + plan.pending
                plan._add(stop, length, plan.pending, new, max(0, length - settings.lookahead))
                plan.carried = min(settings.lookahead, length) if settings.boundary == "carry" else 0
                plan.pending = 0
            else:
                plan._add(stop, new, 0, new, 0)
        return plan

    def _add(self, stop: int, length: int, own: int, new: int, pairs: int) -> None:
        self.steps.append(Step(stop - length, stop, own, new, pairs, self.addressed, self.pairs, self.peeks))
        self.addressed += length
        self.pairs += pairs
        self.peeks += length - pairs


def index_of(ranges: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    """An index of the numbers of all ``ranges`` of a start and a length, one after another."""
    if len(ranges) == 1:
        start, length = ranges[0]
        return slice(start, start + length)
    parts = [torch.arange(start, start + length) for start, length in ranges]
    return torch.cat(parts).to(device, non_blocking=True)


def written(tokens: Tensor, plan: Plan) -> Tensor:
    """Those of the addressed ``tokens [B, A, ...]`` that are written, ``[B, P, ...]``."""
    return tokens[:, index_of([(s.first, s.pairs) for s in plan.steps], tokens.device)]
