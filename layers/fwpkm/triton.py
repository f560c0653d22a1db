"""FwPKM in Triton kernels: the keys of a whole call first, then its values, chunk by chunk.

Addressing does not depend on the values. So the keys pass through all chunks of a call, three launches each;
one sort groups every read of the call by chunk and slot; and the values follow, two launches a chunk: a read
of each token, and the sum that goes back into each touched row, in a fixed order, without atomics.

Shapes: as in ``eager.py``; A tokens addressed in a call (the l left over count again with each chunk).
"""

from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase
from fwpkm_bench.kernels.product_key_triton import nearest_subkeys, product
from fwpkm_bench.kernels.rows_triton import group_reads, grouped_sum
from fwpkm_bench.kernels.triton_support import GPU_BLOCKS, power_of_two, require_triton

from .overlay import OverlayState
from .reference import LOG_EPSILON, write_coefficient
from .settings import MemorySettings
from .triton_kernels import move_keys_kernel, read_kernel, usage_kernel

# Sub-keys a program: few, for one sequence alone must fill the chip; interpreted, each program takes a while.
FEW, SOME = (8, 16) if GPU_BLOCKS else (32, 32)
TILE = 8192  # values of a block that a program keeps in registers at most


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


@dataclass(frozen=True)
class Addressed:
    """Where all tokens of a call read."""

    subkeys: Tensor  # [B, A, H, 2, k] int32
    scores: Tensor  # [B, A, H, 2, k]
    slots: Tensor  # [B, A, H, k]
    ranks: Tensor  # [B, A, H, k] int32: first * k + second, in the two lists
    weights: Tensor  # [B, A, H, k]
    keys: list[Tensor]  # before each step, [S, H, 2, n, h]
    usage: list[Tensor]  # of each written chunk, [S, 2, n]


@dataclass(frozen=True)
class Groups:
    """The written reads of a call by chunk and slot."""

    rows: Tensor  # [G] of the overlay
    starts: Tensor  # [G + 1] in order
    order: Tensor  # [B*P*H*k]
    rate: Tensor  # [G]: -learning rate * scale / N_i
    bounds: list[int]  # the groups of step i are bounds[i] to bounds[i + 1]


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
    queries_of_pairs = _ranges([(s.start, s.pairs) for s in plan.steps], query.device)
    coefficient = write_coefficient(_pairs(at.weights, plan), state.settings.write_rule)
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
    new = _ranges([(s.first + s.length - s.new, s.new) for s in plan.steps], query.device)
    return {
        "retrieved": retrieved,
        "slots": at.slots[:, new],
        "weights": at.weights[:, new],
        "losses": losses,
        "entropy": _entropy(at, state, plan),
    }


def read(state: OverlayState, query: Tensor) -> Tensor:
    """What ``query [B, L, H*key_dim]`` finds, ``[B, L, value_dim]``; nothing is written."""
    require_triton(query.device)
    with torch.cuda.device_of(query):
        return _read_alone(state, query)


def _read_alone(state: OverlayState, query: Tensor) -> Tensor:
    batch, tokens, _ = query.shape
    plan = Plan([Step(0, tokens, own=0, new=tokens, pairs=0, first=0, first_pair=0, first_peek=0)], tokens)
    at = address(state, query.contiguous(), plan)
    row = state.row_of_slot[state.table_slots(at.slots)].flatten(2)
    nothing = query.new_empty((batch, 0, state.value_shape[1]))
    out = query.new_empty((batch, tokens, state.value_shape[1]))
    gate = query.new_ones((batch, tokens))
    outputs = (out, nothing, nothing[..., 0], nothing.unsqueeze(2))
    step = plan.steps[0]
    _read(
        state,
        at,
        row,
        step,
        first_new=0,
        first_target=0,
        outputs=outputs,
        inputs=(nothing, gate),
        record=False,
    )
    return out


@in_phase("address")
def address(state: OverlayState, queries: Tensor, plan: Plan) -> Addressed:
    """Address the chunks of a call in turn, each with the keys that the last one left to it."""
    settings = state.settings
    memories, heads, _, n, _ = state.keys.shape
    shape = (len(queries), plan.addressed, heads, 2, settings.topk)
    subkeys = torch.empty(shape, dtype=torch.int32, device=queries.device)
    scores = torch.empty(shape, dtype=queries.dtype, device=queries.device)
    step_size = key_step(settings, queries) if any(s.own for s in plan.steps) else None
    keys, usage = [], []
    for step in plan.steps:
        keys.append(state.keys)
        nearest_subkeys(
            queries[:, step.start : step.stop],
            state.keys,
            subkeys[:, step.rows],
            scores[:, step.rows],
            inverse_distance=settings.score == "idw",
        )
        if step_size is not None and step.own and settings.addressing_weight:
            usage.append(queries.new_empty((memories, 2, n)))
            state.keys = _move_keys(
                queries, state.keys, scores, subkeys, usage[-1], step_size, step, settings
            )
    slots, ranks, weights = product(scores, subkeys, n, joint=True)
    return Addressed(subkeys, scores, slots, ranks, weights, keys, usage)


