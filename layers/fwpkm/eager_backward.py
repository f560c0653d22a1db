"""FwPKM's gradient in closed form, without a dense history: the chunks are walked backwards.

One running ``dV`` holds the gradient to the overlay's rows as they stood after the chunk at hand. With
the step ``r_i = lr * scale / N_i``, ``D = -r_i dV[i]`` for the rows that the chunk wrote, and
``e = g (v_hat - target)``: ``de_t = sum_i c_ti D_i``, ``dc_ti = <D_i, e_t>``, then
``dw_ti = <V[i], dv_hat_t>`` and ``dV[i] += w_ti dv_hat_t`` with V as it was read. The chosen indices and
N_i carry no gradient.

Shapes: as in ``eager.py``; Q queries of a call, the W waiting ones first.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase

from . import eager
from .addressing import address_backward
from .eager import Chunk, Written
from .overlay import Read
from .reference import write_coefficient
from .settings import MemorySettings


def backward(
    ctx: Any, query: Tensor, gate: Tensor, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients to query, gate, target, keys, values and the rows that the recorded call started from."""
    walk = Walk(ctx, query, gate, grads)
    for chunk in reversed(ctx.tape.chunks):
        walk.step(chunk)
    return walk.results()


class Walk:
    """The running gradients while the chunks of a call are walked backwards."""

    def __init__(self, ctx: Any, query: Tensor, gate: Tensor, grads: tuple[Tensor | None, ...]) -> None:
        retrieved, weights, losses, entropy, keys, rows, _ = grads
        self.ctx = ctx
        self.settings: MemorySettings = ctx.settings
        self.query, self.gate = query, gate
        self.values = ctx.values_like
        self.waiting = ctx.tape.waiting
        self.grad_retrieved, self.grad_weights = retrieved, weights
        self.grad_losses, self.grad_entropy = losses, entropy
        self.losses_left = sum(
            c.written.difference.shape[1] for c in ctx.tape.chunks if c.written is not None
        )
        self.entropies_left = sum(c.own > 0 for c in ctx.tape.chunks)
        _, _, _, need_query, need_gate, need_target, need_keys, need_values, need_rows = ctx.needs_input_grad
        self.need_addresses = need_query or need_keys
        self.dkeys = query.new_zeros(ctx.keys_shape) if keys is None else keys
        self.drows = query.new_zeros((ctx.row_count, self.values.shape[1])) if rows is None else rows.clone()
        self.dvalues = query.new_zeros(self.values.shape) if need_values else None  # as wide as the rows
        self.dquery = torch.zeros_like(query)
        self.dgate = torch.zeros_like(gate)
        self.dtarget = query.new_zeros((len(query), query.shape[1] - ctx.target_offset, self.values.shape[1]))
        self.needed = (need_query, need_gate, need_target, need_keys, need_values, need_rows)

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients to query, gate, target, keys, values and the rows that the call started from."""
        if self.dvalues is not None:
            new = self.drows[self.ctx.new_rows]
            self.dvalues.index_add_(0, self.ctx.new_slots, new)
        rows = self.drows[: self.ctx.first_new_row]
        dvalues = None if self.dvalues is None else self.dvalues.to(self.values.dtype)
        found = (self.dquery, self.dgate, self.dtarget, self.dkeys, dvalues, rows)
        return tuple(g if need else None for g, need in zip(found, self.needed, strict=True))

    def step(self, chunk: Chunk) -> None:
        """Undo one chunk: its gradients to what came in, and to the memory before it."""
        batch, length, heads, k = chunk.at.weights.shape
        new = slice(length - chunk.new, None)
        coming = slice(chunk.stop - self.waiting - chunk.new, chunk.stop - self.waiting)
        dv_hat = self.query.new_zeros((batch, length, self.values.shape[1]))
        dweights = self.query.new_zeros(chunk.at.weights.shape)
        if self.grad_retrieved is not None:
            dv_hat[:, new] = self.grad_retrieved[:, coming]
        if self.grad_weights is not None:
            dweights[:, new] = self.grad_weights[:, coming]
        pairs, dcoefficient = 0, self.query.new_zeros((batch, 0, heads, k))
        if chunk.written is not None:
            pairs = chunk.written.difference.shape[1]
            dcoefficient, dw = self._unwrite(chunk, chunk.written, dv_hat[:, :pairs])
            dweights[:, :pairs] += dw
        if chunk.peek is not None:
            dweights[:, pairs:] += self._unpeek(chunk.peek, dv_hat[:, pairs:])
        if not self.need_addresses:
            return
        tokens = slice(chunk.stop - length, chunk.stop)
        dquery, self.dkeys = address_backward(
            self.query[:, tokens],
            chunk.at,
            chunk.keys,
            self.settings,
            own=chunk.own,
            grad_weights=dweights,
            grad_coefficients=dcoefficient,
            grad_keys_after=self.dkeys,
            grad_loss=self._next_entropy() if chunk.own else self.dkeys.new_zeros(len(self.dkeys)),
        )
        self.dquery[:, tokens] += dquery

    def _unwrite(self, chunk: Chunk, written: Written, dv_hat: Tensor) -> tuple[Tensor, Tensor]:
        """The pairs of a chunk: gradients to their write coefficients and weights ``[B, P, H, k]``."""
        weights = chunk.at.weights[:, : dv_hat.shape[1]]
        batch, pairs, heads, k = weights.shape
        per_token = heads * k
        first = chunk.stop - chunk.at.weights.shape[1]
        gate = self.gate[:, first : first + pairs].unsqueeze(-1)
        difference = written.difference
        with phase("write"):
            after = self.drows.index_select(0, written.rows)  # dV [U, value_dim]; D = -rate dV
            group = written.group.view(-1, per_token)
            step = -written.rate[group]
            coefficient = write_coefficient(weights, self.settings.write_rule).reshape(-1, per_token)
            derror = F.embedding_bag(group, after, mode="sum", per_sample_weights=coefficient * step).view_as(
                difference
            )
            dcoefficient = _dots(after, group, gate * difference).mul_(step).view(weights.shape)
            dgate = (difference * derror).sum(-1)
            ddifference = gate * derror
            dlosses = self._next_losses(pairs)
            if dlosses is not None:
                features = difference.shape[-1]
                dgate = dgate + dlosses * torch.linalg.vecdot(difference, difference) / features
                ddifference = ddifference + (2 / features) * dlosses.unsqueeze(-1) * gate * difference
            self.dgate[:, first : first + pairs] += dgate
            stop = chunk.stop - self.ctx.target_offset
            self.dtarget[:, stop - pairs : stop] -= ddifference
        with phase("read"):
            dv_hat = dv_hat + ddifference
            back = F.embedding_bag(
                torch.div(written.order, per_token, rounding_mode="floor"),
                dv_hat.reshape(batch * pairs, -1),
                written.starts,
                mode="sum",
                per_sample_weights=weights.flatten()[written.order],
            )
            eager.add_rows(self.drows, written.rows, back)
            return dcoefficient, _dots(written.before, group, dv_hat).view(weights.shape)

    @in_phase("read")
    def _unpeek(self, peek: Read, dv_hat: Tensor) -> Tensor:
        """Reads that were not written: the gradient to their weights."""
        batch, count, heads, k = peek.at.weights.shape
        spread = peek.at.weights.reshape(batch, count, -1, 1) * dv_hat.unsqueeze(2)  # [B, M, H*k, value_dim]
        row, place = peek.row.flatten(), peek.at.slots.flatten()
        flat = spread.flatten(0, 2)
        touched = row >= 0
        self.drows.index_add_(0, row[touched], flat[touched])
        if self.dvalues is not None:
            self.dvalues.index_add_(0, place[~touched], flat[~touched])
        return (peek.values * dv_hat.unsqueeze(2)).sum(-1).view(batch, count, heads, k)

    def _next_losses(self, pairs: int) -> Tensor | None:
        self.losses_left -= pairs
        if self.grad_losses is None:
            return None
        return self.grad_losses[:, self.losses_left : self.losses_left + pairs]

    def _next_entropy(self) -> Tensor:
        self.entropies_left -= 1
        if self.grad_entropy is None:
            return self.dkeys.new_zeros(len(self.dkeys))
        return self.grad_entropy[:, self.entropies_left]


def _dots(table: Tensor, group: Tensor, tokens: Tensor) -> Tensor:
    """``<table[group_ti], tokens_t>`` ``[N, H*k]`` of table ``[U, d]``, group and tokens ``[N, d]``."""
    picked = table.index_select(0, group.flatten()).view(*group.shape, -1)
    return torch.bmm(picked, tokens.reshape(len(group), -1, 1)).squeeze(-1)
