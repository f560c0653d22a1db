"""The state of the sparse backends: fast keys, an overlay of touched slots, pending tokens.

Shapes: B sequences, S memories (B, or 1 where they share one), H heads, n sub-keys per half,
h = key_dim / 2, R touched slots, l lookahead.
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase

from ..contract import tensor_bytes
from .addressing import Addresses, address, square_norms
from .backends import forward_of
from .settings import MemorySettings
from .state import check_unspent


@dataclass(frozen=True)
class Read:
    """Reads that were not written with their chunk."""

    v_hat: Tensor  # [B, M, value_dim]
    at: Addresses
    row: Tensor  # [B, M, H*k] in the overlay, -1 where the initial table was read
    values: Tensor  # [B, M, H*k, value_dim] what they read


class OverlayState:
    """Touched rows over a shared initial table.

    Advanced in place where nothing is recorded; a call with gradients replaces the tensors instead.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, batch: int, settings: MemorySettings, backend: str = "eager"
    ) -> None:
        memories = batch if settings.scope == "per_sequence" else 1
        self.settings = settings
        self.backend = backend
        self.spent = False
        self.batch = batch
        self.key_shape = keys.shape
        self.value_shape = values.shape
        self.initial_values = values.contiguous()  # [n*n, value_dim], never written
        self.keys = keys.expand(memories, *keys.shape).clone(memory_format=torch.contiguous_format)
        self.rows = values.new_empty((0, values.shape[1]), dtype=keys.dtype)  # capacity, not only R
        self.rows_are_shared = False  # with a recorded graph: to be copied before they are written
        self.used_rows = 0
        self.row_of_slot = torch.full((memories * len(values),), -1, dtype=torch.int32, device=values.device)
        self.carried = 0  # queries whose target lies beyond the last written chunk
        self.pending_tokens = 0
        self._norms_of: Tensor | None = None
        self._key_norms = self.keys[..., 0]
        self._query = keys.new_empty((batch, 0, keys.shape[0] * 2 * keys.shape[-1]))  # the carried ones first
        self._gate = keys.new_empty((batch, 0))
        self._target = keys.new_empty((batch, 0, values.shape[1]))

    def tensors(self) -> dict[str, Tensor]:
        query, gate, target = self.pending()
        slots = (self.row_of_slot >= 0).nonzero().squeeze(-1)
        rows = self.rows[self.row_of_slot[slots].long()]
        return {
            "keys": self.keys,
            "slots": slots,
            "rows": rows,
            "query": query,
            "gate": gate,
            "target": target,
        }

    def fill(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` took apart; this state must be new."""
        device = self.keys.device
        slots, self.rows, self.keys = (tensors[name].to(device) for name in ("slots", "rows", "keys"))
        self.rows_are_shared, self.used_rows = True, len(slots)
        self.row_of_slot[slots] = torch.arange(len(slots), dtype=torch.int32, device=device)
        query, gate, target = (tensors[name].to(device) for name in ("query", "gate", "target"))
        self.pending_tokens, self.carried = target.shape[1], query.shape[1] - target.shape[1]
        self.set_pending(query, gate, target)

    @in_phase("address")
    def address(self, query: Tensor) -> Addresses:
        """Where ``query [B, L, H*key_dim]`` reads under the keys as they are."""
        if self._norms_of is not self.keys:  # keys are replaced, never written
            self._key_norms, self._norms_of = square_norms(self.keys), self.keys
        return address(query, self.keys, self._key_norms, self.settings)

    @property
    def heads(self) -> int:
        return self.keys.shape[1]

    def graph_tensors(self) -> tuple[Tensor, ...]:
        """The tensors that gradients may flow through."""
        return (self.keys, self.rows, self.initial_values, self._query, self._gate, self._target)

    def table_slots(self, slots: Tensor) -> Tensor:
        """``slots [B, ...]`` of each sequence's memory as places in ``row_of_slot``."""
        if self.keys.shape[0] == 1:
            return slots
        memory = torch.arange(len(slots), device=slots.device) * len(self.initial_values)
        return slots + memory.view(-1, *([1] * (slots.ndim - 1)))

    def reserve(self, tokens: int) -> None:
        """Make room for the rows that ``tokens`` more tokens a sequence can touch.

        At least doubles where it must grow, and never beyond one row a slot. On a CPU room costs nothing
        until it is written.
        """
        pairs = self.batch * (tokens + self.carried + self.pending_tokens)
        capacity = min(self.used_rows + pairs * self.heads * self.settings.topk, len(self.row_of_slot))
        if capacity <= len(self.rows) and not self.rows_are_shared:
            return
        if capacity > len(self.rows):
            capacity = min(max(capacity, 2 * len(self.rows)), len(self.row_of_slot))
        larger = self.rows.new_empty((max(capacity, len(self.rows)), self.rows.shape[1]))
        larger[: self.used_rows] = self.rows[: self.used_rows]
        self.rows, self.rows_are_shared = larger, False

    def claim_rows(self, distinct: Tensor) -> Tensor:
        """The rows of the overlay that hold ``distinct [U]`` places, filled from the initial table if new.

        There must be room: see `reserve`.
        """
        rows = self.row_of_slot[distinct]
        new = distinct[rows < 0]
        if len(new):
            start, stop = self.used_rows, self.used_rows + len(new)
            initial = new % len(self.initial_values) if len(self.keys) > 1 else new
            if self.initial_values.dtype == self.rows.dtype:
                torch.index_select(self.initial_values, 0, initial, out=self.rows[start:stop])
            else:
                self.rows[start:stop] = self.initial_values[initial]
            self.row_of_slot[new] = torch.arange(start, stop, dtype=torch.int32, device=new.device)
            self.used_rows = stop
            rows = self.row_of_slot[distinct]
        return rows.long()

    @in_phase("read")
    def read(self, at: Addresses) -> Read:
        """``sum_i w_i V[i]`` at ``at``, where nothing is claimed."""
        row = self.row_of_slot[self.table_slots(at.slots)].long().flatten(2)
        rows = self.initial_values.index_select(0, at.slots.flatten()).to(self.rows.dtype)
        touched = (row.flatten() >= 0).nonzero().squeeze(-1)
        rows.index_copy_(0, touched, self.rows.index_select(0, row.flatten()[touched]))
        rows = rows.view(*row.shape, -1)
        return Read((at.weights.flatten(2).unsqueeze(2) @ rows).squeeze(2), at, row, rows)

    def append(self, query: Tensor, gate: Tensor, target: Tensor) -> None:
        """Make tokens ``[B, p, ...]`` pending."""
        start, count = self.carried + self.pending_tokens, query.shape[1]
        if self._query.shape[1] < start + count or self._target.shape[1] < self.pending_tokens + count:
            room = self.settings.chunk_size + self.settings.lookahead
            self._query, self._gate, self._target = (
                _with_room(self._query[:, :start], room),
                _with_room(self._gate[:, :start], room),
                _with_room(self._target[:, : self.pending_tokens], room),
            )
        self._query[:, start : start + count] = query
        self._gate[:, start : start + count] = gate
        self._target[:, self.pending_tokens : self.pending_tokens + count] = target
        self.pending_tokens += count

    def pending(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and gates ``[B, carried + pending, ...]``, targets ``[B, pending, value_dim]``."""
        length = self.carried + self.pending_tokens
        return self._query[:, :length], self._gate[:, :length], self._target[:, : self.pending_tokens]

    def set_pending(self, query: Tensor, gate: Tensor, target: Tensor) -> None:
        """Let the last of these tokens be those that are carried and pending, by the counts."""
        length = self.carried + self.pending_tokens
        self._query = query[:, query.shape[1] - length :]
        self._gate = gate[:, gate.shape[1] - length :]
        self._target = target[:, target.shape[1] - self.pending_tokens :]

    def keep_last(self, count: int) -> None:
        """Forget the pending tokens but for the last ``count`` queries, whose targets have not come."""
        length = self.carried + self.pending_tokens
        room = self._query.shape[1]
        self.carried = min(count, length)
        self._query, self._gate = (
            _with_room(buffer[:, length - self.carried : length], room)
            for buffer in (self._query, self._gate)
        )
        self.pending_tokens = 0

    def materialize(self) -> tuple[Tensor, Tensor]:
        memories = len(self.keys)
        values = self.initial_values.to(self.rows.dtype).repeat(memories, 1)
        touched = (self.row_of_slot >= 0).nonzero().squeeze(-1)
        values = values.index_copy(0, touched, self.rows[self.row_of_slot[touched].long()])
        return self.keys.clone(), values.view(memories, *self.initial_values.shape)

    def flush(self) -> Self:
        after = self.successor()
        if after.pending_tokens:
            after.advance(self._query[:, :0], self._target[:, :0], self._gate[:, :0], None, flush=True)
        return after

    def advance(
        self, query: Tensor, target: Tensor, gate: Tensor, mask: Tensor | None, *, flush: bool = False
    ) -> dict[str, Tensor]:
        """Read and write ``[B, T]`` tokens with its backend, recorded where a gradient is wanted."""
        from . import training

        needed = training.needs_gradient(self, query, target, gate)
        run = training.run if needed else forward_of(self.backend).run
        return run(self, query, target, gate, mask, flush=flush)

    def successor(self) -> Self:
        """The state that a call advances; this one is spent, its buffers are handed over."""
        check_unspent(self)
        after = copy.copy(self)
        self.spent = True
        return after

    def nbytes(self) -> int:
        query, gate, target = self.pending()
        row = self.rows.shape[1] * self.rows.element_size() + self.row_of_slot.element_size()
        return tensor_bytes(self.keys, query, gate, target) + self.used_rows * row

    def clone(self) -> Self:
        check_unspent(self)
        other = copy.copy(self)
        for name in ("keys", "rows", "row_of_slot", "_query", "_gate", "_target"):
            setattr(other, name, getattr(self, name).clone())
        return other

    def detach(self) -> Self:
        after = self.successor()
        for name in ("keys", "rows", "initial_values", "_query", "_gate", "_target"):
            setattr(after, name, getattr(self, name).detach())
        return after


def _with_room(tokens: Tensor, room: int) -> Tensor:
    """A buffer of its own for ``room`` tokens that begins with ``tokens [B, p, ...]``."""
    buffer = tokens.new_empty((tokens.shape[0], room, *tokens.shape[2:]))
    buffer[:, : tokens.shape[1]] = tokens
    return buffer
