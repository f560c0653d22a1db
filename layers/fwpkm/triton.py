"""FwPKM in Triton kernels: the keys of a whole call first, then its values, chunk by chunk.

Addressing does not depend on the values. So the keys pass through all chunks of a call, three launches each;
one sort groups every read of the call by chunk and slot; and the values follow, two launches a chunk: a read
of each token, and the sum that goes back into each touched row, in a fixed order, without atomics.

Shapes: as in ``eager.py``; A tokens addressed in a call (the l left over count again with each chunk).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase
from fwpkm_bench.kernels.rows_triton import grouped_sum
from fwpkm_bench.kernels.triton_support import power_of_two, require_triton

from .overlay import OverlayState
from .reference import LOG_EPSILON, write_coefficient
from .triton_address import Addressed, address
from .triton_groups import Groups, group
from .triton_plan import Plan, Step, index_of, written
from .triton_read_kernels import read_kernel

TILE = 8192  # values of a block that a program keeps in registers at most


@dataclass(frozen=True)
class Record:
    """What the backward pass of a call needs."""

    plan: Plan
    at: Addressed
    groups: Groups
    row: Tensor  # [B, A, H*k] int32 of the overlay, negative where the initial table was read
    difference: Tensor  # [B, P, value_dim]
    before: Tensor  # [G, value_dim]: the rows as they were read
    peeked: Tensor  # [B, peeks, H*k, value_dim]: what was read and not written


@dataclass
class Tape:
    """The record of a call, and how many queries were there before it."""

    waiting: int
    record: Record | None = None


def run(
    state: OverlayState,
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    *,
    flush: bool = False,
    tape: Tape | None = None,
) -> dict[str, Tensor]:
    """`eager.run` in Triton kernels, with the same arguments, results and state."""
    require_triton(query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return _run(state, query, target, gate, mask, flush=flush, tape=tape)


def _run(
    state: OverlayState,
    query: Tensor,
    target: Tensor,
    gate: Tensor,
    mask: Tensor | None,
    *,
    flush: bool,
    tape: Tape | None,
) -> dict[str, Tensor]:
    tokens = query.shape[1]
    plan = Plan.of(state, tokens, flush)
    if tape is None and not any(step.own for step in plan.steps):
        return _read_and_keep(state, query, target, gate)
    old_query, old_gate, old_target = state.pending()
    queries, gates = _after(old_query, query), _after(old_gate, gate)
    targets = _after(old_target, target)
    first_target = state.carried  # targets[:, m] is that of query first_target + m

    at = address(state, queries, plan)
    state.reserve(tokens)
    groups = group(state, at, plan, mask)
    row = state.row_of_slot[state.table_slots(at.slots)].flatten(2)
    batch, features = len(query), target.shape[2]
    retrieved = target.new_empty((batch, tokens, features))
    losses = gate.new_empty((batch, plan.pairs))
    difference = target.new_empty((batch, plan.pairs, features))
    before = state.rows.new_empty((len(groups.rows) if tape is not None else 0, features))
    kept = plan.peeks if tape is not None else 0
    peeked = target.new_empty((batch, kept, row.shape[2], features))
    queries_of_pairs = index_of([(s.start, s.pairs) for s in plan.steps], query.device)
    coefficient = write_coefficient(written(at.weights, plan), state.settings.write_rule)
    coefficient = (coefficient * gates[:, queries_of_pairs, None, None]).flatten()
    first_new = 0
    for index, step in enumerate(plan.steps):
        _read(
            state,
            at,
            row,
            step,
            first_new=first_new,
            first_target=step.start + state.settings.lookahead - first_target,
            outputs=(retrieved, difference, losses, peeked),
            inputs=(targets, gates),
            record=tape is not None,
        )
        with phase("write"):
            grouped_sum(
                state.rows,
                groups.rows,
                groups.starts,
                groups.order,
                coefficient,
                difference.view(-1, features),
                reads=row.shape[2],
                groups=range(groups.bounds[index], groups.bounds[index + 1]),
                rate=groups.rate,
                before=before if tape is not None else None,
            )
        first_new += step.new
    if tape is not None:
        tape.record = Record(plan, at, groups, row, difference, before, peeked)
    state.carried, state.pending_tokens = plan.carried, plan.pending
    state.set_pending(*(t.clone() for t in _last(plan, queries, gates, targets)))
    new = index_of([(s.first + s.length - s.new, s.new) for s in plan.steps], query.device)
    return {
        "retrieved": retrieved,
        "slots": at.slots[:, new],
        "weights": at.weights[:, new],
        "losses": losses,
        "entropy": _entropy(at, state, plan),
    }


def _read_and_keep(state: OverlayState, query: Tensor, target: Tensor, gate: Tensor) -> dict[str, Tensor]:
    """A call that fills no chunk, as while one token after another is decoded: there is nothing to write."""
    retrieved, at = _read_alone(state, query)
    state.append(query, gate, target)
    losses, entropy = gate.new_empty((len(gate), 0)), gate.new_empty((len(state.keys), 0))
    return {
        "retrieved": retrieved,
        "slots": at.slots,
        "weights": at.weights,
        "losses": losses,
        "entropy": entropy,
    }


def read(state: OverlayState, query: Tensor) -> Tensor:
    """What ``query [B, L, H*key_dim]`` finds, ``[B, L, value_dim]``; nothing is written."""
    require_triton(query.device)
    with torch.cuda.device_of(query):
        return _read_alone(state, query)[0]


def _read_alone(state: OverlayState, query: Tensor) -> tuple[Tensor, Addressed]:
    batch, tokens, _ = query.shape
    step = Step(0, tokens, own=0, new=tokens, pairs=0, first=0, first_pair=0, first_peek=0)
    at = address(state, query.contiguous(), Plan([step], tokens))
    row = state.row_of_slot[state.table_slots(at.slots)].flatten(2)
    out = query.new_empty((batch, tokens, state.value_shape[1]))
    nothing, no_gate = out[:, :0], query.new_empty((batch, tokens))  # no target has come
    _read(
        state,
        at,
        row,
        step,
        first_new=0,
        first_target=0,
        outputs=(out, nothing, nothing[..., 0], nothing.unsqueeze(2)),
        inputs=(nothing, no_gate),
        record=False,
    )
    return out, at


@in_phase("read")
def _read(
    state: OverlayState,
    at: Addressed,
    row: Tensor,
    step: Step,
    *,
    first_new: int,
    first_target: int,
    inputs: tuple[Tensor, Tensor],
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    record: bool,
) -> None:
    """Read the tokens of ``step``, and the errors of those whose targets have come."""
    retrieved, difference, losses, peeked = outputs
    targets, gates = inputs
    reads, features = row.shape[2], retrieved.shape[2]
    block_r = power_of_two(reads)
    read_kernel[(step.length, len(row))](
        state.rows,
        state.initial_values,
        row,
        at.slots,
        at.weights,
        targets,
        gates,
        retrieved,
        difference,
        losses,
        peeked,
        step.first,
        step.length,
        step.new,
        step.pairs,
        step.length - step.pairs,
        first_new,
        step.first_pair,
        step.first_peek,
        step.start,
        first_target,
        row.shape[1],
        retrieved.shape[1],
        targets.shape[1],
        gates.shape[1],
        losses.shape[1],
        peeked.shape[1],
        reads,
        features,
        RECORD=record,
        BLOCK_R=block_r,
        BLOCK_D=min(power_of_two(features, 16), max(16, TILE // block_r)),
        num_warps=4,
    )


def _entropy(at: Addressed, state: OverlayState, plan: Plan) -> Tensor:
    """The weighted addressing loss of each memory and written chunk, ``[S, chunks]``."""
    if not at.usage:  # nothing was written, or the keys stay as they are
        return at.weights.new_zeros((len(state.keys), sum(s.own > 0 for s in plan.steps)))
    usage = torch.stack(at.usage)  # [chunks, S, 2, n]
    return (usage * torch.log(usage + LOG_EPSILON)).sum((-1, -2)).T * state.settings.addressing_weight


def _after(old: Tensor, new: Tensor) -> Tensor:
    """``new`` after what is left of ``old``, contiguous."""
    return torch.cat((old, new), 1) if old.shape[1] else new.contiguous()


def _last(plan: Plan, queries: Tensor, gates: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens that the next call needs."""
    length = plan.carried + plan.pending
    return (
        queries[:, queries.shape[1] - length :],
        gates[:, gates.shape[1] - length :],
        targets[:, targets.shape[1] - plan.pending :],
    )
