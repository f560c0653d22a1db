"""The written reads of a call by chunk and slot, so that each slot is written once, in a fixed order.

Shapes: B sequences, S memories, P written tokens, H heads, k = top-k, G groups of reads of one slot.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase
from fwpkm_bench.kernels.rows_triton import group_reads

from .overlay import OverlayState
from .triton_address import Addressed
from .triton_plan import Plan, index_of, written


@dataclass(frozen=True)
class Groups:
    """The written reads of a call by chunk and slot."""

    rows: Tensor  # [G] of the overlay
    starts: Tensor  # [G + 1] in order
    order: Tensor  # [B*P*H*k]
    rate: Tensor  # [G]: -learning rate * scale / N_i
    bounds: list[int]  # the groups of step i are bounds[i] to bounds[i + 1]


@in_phase("group")
def group(state: OverlayState, at: Addressed, plan: Plan, mask: Tensor | None) -> Groups:
    """Sort the written reads of a call by chunk, memory and slot, and claim a row for each slot."""
    settings = state.settings
    device = at.slots.device
    if not plan.pairs and settings.boundary == "carry":
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        none = at.weights.new_empty(0)
        return Groups(nothing, nothing.new_zeros(1), nothing, none, [0] * (len(plan.steps) + 1))
    places = len(state.row_of_slot)
    steps = torch.arange(len(plan.steps), device=device)
    pairs = torch.tensor([s.pairs for s in plan.steps], device=device)
    step_of_pair = steps.repeat_interleave(pairs, output_size=plan.pairs)
    slots = state.table_slots(written(at.slots, plan)) + (step_of_pair * places).view(-1, 1, 1)
    distinct, starts, order = group_reads(slots)
    bounds = torch.searchsorted(distinct, torch.arange(len(plan.steps) + 1, device=device) * places).tolist()
    slot_places, step = distinct % places, torch.div(distinct, places, rounding_mode="floor")
    touched = torch.unique(slot_places) if len(plan.steps) > 1 else slot_places
    state.claim_rows(touched)
    counts = starts.diff()
    scale = _write_scale(plan, state, mask, at.weights)
    if settings.boundary == "drop":  # the chunk's other reads count too
        peeks = torch.tensor([s.length - s.pairs for s in plan.steps], device=device)
        step_of_peek = steps.repeat_interleave(peeks, output_size=plan.peeks)
        rest = index_of([(s.first + s.pairs, s.length - s.pairs) for s in plan.steps], device)
        others = state.table_slots(at.slots[:, rest]) + (step_of_peek * places).view(-1, 1, 1)
        others = others.flatten()
        if len(distinct):
            near = torch.searchsorted(distinct, others).clamp_(max=len(distinct) - 1)
            counts = counts.index_add(0, near, (distinct[near] == others).to(counts.dtype))
    memory = torch.div(slot_places, len(state.initial_values), rounding_mode="floor")
    rate = -settings.learning_rate * scale[step, memory] / counts
    rows = state.row_of_slot[slot_places]
    return Groups(rows, starts, order, rate, bounds)


def _write_scale(plan: Plan, state: OverlayState, mask: Tensor | None, like: Tensor) -> Tensor:
    """By how much the write of each step and memory is scaled, ``[steps, S]``: 1 unless pairs are dropped."""
    memories = len(state.keys)
    if state.settings.boundary == "carry":
        return like.new_ones((len(plan.steps), memories))
    rows = []
    for step in plan.steps:
        if mask is None or not step.pairs:
            rows.append(like.new_full((memories,), step.own / max(1, step.pairs)))
        else:
            written = mask[:, step.start : step.start + step.pairs].to(like.dtype)
            rows.append(written.reshape(memories, -1).mean(1))
    return torch.stack(rows)
