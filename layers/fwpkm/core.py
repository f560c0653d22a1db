"""The memory alone, for the recall workload: written chunk by chunk with gate 1, then asked."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import reference
from .backends import forward_of
from .functional import fwpkm, init_state
from .overlay import OverlayState
from .settings import MemorySettings, Settings
from .state import FwPKMState


@dataclass
class CoreState:
    """The memory, and how often each slot was written."""

    memory: FwPKMState
    slot_writes: Tensor  # [n*n]


class FwPKMCore:
    """One memory whose keys and values start as a layer's do; see `MemoryCore`.

    The query of a pair learns that pair's own value (lookahead 0), and what is pending is flushed, so
    that every pair has been written when the memory is asked.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        key_dim: int,
        value_dim: int,
        backend: str,
        generator: torch.Generator,
    ) -> None:
        settings = replace(settings, key_dim=key_dim, value_dim=value_dim, lookahead=0)
        self.memory_settings = memory_settings(settings)
        self.backend = backend
        self.heads = settings.heads
        self.keys, self.values = initial_memory(settings, generator)

    def init_state(self) -> CoreState:
        memory = init_state(self.keys, self.values, 1, self.memory_settings, self.backend)
        return CoreState(memory, self.values.new_zeros(len(self.values), dtype=torch.int64))

    @torch.no_grad()
    def write(self, state: CoreState, keys: Tensor, values: Tensor) -> CoreState:
        out = fwpkm(
            keys.repeat(1, self.heads).unsqueeze(0),
            values.unsqueeze(0),
            None,
            self.keys,
            self.values,
            **vars(self.memory_settings),
            state=state.memory,
            backend=self.backend,
        )
        writes = torch.bincount(out.indices.flatten(), minlength=len(self.values))
        return CoreState(out.state.flush(), state.slot_writes + writes)

    @torch.no_grad()
    def read(self, state: CoreState, queries: Tensor) -> Tensor:
        query = queries.repeat(1, self.heads).unsqueeze(0)
        if isinstance(state.memory, OverlayState):
            return forward_of(self.backend).read(state.memory, query)[0]
        keys, values = state.memory.materialize()
        return reference.read(reference.address(query, keys[0], self.memory_settings), values[0])[0]

    def slot_writes(self, state: CoreState) -> Tensor:
        return state.slot_writes


def memory_settings(settings: Settings) -> MemorySettings:
    """The part of ``settings`` that the memory itself needs."""
    return MemorySettings(**{name: getattr(settings, name) for name in MemorySettings.__dataclass_fields__})


def initial_memory(settings: Settings, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Keys ``[H, 2, n, h]`` uniform in +-1/sqrt(key_dim), values of std 1/sqrt(value_dim)."""
    n = settings.n_subkeys
    device = None if generator is None else generator.device
    keys = torch.empty(settings.heads, 2, n, settings.key_dim // 2, device=device)
    values = torch.empty(n * n, settings.value_dim, device=device)
    bound = settings.key_dim**-0.5
    return keys.uniform_(-bound, bound, generator=generator), values.normal_(
        0.0, settings.value_dim**-0.5, generator=generator
    )
