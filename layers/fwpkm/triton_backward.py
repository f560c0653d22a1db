"""The backward pass of ``triton.py``: six launches a chunk, walked backwards, sums in a fixed order.

Shapes: as in ``triton.py``; Q queries of a call, the W waiting ones first.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase
from fwpkm_bench.kernels.rows_triton import group_reads, grouped_sum
from fwpkm_bench.kernels.triton_support import power_of_two

from .triton import TILE, Record
from .triton_address import FEW, SOME, key_step
from .triton_key_gradient_kernels import (
    key_gradient_kernel,
    pull_gradient_kernel,
    query_gradient_kernel,
    usage_gradient_kernel,
)
from .triton_plan import Step
from .triton_read_kernels import unread_kernel


def backward(
    ctx: Any, query: Tensor, gate: Tensor, grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients to query, gate, target, keys, values and the rows that the recorded call started from."""
    walk = Walk(ctx, query, gate, grads)
    for index in reversed(range(len(walk.record.plan.steps))):
        walk.undo(index)
    return walk.results()


class Walk:
    """The running gradients while the chunks of a call are walked backwards."""

    def __init__(self, ctx: Any, query: Tensor, gate: Tensor, grads: tuple[Tensor | None, ...]) -> None:
        retrieved, weights, losses, entropy, keys, rows, _ = grads
        self.ctx, self.settings, self.waiting = ctx, ctx.settings, ctx.tape.waiting
        self.record: Record = ctx.tape.record
        self.at, self.groups = self.record.at, self.record.groups
        self.query, self.gate = query.contiguous(), gate.contiguous()
        self.values = ctx.values_like
        self.grad_retrieved, self.grad_weights, self.grad_losses, self.grad_entropy = (
            None if g is None else g.contiguous() for g in (retrieved, weights, losses, entropy)
        )
        if self.grad_entropy is not None:
            self.grad_entropy = self.grad_entropy * self.settings.addressing_weight
        self.step_size = key_step(self.settings, query)
        _, _, _, need_query, need_gate, need_target, need_keys, need_values, need_rows = ctx.needs_input_grad
        self.needed = (need_query, need_gate, need_target, need_keys, need_values, need_rows)
        batch, addressed, heads, _, k = self.at.scores.shape
        features = self.values.shape[1]
        self._index_rows(ctx.row_count)
        count = ctx.row_count + len(self.unclaimed)
        self.drows = query.new_zeros((count, features))
        if rows is not None:
            self.drows[: ctx.row_count] = rows
        self.dkeys = query.new_zeros(ctx.keys_shape) if keys is None else keys.contiguous()
        self.dquery, self.dgate = torch.zeros_like(self.query), torch.zeros_like(self.gate)
        targets = query.shape[1] - ctx.target_offset
        self.dtarget = query.new_zeros((batch, targets, features))
        self.dv_hat = query.new_empty((batch, addressed, features))
        self.dsums = query.new_empty((batch, addressed, heads * k))
        self.dpull, self.pulls = torch.empty_like(self.at.scores), torch.empty_like(self.at.scores)
        self.new_tokens = query.shape[1] - self.waiting
        self.moves = len(self.at.usage)
        member = torch.empty_like(self.groups.order)
        sizes = self.groups.starts.diff()
        member[self.groups.order] = torch.arange(len(sizes), device=query.device).repeat_interleave(sizes)
        self.member = member  # [B*P*H*k]: the group of each written read

    @in_phase("group")
    def _index_rows(self, row_count: int) -> None:
        """A row of ``drows`` for each read, the initial table's last; grouped by chunk."""
        plan = self.record.plan
        row = self.record.row.long()
        slots = self.at.slots.flatten(2)
        self.unclaimed, own = torch.unique(slots[row < 0], return_inverse=True)
        row[row < 0] = row_count + own
        self.row = row
        device = row.device
        steps = torch.tensor([s.length for s in plan.steps], device=device)
        step = torch.arange(len(plan.steps), device=device).repeat_interleave(
            steps, output_size=plan.addressed
        )
        count = row_count + len(self.unclaimed)
        distinct, self.starts, self.order = group_reads(row + (step * count).view(-1, 1))
        self.rows = distinct % max(1, count)
        bounds = torch.arange(len(plan.steps) + 1, device=device) * count
        self.bounds = torch.searchsorted(distinct, bounds).tolist()

    def results(self) -> tuple[Tensor | None, ...]:
        """Gradients to query, gate, target, keys, values and the rows that the call started from."""
        dvalues = None
        if self.needed[4]:
            dvalues = self._dense()
        rows = self.drows[: self.ctx.first_new_row]
        found = (self.dquery, self.dgate, self.dtarget, self.dkeys, dvalues, rows)
        return tuple(g if need else None for g, need in zip(found, self.needed, strict=True))

    @in_phase("read")
    def _dense(self) -> Tensor:
        """The gradient to the initial table: memories that touched the same slot add up, in a fixed order."""
        last = torch.arange(self.ctx.row_count, len(self.drows), device=self.drows.device)
        rows = torch.cat((self.ctx.new_rows, last))
        slots, starts, order = group_reads(torch.cat((self.ctx.new_slots, self.unclaimed)))
        dense = self.drows.new_zeros(self.values.shape)
        ones = self.drows.new_ones(len(self.drows))
        grouped_sum(dense, slots, starts, rows[order], ones, self.drows, reads=1, add=False)
        return dense.to(self.values.dtype)

    def undo(self, index: int) -> None:
        """Undo one chunk: its gradients to what came in, and to the memory before it."""
        step = self.record.plan.steps[index]
        self._unread(step)
        with phase("read"):
            grouped_sum(
                self.drows,
                self.rows,
                self.starts,
                self.order,
                self.at.weights.flatten(),
                self.dv_hat.view(-1, self.dv_hat.shape[2]),
                reads=self.dsums.shape[2],
                groups=range(self.bounds[index], self.bounds[index + 1]),
            )
        self.new_tokens -= step.new
        if self.needed[0] or self.needed[3]:
            self._unaddress(step, self.at.keys[index])

    @in_phase("write")
    def _unread(self, step: Step) -> None:
        record = self.record
        batch, addressed, reads = self.dsums.shape
        features = self.dv_hat.shape[2]
        block_r = power_of_two(reads)
        unread_kernel[(step.length, batch)](
            self.drows,
            record.before,
            record.peeked,
            self.row,
            self.member,
            self.groups.rate,
            self.at.weights,
            self.gate,
            record.difference,
            *(self.drows if g is None else g for g in (self.grad_retrieved, self.grad_weights)),
            self.drows if self.grad_losses is None else self.grad_losses,
            self.dv_hat,
            self.dsums,
            self.dgate,
            self.dtarget,
            step.first,
            step.length,
            step.new,
            step.pairs,
            step.length - step.pairs,
            self.new_tokens - step.new,
            step.first_pair,
            step.first_peek,
            step.start,
            step.start + self.settings.lookahead - self.ctx.target_offset,
            addressed,
            self.query.shape[1] - self.waiting,
            self.dtarget.shape[1],
            self.query.shape[1],
            record.plan.pairs,
            record.plan.peeks,
            reads,
            features,
            RULE=self.settings.write_rule,
            FROM_RETRIEVED=self.grad_retrieved is not None,
            FROM_WEIGHTS=self.grad_weights is not None,
            FROM_LOSSES=self.grad_losses is not None,
            BLOCK_R=block_r,
            BLOCK_D=min(power_of_two(features, 16), max(16, TILE // block_r)),
            num_warps=4,
        )

    @in_phase("address")
    def _unaddress(self, step: Step, keys: Tensor) -> None:
        settings, at = self.settings, self.at
        memories, heads, _, n, half = keys.shape
        batch, addressed = at.scores.shape[:2]
        sharers = batch // memories
        moved = bool(step.own and settings.addressing_weight)
        queries = self.query[:, step.start : step.stop]
        own = self.query[:, step.stop - step.own : step.stop]
        first_own = step.first + step.length - step.own
        usage, dusage = self.dkeys, self.dkeys  # not looked at where the keys did not move
        block_k, block_t = power_of_two(settings.topk), 16
        shared = {"HEADS": heads, "topk": settings.topk, "INVERSE_DISTANCE": settings.score == "idw"}
        shared |= {"BLOCK_K": block_k, "num_warps": 4}
        if moved:
            self.moves -= 1
            usage, dusage = at.usage[self.moves], torch.empty_like(at.usage[self.moves])
            pull_gradient_kernel[(triton.cdiv(step.own, block_t), heads * 2, batch)](
                own,
                keys,
                self.dkeys,
                at.scores,
                at.subkeys,
                self.step_size,
                self.dpull,
                first_own,
                step.own,
                own.stride(0),
                own.stride(1),
                addressed,
                sharers,
                n,
                half,
                **shared,
                BLOCK_T=block_t,
                BLOCK_H=min(power_of_two(half, 16), 128),
            )
            self._usage_gradient(usage, dusage, first_own, step.own, sharers, n, shared)
        query_gradient_kernel[(triton.cdiv(step.length, block_t), heads * 2, batch)](
            queries,
            keys,
            self.dkeys,
            at.scores,
            at.subkeys,
            at.ranks,
            usage,
            dusage,
            self.dpull,
            self.dsums,
            self.step_size,
            self.dquery[:, step.start : step.stop],
            self.pulls,
            step.first,
            step.length,
            step.own,
            queries.stride(0),
            queries.stride(1),
            self.dquery.stride(0),
            addressed,
            sharers,
            n,
            half,
            MOVED=moved,
            **shared,
            BLOCK_T=block_t,
            BLOCK_H=min(power_of_two(half, 16), 128),
        )
        block_j, before = SOME, torch.empty_like(self.dkeys)
        key_gradient_kernel[(triton.cdiv(n, block_j), heads * 2, memories)](
            queries,
            keys,
            self.dkeys,
            at.scores,
            at.subkeys,
            usage,
            self.pulls,
            self.step_size,
            before,
            step.first,
            step.length,
            step.own,
            queries.stride(0),
            queries.stride(1),
            addressed,
            sharers,
            n,
            half,
            MOVED=moved,
            **shared | {"num_warps": 8},
            BLOCK_J=block_j,
            BLOCK_T=max(16, 256 // block_k),
            BLOCK_H=power_of_two(half, 16),
            PRECISION="ieee" if keys.dtype == torch.float64 else "tf32x3",
        )
        self.dkeys = before

    def _usage_gradient(
        self,
        usage: Tensor,
        dusage: Tensor,
        first: int,
        own: int,
        sharers: int,
        n: int,
        shared: dict[str, Any],
    ) -> None:
        slope = dusage if self.grad_entropy is None else self.grad_entropy[:, self.moves]
        usage_gradient_kernel[(triton.cdiv(n, FEW), 2, len(usage))](
            self.at.scores,
            self.at.subkeys,
            usage,
            self.dpull,
            slope,
            dusage,
            first,
            own,
            self.at.scores.shape[1],
            sharers,
            n,
            slope.stride(0),
            FROM_ENTROPY=self.grad_entropy is not None,
            **shared,
            BLOCK_J=FEW,
            BLOCK_T=max(16, 256 // shared["BLOCK_K"]),
        )
