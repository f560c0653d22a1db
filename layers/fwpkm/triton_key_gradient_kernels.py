"""The gradients to queries and keys of a chunk of FwPKM; formulas as in ``addressing.py``.

Shapes: as in ``triton_read_kernels.py``; ``dkeys`` is the running gradient to the keys after the chunk.
"""

import triton
import triton.language as tl

from fwpkm_bench.kernels.triton_blocks import softmax_rows, spread

from .triton_key_kernels import LOG_EPSILON, entropy_slope, own_pull


@triton.jit(do_not_specialize=["first", "own", "addressed"])
def pull_gradient_kernel(
    query,
    keys,
    dkeys,
    scores,
    subkeys,
    step_size,
    dpull,
    first,
    own,
    query_stride,
    token_stride,
    addressed,
    sharers,
    n,
    half_features,
    HEADS: tl.constexpr,
    topk: tl.constexpr,
    INVERSE_DISTANCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``da_tj = -step <q_t - K_j, dK'_j>``, or ``<q_t, dK'_j>`` for the dot product; the own tokens."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    side = tl.program_id(1)
    sequence = tl.program_id(2).to(tl.int64)
    inside = token < own
    rank = tl.arange(0, BLOCK_K)[None, :]
    row = (sequence * addressed + first + token) * (HEADS * 2) + side
    place = row[:, None] * topk + rank
    valid = inside[:, None] & (rank < topk)
    chosen = tl.load(subkeys + place, valid, 0)
    base = (sequence // sharers * HEADS * 2 + side) * n
    kind = dpull.dtype.element_ty
    step = tl.load(step_size)
    found = tl.zeros([BLOCK_T, BLOCK_K], kind)
    for r in range(topk):
        subkey = base + tl.sum(tl.where(rank == r, chosen, 0), axis=1)
        dots = tl.zeros([BLOCK_T], kind)
        for start in range(0, half_features, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            mask = inside[:, None] & (column < half_features)[None, :]
            q_at = query + sequence * query_stride + token[:, None] * token_stride
            q = tl.load(q_at + side * half_features + column[None, :], mask, 0.0).to(kind)
            at = subkey[:, None] * half_features + column[None, :]
            if INVERSE_DISTANCE:
                q -= tl.load(keys + at, mask, 0.0)
            dots += tl.sum(q * tl.load(dkeys + at, mask, 0.0), axis=1)
        found = tl.where(rank == r, -step * dots[:, None], found)
    tl.store(dpull + place, found, valid)


@triton.jit(do_not_specialize=["first", "own", "addressed", "entropy_stride"])
def usage_gradient_kernel(
    scores,
    subkeys,
    usage,
    dpull,
    grad_entropy,
    dusage,
    first,
    own,
    addressed,
    sharers,
    n,
    entropy_stride,
    FROM_ENTROPY: tl.constexpr,
    HEADS: tl.constexpr,
    topk: tl.constexpr,
    INVERSE_DISTANCE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient to ``p_bar``, through the entropy's slope, which pulls the keys, and through the loss."""
    subkey = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    half, memory = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_J], usage.dtype.element_ty)
    for sequence in range(memory * sharers, (memory + 1) * sharers):
        for start in range(0, own, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            valid = (token < own)[:, None] & (rank < topk)
            for head in range(HEADS):
                row = (sequence * addressed + first + token) * HEADS + head
                place = (row * 2 + half)[:, None] * topk + rank
                score = tl.load(scores + place, valid, float("-inf"))
                p = softmax_rows(score, valid)
                da = tl.load(dpull + place, valid, 0.0)
                if INVERSE_DISTANCE:
                    da *= 2 * tl.exp(tl.where(valid, score, 0.0))
                share = p * (da - tl.sum(p * da, axis=1)[:, None])
                total += tl.sum(spread(share, tl.load(subkeys + place, valid, -1), subkey), axis=1)
    base = (memory * 2 + half) * n
    kept = subkey < n
    u = tl.load(usage + base + subkey, kept, 0.0)
    near = u + LOG_EPSILON
    curve = 1.0 / near + 1.0 / (near * near) * LOG_EPSILON
    gradient = total / (own * sharers * HEADS) * curve
    if FROM_ENTROPY:
        gradient += tl.load(grad_entropy + memory * entropy_stride) * entropy_slope(u)
    tl.store(dusage + base + subkey, gradient, kept)


@triton.jit(do_not_specialize=["first", "length", "own", "addressed"])
def query_gradient_kernel(
    query,
    keys,
    dkeys,
    scores,
    subkeys,
    ranks,
    usage,
    dusage,
    dpull,
    dsums,
    step_size,
    dquery,
    pulls,
    first,
    length,
    own,
    query_stride,
    token_stride,
    dquery_stride,
    addressed,
    sharers,
    n,
    half_features,
    MOVED: tl.constexpr,
    HEADS: tl.constexpr,
    topk: tl.constexpr,
    INVERSE_DISTANCE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """From the gradient to the slots' scores to that of the sub-keys' scores, ``ds``, and on to the queries.

    ``dq += sum_j pull_j (q - K_j)`` with ``pull_j = -2 ds_j / (eps + |q - K|^2)``, or ``ds_j K_j`` for the
    dot product; and ``-step sum_j a_j dK'_j`` where the token has moved keys. The pulls are kept.
    """
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    side = tl.program_id(1)
    head, half = side // 2, side % 2
    sequence = tl.program_id(2).to(tl.int64)
    inside = token < length
    rank = tl.arange(0, BLOCK_K)
    row = sequence * addressed + first + token
    place = (row * (HEADS * 2) + side)[:, None] * topk + rank[None, :]
    valid = inside[:, None] & (rank < topk)[None, :]
    score = tl.load(scores + place, valid, float("-inf"))
    inverse = tl.exp(tl.where(valid, score, 0.0))
    of_slot = (row * HEADS + head)[:, None] * topk + rank[None, :]
    dsum = tl.load(dsums + of_slot, valid, 0.0)
    code = tl.load(ranks + of_slot, valid, 0)
    mine = tl.where(half == 0, code // topk, code % topk)
    equal = mine[:, None, :] == rank[None, :, None]
    ds = tl.sum(tl.where(equal, dsum[:, None, :], 0.0), axis=2)
    memory = sequence // sharers
    kind = dsums.dtype.element_ty
    a = tl.zeros([BLOCK_T, BLOCK_K], kind)
    step = tl.load(step_size)
    if MOVED:
        moved = valid & (token >= length - own)[:, None]
        count = own * sharers * HEADS
        base = (memory * 2 + half) * n
        a, which, p, g = own_pull(scores, subkeys, usage, place, moved, base, count, INVERSE_DISTANCE)
        da = tl.load(dpull + place, moved, 0.0)
        if INVERSE_DISTANCE:
            ds += da * a
            da *= 2 * inverse
        mean, drift = tl.sum(p * g, axis=1)[:, None], tl.sum(p * da, axis=1)[:, None]
        dp = da * (g - mean) - drift * g + tl.load(dusage + base + which, moved, 0.0) / count
        ds += p * (dp - tl.sum(p * dp, axis=1)[:, None])
    pull = -2 * ds * inverse if INVERSE_DISTANCE else ds
    tl.store(pulls + place, pull, valid)
    chosen = tl.load(subkeys + place, valid, 0)
    for start in range(0, half_features, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        mask = inside[:, None] & (column < half_features)[None, :]
        q_at = (
            sequence * query_stride + token[:, None] * token_stride + side * half_features + column[None, :]
        )
        q = tl.load(query + q_at, mask, 0.0).to(kind)
        total = tl.zeros([BLOCK_T, BLOCK_H], kind)
        for r in range(topk):
            pick = rank[None, :] == r
            subkey = (memory * HEADS * 2 + side) * n + tl.sum(tl.where(pick, chosen, 0), axis=1)
            at = subkey[:, None] * half_features + column[None, :]
            key = tl.load(keys + at, mask, 0.0)
            own_share = tl.sum(tl.where(pick, pull, 0.0), axis=1)[:, None]
            total += own_share * (q - key) if INVERSE_DISTANCE else own_share * key
            if MOVED:
                total -= (
                    step * tl.sum(tl.where(pick, a, 0.0), axis=1)[:, None] * tl.load(dkeys + at, mask, 0.0)
                )
        out = sequence * dquery_stride + token[:, None] * (HEADS * 2 * half_features)
        out += side * half_features + column[None, :]
        tl.store(dquery + out, total + tl.load(dquery + out, mask, 0.0), mask)


@triton.jit(do_not_specialize=["first", "length", "own", "addressed"])
def key_gradient_kernel(
    query,
    keys,
    dkeys,
    scores,
    subkeys,
    usage,
    pulls,
    step_size,
    out,
    first,
    length,
    own,
    query_stride,
    token_stride,
    addressed,
    sharers,
    n,
    half_features,
    MOVED: tl.constexpr,
    HEADS: tl.constexpr,
    topk: tl.constexpr,
    INVERSE_DISTANCE: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dK_j = dK'_j (1 + step sum_t a_tj) - sum_t pull_tj (q_t - K_j)``, or ``dK'_j + sum_t ds_tj q_t``."""
    subkey = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    side = tl.program_id(1)
    head, half = side // 2, side % 2
    memory = tl.program_id(2).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)[None, :]
    column = tl.arange(0, BLOCK_H)
    features = column < half_features
    kind = pulls.dtype.element_ty
    total = tl.zeros([BLOCK_J, BLOCK_H], kind)
    weight, moved = tl.zeros([BLOCK_J], kind), tl.zeros([BLOCK_J], kind)
    for sequence in range(memory * sharers, (memory + 1) * sharers):
        for start in range(0, length, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = token < length
            row = (sequence * addressed + first + token) * HEADS + head
            place = (row * 2 + half)[:, None] * topk + rank
            valid = inside[:, None] & (rank < topk)
            chosen = tl.load(subkeys + place, valid, -1)
            q_at = sequence * query_stride + token[:, None] * token_stride + side * half_features
            mask = inside[:, None] & features[None, :]
            q = tl.load(query + q_at + column[None, :], mask, 0.0).to(kind)
            pull = spread(tl.load(pulls + place, valid, 0.0), chosen, subkey)
            total = tl.dot(pull, q, total, input_precision=PRECISION, out_dtype=kind)
            if INVERSE_DISTANCE:
                weight += tl.sum(pull, axis=1)
                if MOVED:
                    mine = valid & (token >= length - own)[:, None]
                    base, count = (memory * 2 + half) * n, own * sharers * HEADS
                    a, which, _p, _g = own_pull(scores, subkeys, usage, place, mine, base, count, True)
                    moved += tl.sum(spread(a, which, subkey), axis=1)
    kept = (subkey < n)[:, None] & features[None, :]
    at = ((memory * HEADS * 2 + side) * n + subkey)[:, None] * half_features + column[None, :]
    after = tl.load(dkeys + at, kept, 0.0)
    if INVERSE_DISTANCE:
        total = weight[:, None] * tl.load(keys + at, kept, 0.0) - total
        total += tl.load(step_size) * moved[:, None] * after
    tl.store(out + at, total + after, kept)