def key_step(settings: MemorySettings, like: Tensor) -> Tensor:
    """The step of the keys, for a kernel to load: as a constant, each learning rate would compile again, and
    as a number, Triton would round it to float32."""
    return like.new_full((1,), settings.learning_rate * settings.addressing_weight)


@in_phase("keys")
def _move_keys(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    subkeys: Tensor,
    usage: Tensor,
    step_size: Tensor,
    step: Step,
    settings: MemorySettings,
) -> Tensor:
    """Fill ``usage [S, 2, n]`` from the own tokens of ``step``; the keys after its addressing loss."""
    memories, heads, _, n, half = keys.shape
    batch, addressed = scores.shape[:2]
    first = step.first + step.length - step.own
    block_k = power_of_two(settings.topk)
    block_j, block_t = SOME, max(16, 256 // block_k)
    usage_kernel[(triton.cdiv(n, FEW), 2, memories)](
        scores,
        subkeys,
        usage,
        first,
        step.own,
        addressed,
        batch // memories,
        n,
        HEADS=heads,
        topk=settings.topk,
        BLOCK_J=FEW,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        num_warps=4,
    )
    own = queries[:, step.stop - step.own : step.stop]
    after = torch.empty_like(keys)
    move_keys_kernel[(triton.cdiv(n, block_j), heads * 2, memories)](
        own,
        keys,
        scores,
        subkeys,
        usage,
        step_size,
        after,
        first,
        step.own,
        own.stride(0),
        own.stride(1),
        addressed,
        batch // memories,
        n,
        half,
        HEADS=heads,
        topk=settings.topk,
        INVERSE_DISTANCE=settings.score == "idw",
        BLOCK_J=block_j,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_H=power_of_two(half, 16),
        PRECISION="ieee" if keys.dtype == torch.float64 else "tf32x3",
        num_warps=8,
    )
    return after


@in_phase("group")
def group(state: OverlayState, at: Addressed, plan: Plan, mask: Tensor | None) -> Groups:
    """Sort the written reads of a call by chunk, memory and slot, and claim a row for each slot."""
    settings = state.settings
    device = at.slots.device
    if not plan.pairs and settings.boundary == "carry":  # as while one token after another is decoded
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        none = at.weights.new_empty(0)
        return Groups(nothing, nothing.new_zeros(1), nothing, none, [0] * (len(plan.steps) + 1))
    places = len(state.row_of_slot)
    steps = torch.arange(len(plan.steps), device=device)
    pairs = torch.tensor([s.pairs for s in plan.steps], device=device)
    step_of_pair = steps.repeat_interleave(pairs, output_size=plan.pairs)
    written = state.table_slots(_pairs(at.slots, plan)) + (step_of_pair * places).view(-1, 1, 1)
    distinct, starts, order = group_reads(written)
    bounds = torch.searchsorted(distinct, torch.arange(len(plan.steps) + 1, device=device) * places).tolist()
    slot_places, step = distinct % places, torch.div(distinct, places, rounding_mode="floor")
    touched = torch.unique(slot_places) if len(plan.steps) > 1 else slot_places
    state.claim_rows(touched)
    counts = starts.diff()
    scale = queries_scale(plan, state, mask, at.weights)
    if settings.boundary == "drop":  # the chunk's other reads count too
        peeks = torch.tensor([s.length - s.pairs for s in plan.steps], device=device)
        step_of_peek = steps.repeat_interleave(peeks, output_size=plan.peeks)
        rest = _ranges([(s.first + s.pairs, s.length - s.pairs) for s in plan.steps], device)
        others = state.table_slots(at.slots[:, rest]) + (step_of_peek * places).view(-1, 1, 1)
        others = others.flatten()
        if len(distinct):
            near = torch.searchsorted(distinct, others).clamp_(max=len(distinct) - 1)
            counts = counts.index_add(0, near, (distinct[near] == others).to(counts.dtype))
    memory = torch.div(slot_places, len(state.initial_values), rounding_mode="floor")
    rate = -settings.learning_rate * scale[step, memory] / counts
    rows = state.row_of_slot[slot_places]
    return Groups(rows, starts, order, rate, bounds)


def queries_scale(plan: Plan, state: OverlayState, mask: Tensor | None, like: Tensor) -> Tensor:
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


def _pairs(tokens: Tensor, plan: Plan) -> Tensor:
    """Those of the addressed ``tokens [B, A, ...]`` that are written, ``[B, P, ...]``."""
    return tokens[:, _ranges([(s.first, s.pairs) for s in plan.steps], tokens.device)]


def _ranges(ranges: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    """An index of the numbers of all ``ranges`` of a start and a length, one after another."""
    if len(ranges) == 1:
        start, length = ranges[0]
        return slice(start, start + length)
    parts = [torch.arange(start, start + length) for start, length in ranges]
    return torch.cat(parts).to(device, non_blocking=True)


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
