"""FwPKM in vectorised torch: sparse, in closed form, chunk by chunk.

A chunk touches at most C*H*k rows of the value table. Those rows live in an overlay over the shared
initial table, and both writes are sums over the few places that were read, never a dense gradient.

Shapes: B sequences, S memories (B, or 1 where they share one), L tokens of a chunk, C chunk size,
H heads, n sub-keys per half, h = key_dim / 2, k = top-k, l lookahead, U distinct slots of a chunk.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench.kernels.product_key import product_topk

from .reference import EPSILON, LOG_EPSILON, write_coefficient
from .settings import MemorySettings
from .state import EagerState

CLOSE = 1 / 16  # squared distances under this share of |q|^2 + |K|^2 are computed again, without cancellation


@dataclass(frozen=True)
class Addresses:
    """Where the tokens of a chunk read."""

    subkeys: Tensor  # [B, L, H, 2, k]
    scores: Tensor  # [B, L, H, 2, k]: of those sub-keys, best first
    slots: Tensor  # [B, L, H, k]: within the memory of the sequence
    weights: Tensor  # [B, L, H, k]


def address(query: Tensor, keys: Tensor, settings: MemorySettings) -> Addresses:
    """The slots and weights of ``query [B, L, H*key_dim]`` under ``keys [S, H, 2, n, h]``.

    The nearest sub-keys are found by one matrix product, ``|q - K|^2 = |q|^2 + |K|^2 - 2 q.K``.
    """
    batch, length, _ = query.shape
    memories, heads, _, n, h = keys.shape
    per_memory = batch // memories * length
    q = query.reshape(memories, per_memory, heads, 2, h).permute(0, 2, 3, 1, 4).reshape(-1, per_memory, h)
    k = keys.view(-1, n, h)
    if settings.score == "idw":
        key_norms = k.square().sum(-1)
        partial = torch.bmm(q, -2 * k.transpose(1, 2)).add_(key_norms.unsqueeze(1))
        nearest, subkeys = partial.topk(settings.topk, dim=-1, largest=False)
        query_norms = q.square().sum(-1, keepdim=True)
        distance = nearest + query_norms
        close = distance < CLOSE * (query_norms + key_norms.gather(1, subkeys.flatten(1)).view_as(nearest))
        if close.any():
            pair, token, rank = close.nonzero(as_tuple=True)
            exact = (q[pair, token] - k[pair, subkeys[pair, token, rank]]).square().sum(-1)
            distance[pair, token, rank] = exact
            distance, order = distance.sort(dim=-1)
            subkeys = subkeys.gather(-1, order)
        scores = -torch.log(EPSILON + distance)
    else:
        scores, subkeys = torch.bmm(q, k.transpose(1, 2)).topk(settings.topk, dim=-1)

    def by_token(t: Tensor) -> Tensor:  # [S*H*2, B/S*L, k] -> [B, L, H, 2, k]
        t = t.view(memories, heads, 2, per_memory, -1).permute(0, 3, 1, 2, 4)
        return t.reshape(batch, length, heads, 2, -1)

    scores, subkeys = by_token(scores), by_token(subkeys)
    slot_scores, slots, _ = product_topk(scores, subkeys, n)
    weights = slot_scores.flatten(-2).softmax(-1).view_as(slot_scores)
    return Addresses(subkeys, scores, slots, weights)


def update_keys(
    query: Tensor, at: Addresses, keys: Tensor, settings: MemorySettings
) -> tuple[Tensor, Tensor]:
    """One step of the addressing loss (eq. 17) in closed form.

    Only the C*k selected scores of a half carry gradient: with ``p`` their softmax and ``G`` the
    gradient of the entropy to ``p_bar``, ``ds = p * (G - sum_j p_j G_j) / (C*H)``, and
    ``ds/dK = 2 (q - K) / (eps + |q - K|^2)`` for the inverse distance, ``q`` for the dot product.

    Returns:
        The keys ``[S, H, 2, n, h]`` after the step, and the loss of each memory ``[S]``.
    """
    memories, heads, _, n, h = keys.shape
    batch, length = query.shape[:2]
    tokens = batch // memories * length * heads
    p = at.scores.softmax(-1)
    memory = torch.arange(batch, device=query.device) // (batch // memories)
    half = memory.view(-1, 1, 1, 1, 1) * 2 + torch.arange(2, device=query.device).view(2, 1)
    place = half * n + at.subkeys  # [B, L, H, 2, k] into [S, 2, n]
    usage = torch.zeros(memories * 2 * n, dtype=p.dtype, device=p.device)
    usage = usage.index_add_(0, place.flatten(), p.flatten()).div_(tokens)
    log_usage = torch.log(usage + LOG_EPSILON)
    loss = (usage * log_usage).view(memories, -1).sum(-1)
    gradient = (log_usage + usage / (usage + LOG_EPSILON))[place] / tokens
    score_gradient = p * (gradient - (p * gradient).sum(-1, keepdim=True))
    if settings.score == "idw":
        score_gradient = score_gradient * (2 * at.scores.exp())  # exp(score) = 1 / (eps + |q - K|^2)

    head = torch.arange(heads, device=query.device).view(-1, 1, 1)
    row = (
        (memory.view(-1, 1, 1, 1, 1) * heads + head) * 2 + torch.arange(2, device=query.device).view(2, 1)
    ) * n
    row = (row + at.subkeys).flatten()  # into [S*H*2*n] rows of keys
    ordered, order = row.sort()
    starts = torch.searchsorted(ordered, torch.arange(memories * heads * 2 * n, device=row.device))
    coefficient = score_gradient.flatten()[order]
    pulled = F.embedding_bag(
        order // settings.topk, query.reshape(-1, h), starts, mode="sum", per_sample_weights=coefficient
    )
    if settings.score == "idw":
        total = torch.zeros(len(pulled), dtype=p.dtype, device=p.device)
        total.index_add_(0, row, score_gradient.flatten())
        pulled -= total.unsqueeze(-1) * keys.view(-1, h)
    step = settings.learning_rate * settings.addressing_weight
    return keys - step * pulled.view_as(keys), loss * settings.addressing_weight


@dataclass(frozen=True)
class Grouped:
    """The reads of the pairs that are written together, grouped by slot."""

    places: Tensor  # [U] the distinct slots, ascending, as places in the table
    rows: Tensor  # [U] their rows in the overlay
    row_of_read: Tensor  # [reads] in the order of the tokens
    order: Tensor  # [reads] reads sorted by slot
    sizes: Tensor  # [U] how many reads each slot has


def group_reads(state: EagerState, slots: Tensor) -> Grouped:
    """Sort the reads ``slots [B, P, H, k]`` by slot, and give every slot among them a row of the overlay."""
    reads = state.table_slots(slots).flatten()
    ordered, order = reads.sort(stable=True)  # stable: the sums below have one order
    places, group, sizes = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    rows = state.claim_rows(places)
    row_of_read = torch.empty_like(reads)
    row_of_read[order] = rows[group]
    return Grouped(places, rows, row_of_read, order, sizes)


def write_values(
    state: EagerState, grouped: Grouped, weights: Tensor, error: Tensor, *, unpaired: Tensor, scale: float
) -> None:
    """``V[i] -= lr * scale * sum_t c_ti e_t / N_i`` over the pairs that were grouped.

    ``weights [B, P, H, k]``, ``error [B, P, value_dim]``; ``unpaired [B, L - P, H, k]`` are the slots that
    the rest of the chunk read, which count in ``N_i`` where the boundary drops pairs.
    """
    settings = state.settings
    per_token = weights.shape[2] * weights.shape[3]
    counts = grouped.sizes
    if settings.boundary == "drop":
        others = state.table_slots(unpaired).flatten()
        at = torch.searchsorted(grouped.places, others).clamp_(max=len(counts) - 1)
        counts = counts.index_add(0, at, (grouped.places[at] == others).to(counts.dtype))
    change = F.embedding_bag(
        torch.div(grouped.order, per_token, rounding_mode="floor"),
        error.reshape(-1, error.shape[-1]),
        grouped.sizes.cumsum(0) - grouped.sizes,
        mode="sum",
        per_sample_weights=write_coefficient(weights, settings.write_rule).flatten()[grouped.order],
    )
    change /= counts.unsqueeze(-1)
    state.rows.index_add_(0, grouped.rows, change, alpha=-settings.learning_rate * scale)


def run(
    state: EagerState, query: Tensor, target: Tensor, gate: Tensor, mask: Tensor | None
) -> tuple[EagerState, dict[str, Tensor]]:
    """Read and write ``[B, T]`` tokens; ``state`` is advanced in place. The outputs are `reference.run`'s."""
    settings = state.settings
    batch, tokens, _ = query.shape
    state.reserve(tokens)
    retrieved = torch.empty_like(target)
    slots = torch.empty((batch, tokens, state.heads, settings.topk), dtype=torch.int64, device=query.device)
    weights = torch.empty(slots.shape, dtype=query.dtype, device=query.device)
    losses: list[Tensor] = []
    entropy: list[Tensor] = []
    start = 0
    while start < tokens:
        pending = state.pending_tokens
        stop = min(tokens, start + settings.chunk_size - pending)
        piece = slice(start, stop)
        fills = stop - start + pending == settings.chunk_size or settings.boundary == "drop"
        state.append(query[:, piece], gate[:, piece], target[:, piece])
        if fills:
            chunk_mask = None if mask is None else mask[:, piece]
            v_hat, at, chunk_losses, chunk_entropy = write_pending(state, chunk_mask)
            new = slice(v_hat.shape[1] - (stop - start), None)
            retrieved[:, piece] = v_hat[:, new]
            slots[:, piece], weights[:, piece] = at.slots[:, new], at.weights[:, new]
            losses.append(chunk_losses)
            entropy.append(chunk_entropy)
        else:
            at = address(query[:, piece], state.keys, settings)
            retrieved[:, piece] = state.read(at.slots, at.weights)
            slots[:, piece], weights[:, piece] = at.slots, at.weights
        start = stop
    return state, {
        "retrieved": retrieved,
        "slots": slots,
        "weights": weights,
        "losses": torch.cat(losses, 1) if losses else gate[:, :0],
        "entropy": torch.stack(entropy, 1) if entropy else gate.new_zeros((len(state.keys), 0)),
    }


