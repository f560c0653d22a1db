"""FwPKM under autograd: one Function a call, whose backward is a backend's own.

Shapes: B sequences, T tokens; Q queries of a call, the W waiting ones first.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import backward_of, forward_of
from .overlay import OverlayState


def needs_gradient(state: OverlayState, *tensors: Tensor) -> bool:
    """Whether a call on ``state`` with ``tensors`` has to be recorded."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *state.graph_tensors()))


def run(
    state: OverlayState,
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    *,
    flush: bool = False,
) -> dict[str, Tensor]:
    """The backend's `run`, recorded by autograd; gradients flow on through the state that is carried."""
    old_query, old_gate, old_target = state.pending()
    query = torch.cat((old_query, query), 1)
    gate = torch.cat((old_gate, gate), 1)
    target = torch.cat((old_target, target), 1)
    rows = state.rows[: state.used_rows]
    arguments = (query, gate, target, state.keys, state.initial_values, rows)
    retrieved, weights, losses, entropy, keys, rows, slots = _Run.apply(state, mask, flush, *arguments)
    state.keys, state.rows, state.rows_are_shared = keys, rows, True
    state.set_pending(query, gate, target)
    return {
        "retrieved": retrieved,
        "slots": slots,
        "weights": weights,
        "losses": losses,
        "entropy": entropy,
    }


class _Run(torch.autograd.Function):
    """Advances the counters of ``state``; its tensors come in and go out as arguments and results."""

    @staticmethod
    def forward(
        ctx: Any,
        state: OverlayState,
        mask: Tensor | None,
        flush: bool,
        query: Tensor,
        gate: Tensor,
        target: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: Tensor,
    ) -> tuple[Tensor, ...]:
        waiting = state.carried + state.pending_tokens
        new_target = target[:, state.pending_tokens :]
        state.keys, state.initial_values = keys, values
        state.set_pending(query[:, :waiting], gate[:, :waiting], target[:, : state.pending_tokens])
        state.rows, state.rows_are_shared = rows, True
        forward = forward_of(state.backend)
        tape = forward.Tape(waiting)
        first_new_row = state.used_rows
        ctx.target_offset, ctx.backend = state.carried, state.backend
        out = forward.run(
            state, query[:, waiting:], new_target, gate[:, waiting:], mask, flush=flush, tape=tape
        )
        places = (state.row_of_slot >= 0).nonzero().squeeze(-1)
        row = state.row_of_slot[places]
        fresh = row >= first_new_row
        ctx.new_rows = row[fresh].long()
        ctx.new_slots = places[fresh] % len(values)
        ctx.row_count, ctx.first_new_row = state.used_rows, first_new_row
        ctx.settings, ctx.tape, ctx.row_of_slot = state.settings, tape, state.row_of_slot
        ctx.keys_shape, ctx.values_like = keys.shape, values
        ctx.save_for_backward(query, gate)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out["slots"])
        after_keys = state.keys.clone()  # the tape may hold these, and must not hold what holds the tape
        after_rows = state.rows[: state.used_rows].clone()
        return (
            out["retrieved"],
            out["weights"],
            out["losses"],
            out["entropy"],
            after_keys,
            after_rows,
            out["slots"],
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, gate = ctx.saved_tensors
        return (None, None, None, *backward_of(ctx.backend).backward(ctx, query, gate, grads))
