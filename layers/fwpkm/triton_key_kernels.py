"""How FwPKM's keys move: the use of the sub-keys, and the step of the addressing loss (eq. 17).

Shapes: as in ``triton_read_kernels.py``.
"""

import triton
import triton.language as tl

from fwpkm_bench.kernels.triton_blocks import softmax_rows, spread

LOG_EPSILON: tl.constexpr = tl.constexpr(1e-8)  # of the addressing loss


@triton.jit
def entropy_slope(usage):
    """``d(u log(u + eps)) / du``."""
    return tl.log(usage + LOG_EPSILON) + usage / (usage + LOG_EPSILON)


@triton.jit(do_not_specialize=["first", "own", "addressed"])
def usage_kernel(
    scores,
    subkeys,
    usage,
    first,
    own,
    addressed,
    sharers,
    n,
    HEADS: tl.constexpr,
    topk: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``p_bar_j``, the mean over own tokens and heads of the softmax of their selected scores (eq. 17)."""
    subkey = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    half, memory = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_J], usage.dtype.element_ty)
    for sequence in range(memory * sharers, (memory + 1) * sharers):
        for start in range(0, own, BLOCK_T):
            token = start + tl.arange(0, BLOCK_T)
            valid = (token < own)[:, None] & (rank < topk)
            for head in range(HEADS):
                row = (sequence * addressed + first + token).to(tl.int64) * HEADS + head
                place = (row * 2 + half)[:, None] * topk + rank
                share = softmax_rows(tl.load(scores + place, valid, float("-inf")), valid)
                chosen = tl.load(subkeys + place, valid, -1)
                total += tl.sum(spread(share, chosen, subkey), axis=1)
    tl.store(usage + (memory * 2 + half) * n + subkey, total / (own * sharers * HEADS), subkey < n)


@triton.jit
def own_pull(scores, subkeys, usage, place, valid, usage_base, tokens, INVERSE_DISTANCE: tl.constexpr):
    """How strongly tokens move the sub-keys that they selected: ``a [T, K]``, and those sub-keys.

    ``a = p (g - sum_i p_i g_i) * 2 / (eps + |q - K|^2)`` with ``g`` the slope of the entropy over the count
    of tokens; without the last factor for the dot product.
    """
    score = tl.load(scores + place, valid, float("-inf"))
    chosen = tl.load(subkeys + place, valid, -1)
    p = softmax_rows(score, valid)
    g = tl.where(valid, entropy_slope(tl.load(usage + usage_base + chosen, valid, 0.0)), 0.0) / tokens
    a = p * (g - tl.sum(p * g, axis=1)[:, None])
    if INVERSE_DISTANCE:
        a *= 2 * tl.exp(tl.where(valid, score, 0.0))
    return a, chosen, p, g


@triton.jit(do_not_specialize=["first", "own", "addressed"])
def move_keys_kernel(
    query,
    keys,
    scores,
    subkeys,
    usage,
    step_size,
    out,
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
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``K_j - step * sum_t a_tj (q_t - K_j)``, or ``a_tj q_t`` for the dot product; of the own tokens."""
    subkey = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    head, half = tl.program_id(1) // 2, tl.program_id(1) % 2
    memory = tl.program_id(2).to(tl.int64)
    rank = tl.arange(0, BLOCK_K)[None, :]
    column = tl.arange(0, BLOCK_H)
    features = column < half_features
    kind = usage.dtype.element_ty
    total = tl.zeros([BLOCK_J, BLOCK_H], kind)
    weight = tl.zeros([BLOCK_J], kind)
    for sequence in range(memory * sharers, (memory + 1) * sharers):
        for start in range(0, own, BLOCK_T):
            token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            inside = token < own
            row = (sequence * addressed + first + token) * HEADS + head
            place = (row * 2 + half)[:, None] * topk + rank
            valid = inside[:, None] & (rank < topk)
            a, chosen, _p, _g = own_pull(
                scores,
                subkeys,
                usage,
                place,
                valid,
                (memory * 2 + half) * n,
                own * sharers * HEADS,
                INVERSE_DISTANCE,
            )
            q_at = query + sequence * query_stride + token[:, None] * token_stride
            q_at += (head * 2 + half) * half_features + column[None, :]
            q = tl.load(q_at, inside[:, None] & features[None, :], 0.0).to(kind)
            pulls = spread(a, chosen, subkey)
            total = tl.dot(pulls, q, total, input_precision=PRECISION, out_dtype=kind)
            weight += tl.sum(pulls, axis=1)
    mask = (subkey < n)[:, None] & features[None, :]
    row = (memory * HEADS * 2 + tl.program_id(1)) * n + subkey
    place = row[:, None] * half_features + column[None, :]
    old = tl.load(keys + place, mask, 0.0)
    if INVERSE_DISTANCE:
        total -= weight[:, None] * old
    tl.store(out + place, old - tl.load(step_size) * total, mask)