def write_pending(state: EagerState, mask: Tensor | None) -> tuple[Tensor, Addresses, Tensor, Tensor]:
    """Read all pending tokens, and the queries left over before them, then write them.

    Returns:
        The reads ``[B, L, value_dim]``, the addresses, the losses ``[B, P]`` of the written pairs and
        the addressing loss of each memory ``[S]``.
    """
    settings = state.settings
    query, gate, target = state.pending()
    length, own = query.shape[1], target.shape[1]
    pairs = max(0, length - settings.lookahead)
    at = address(query, state.keys, settings)
    parts, losses = [], gate[:, :0]
    if pairs < length:
        parts.append(state.read(at.slots[:, pairs:], at.weights[:, pairs:]))
    if pairs:
        read, losses = _read_and_write(state, at, target[:, own - pairs :], gate[:, :pairs], mask)
        parts.insert(0, read)
    v_hat = torch.cat(parts, 1)
    entropy = gate.new_zeros(len(state.keys))
    if settings.addressing_weight:
        mine = slice(length - own, None)
        own_at = Addresses(at.subkeys[:, mine], at.scores[:, mine], at.slots[:, mine], at.weights[:, mine])
        state.keys, entropy = update_keys(query[:, mine], own_at, state.keys, settings)
    state.keep_last(settings.lookahead if settings.boundary == "carry" else 0)
    return v_hat, at, losses, entropy


def _read_and_write(
    state: EagerState, at: Addresses, target: Tensor, gate: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For the first P tokens of a chunk, whose targets ``[B, P, value_dim]`` have come: reads and losses."""
    batch, pairs = gate.shape
    slots, weights = at.slots[:, :pairs], at.weights[:, :pairs]
    per_token = slots.shape[2] * slots.shape[3]
    grouped = group_reads(state, slots)
    v_hat = F.embedding_bag(
        grouped.row_of_read.view(-1, per_token),
        state.rows,
        mode="sum",
        per_sample_weights=weights.reshape(-1, per_token),
    ).view(batch, pairs, -1)
    difference = v_hat - target
    losses = gate * difference.square().mean(-1)
    scale = 1.0
    if state.settings.boundary == "drop":
        written = batch * state.pending_tokens if mask is None else float(mask[:, :pairs].sum())
        scale = written / (batch * pairs)
    error = difference.mul_(gate.unsqueeze(-1))
    write_values(state, grouped, weights, error, unpaired=at.slots[:, pairs:], scale=scale)
    return v_hat, losses
