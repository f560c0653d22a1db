"""FwPKM in vectorised torch: sparse, in closed form, chunk by chunk.

A chunk touches at most C*H*k rows of the value table. Those rows live in an overlay over the shared
initial table, and both writes are sums over the few places that were read, never a dense gradient.

Shapes: B sequences, S memories (B, or 1 where they share one), L tokens that a chunk reads (the l left
over and its own), P pairs that it writes, H heads, k = top-k, U distinct slots of the P pairs.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench.kernels.phases import phase

from .addressing import Addresses, update_keys
from .overlay import OverlayState, Read
from .reference import write_coefficient


@dataclass(frozen=True)
class Written:
    """The pairs that a chunk writes: their reads grouped by slot, and the errors."""

    rows: Tensor  # [U] rows of the overlay, one for each distinct slot
    group: Tensor  # [B*P*H*k] which of them each read is of, in the order of the tokens
    order: Tensor  # [B*P*H*k] the reads sorted by slot
    starts: Tensor  # [U] where each slot's reads begin in that order
    rate: Tensor  # [U] the step of each slot: learning rate * scale / N_i
    difference: Tensor  # [B, P, value_dim]: v_hat - target
    before: Tensor  # [U, value_dim] the rows before the write; empty unless it is recorded


@dataclass(frozen=True)
class Chunk:
    """One step of a call, as its backward needs it: the tokens of ``at`` end at query ``stop``."""

    stop: int
    new: int  # how many of them, the last ones, came with this call
    own: int  # how many of them, the last ones, are the chunk's own; 0 where nothing was written
    at: Addresses
    keys: Tensor  # before the chunk's write
    written: Written | None
    peek: Read | None


@dataclass
class Tape:
    """The chunks of a call, and how many queries were there before it."""

    waiting: int
    chunks: list[Chunk] = field(default_factory=list)


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
    """Read and write ``[B, T]`` tokens, advancing ``state``; the outputs are those of `reference.run`.

    ``flush`` writes at the end what is pending; ``tape`` records what a backward pass needs.
    """
    settings = state.settings
    batch, tokens, _ = query.shape
    state.reserve(tokens)
    retrieved: list[Tensor] = []
    slots: list[Tensor] = []
    weights: list[Tensor] = []
    losses: list[Tensor] = []
    entropy: list[Tensor] = []
    start = 0
    while start < tokens or (flush and state.pending_tokens):
        stop = min(tokens, start + settings.chunk_size - state.pending_tokens)
        piece = slice(start, stop)
        state.append(query[:, piece], gate[:, piece], target[:, piece])
        full = state.pending_tokens == settings.chunk_size or settings.boundary == "drop"
        if full or (flush and stop == tokens):
            chunk_mask = None if mask is None else mask[:, piece]
            v_hat, at, chunk_losses, chunk_entropy = _write_pending(
                state, stop, stop - start, chunk_mask, tape
            )
            losses.append(chunk_losses)
            entropy.append(chunk_entropy)
        else:
            at = state.address(query[:, piece])
            peek = state.read(at)
            v_hat = peek.v_hat
            if tape is not None:
                tape.chunks.append(Chunk(tape.waiting + stop, stop - start, 0, at, state.keys, None, peek))
        new = slice(v_hat.shape[1] - (stop - start), None)
        retrieved.append(v_hat[:, new])
        slots.append(at.slots[:, new])
        weights.append(at.weights[:, new])
        start = stop
    return {
        "retrieved": _joined(retrieved),
        "slots": _joined(slots),
        "weights": _joined(weights),
        "losses": torch.cat(losses, 1) if losses else gate.new_zeros((batch, 0)),
        "entropy": torch.stack(entropy, 1) if entropy else gate.new_zeros((state.keys.shape[0], 0)),
    }


def read(state: OverlayState, query: Tensor) -> Tensor:
    """What ``query [B, L, H*key_dim]`` finds, ``[B, L, value_dim]``; nothing is written."""
    return state.read(state.address(query)).v_hat


def _write_pending(
    state: OverlayState, stop: int, new: int, mask: Tensor | None, tape: Tape | None
) -> tuple[Tensor, Addresses, Tensor, Tensor]:
    """Read all pending tokens, and the queries left over before them, then write them.

    Returns:
        The reads ``[B, L, value_dim]``, the addresses, the losses ``[B, P]`` of the written pairs and
        the addressing loss of each memory ``[S]``.
    """
    settings = state.settings
    query, gate, target = state.pending()
    length, own = query.shape[1], target.shape[1]
    pairs = max(0, length - settings.lookahead)
    keys = state.keys
    at = state.address(query)
    parts, losses, written, peek = [], gate[:, :0], None, None
    if pairs < length:
        peek = state.read(at.tokens(slice(pairs, None)))
        parts.append(peek.v_hat)
    if pairs:
        scale = gate.new_ones(len(keys))
        if settings.boundary == "drop" and mask is None:
            scale *= own / pairs
        elif settings.boundary == "drop" and mask is not None:  # of each memory's own sequences
            scale = mask[:, :pairs].reshape(len(keys), -1).mean(1)
        read, losses, written = _read_and_write(
            state, at, target[:, own - pairs :], gate[:, :pairs], scale=scale, record=tape is not None
        )
        parts.insert(0, read)
    entropy = gate.new_zeros(len(keys))
    if settings.addressing_weight:
        mine = slice(length - own, None)
        state.keys, entropy = update_keys(query[:, mine], at.tokens(mine), keys, settings)
    if tape is not None:
        tape.chunks.append(Chunk(tape.waiting + stop, new, own, at, keys, written, peek))
    state.keep_last(settings.lookahead if settings.boundary == "carry" else 0)
    return _joined(parts), at, losses, entropy


def _read_and_write(
    state: OverlayState, at: Addresses, target: Tensor, gate: Tensor, *, scale: Tensor, record: bool
) -> tuple[Tensor, Tensor, Written]:
    """Read the first P tokens of a chunk, whose targets ``[B, P, value_dim]`` have come, and write them.

    ``V[i] -= lr * scale * sum_t c_ti e_t / N_i``, a scale for each memory.

    Returns:
        The reads, their losses ``[B, P]`` and what a backward pass needs.
    """
    settings = state.settings
    batch, pairs = gate.shape
    weights = at.weights[:, :pairs]
    per_token = weights.shape[2] * weights.shape[3]
    with phase("group"):
        reads = state.table_slots(at.slots[:, :pairs]).flatten()
        ordered, order = reads.sort(stable=True)  # stable: the sums below have one order
        distinct, sorted_group, sizes = torch.unique_consecutive(
            ordered, return_inverse=True, return_counts=True
        )
        rows = state.claim_rows(distinct)
        group = torch.empty_like(reads)
        group[order] = sorted_group
    with phase("read"):
        v_hat = F.embedding_bag(
            rows[group].view(-1, per_token),
            state.rows,
            mode="sum",
            per_sample_weights=weights.reshape(-1, per_token),
        ).view(batch, pairs, -1)
    with phase("write"):
        difference = v_hat - target
        losses = gate * torch.linalg.vecdot(difference, difference) / difference.shape[-1]

        counts = sizes
        if settings.boundary == "drop":  # the chunk's other reads count too
            others = state.table_slots(at.slots[:, pairs:]).flatten()
            near = torch.searchsorted(distinct, others).clamp_(max=len(distinct) - 1)
            counts = sizes.index_add(0, near, (distinct[near] == others).to(sizes.dtype))
        memory = torch.div(distinct, len(state.initial_values), rounding_mode="floor")
        rate = settings.learning_rate * scale[memory] / counts
        starts = sizes.cumsum(0) - sizes
        coefficient = write_coefficient(weights, settings.write_rule) * gate.view(batch, pairs, 1, 1)
        change = F.embedding_bag(
            torch.div(order, per_token, rounding_mode="floor"),
            difference.view(batch * pairs, -1),
            starts,
            mode="sum",
            per_sample_weights=coefficient.flatten()[order] * -rate[sorted_group],
        )
        before = state.rows.index_select(0, rows) if record else state.rows[:0]
        add_rows(state.rows, rows, change)
    return v_hat, losses, Written(rows, group, order, starts, rate, difference, before)


def add_rows(table: Tensor, rows: Tensor, change: Tensor) -> None:
    """``table[rows] += change``, the rows distinct. On a CPU `index_add_` takes twice as long."""
    table.scatter_add_(0, rows.unsqueeze(-1).expand_as(change), change)


def _joined(parts: list[Tensor]) -> Tensor:
    """``parts [B, ...]`` one after another; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
