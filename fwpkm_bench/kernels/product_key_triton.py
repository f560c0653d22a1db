"""Product-key addressing on a GPU: scores and top-k of each half in one kernel, their product in another.

No score but the selected ones reaches memory. Shapes: B sequences, S memories (B, or fewer that sequences
share), L tokens, H heads, n sub-keys per half of h features, k = top-k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .product_key import staircase
from .triton_blocks import best_of_rows, best_of_two, softmax_rows
from .triton_support import power_of_two

EPSILON: tl.constexpr = tl.constexpr(1e-3)  # of the inverse-distance score


@triton.jit(do_not_specialize=["length"])
def nearest_subkeys_kernel(
    query,
    keys,
    subkeys,
    scores,
    length,
    query_stride,
    token_stride,
    result_stride,
    sharers,
    n,
    half,
    INVERSE_DISTANCE: tl.constexpr,
    topk: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The k best sub-keys of a half for ``BLOCK_T`` tokens, by ``-log(eps + |q - K|^2)`` or ``q.K``.

    The near ones are found by ``2 q.K - |K|^2``, one matrix product, and their scores then computed again
    from ``q - K`` itself: the product cancels where keys are near.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    side, sides = tl.program_id(1), tl.num_programs(1)
    sequence = tl.program_id(2).to(tl.int64)
    inside = token < length
    feature, subkey = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_N)
    kind = scores.dtype.element_ty
    query += sequence * query_stride + side * half + token.to(tl.int64)[:, None] * token_stride
    keys += (sequence // sharers * sides + side) * n * half

    best = tl.full([BLOCK_T, BLOCK_K], float("-inf"), kind)
    index = tl.zeros([BLOCK_T, BLOCK_K], tl.int32)
    for first in range(0, n, BLOCK_N):
        product = tl.zeros([BLOCK_T, BLOCK_N], kind)
        norm = tl.zeros([BLOCK_N], kind)
        row = first + subkey
        for start in range(0, half, BLOCK_H):
            column = start + feature
            q = tl.load(query + column[None, :], inside[:, None] & (column < half)[None, :], 0.0).to(kind)
            mask = (row < n)[None, :] & (column < half)[:, None]
            k = tl.load(keys + row.to(tl.int64)[None, :] * half + column[:, None], mask, 0.0).to(kind)
            product = tl.dot(q, k, product, input_precision=PRECISION, out_dtype=kind)
            norm += tl.sum(k * k, axis=0)
        if INVERSE_DISTANCE:
            product = 2 * product - norm[None, :]
        product = tl.where((row < n)[None, :], product, float("-inf"))
        found, where = best_of_rows(
            product, row[None, :] + tl.zeros_like(product).to(tl.int32), topk, BLOCK_K
        )
        if ONE_BLOCK:
            best, index = found, where
        else:
            best, index = best_of_two(best, index, found, where, topk)
    index = tl.minimum(index, n - 1)  # whatever NaN made of it

    rank = tl.arange(0, BLOCK_K)[None, :]
    if INVERSE_DISTANCE:
        near = tl.arange(0, BLOCK_E)
        exact = tl.zeros([BLOCK_T, BLOCK_K], kind)
        for start in range(0, half, BLOCK_E):
            column = start + near
            mask = inside[:, None] & (column < half)[None, :]
            q = tl.load(query + column[None, :], mask, 0.0).to(kind)
            for r in range(topk):
                row = tl.sum(tl.where(rank == r, index, 0), axis=1).to(tl.int64)
                k = tl.load(keys + row[:, None] * half + column[None, :], mask, 0.0).to(kind)
                part = tl.sum((q - k) * (q - k), axis=1)
                exact += tl.where(rank == r, part[:, None], 0.0)
        exact = tl.where(rank < topk, -tl.log(exact + EPSILON), float("-inf"))
        best, index = best_of_rows(exact, index, topk, BLOCK_K)

    out = sequence * result_stride + (token.to(tl.int64)[:, None] * sides + side) * topk + rank
    kept = inside[:, None] & (rank < topk)
    tl.store(subkeys + out, index, kept)
    tl.store(scores + out, best, kept)


def nearest_subkeys(
    query: Tensor,
    keys: Tensor,
    subkeys: Tensor,
    scores: Tensor,
    *,
    inverse_distance: bool,
    precision: str = "tf32x3",
) -> None:
    """Fill ``subkeys`` (int32) and ``scores``, both ``[B, L, H, 2, k]``, best first.

    Args:
        query: ``[B, L, H*2*h]``; the last dimension contiguous, like those of the results but the first.
        keys: ``[S, H, 2, n, h]`` contiguous.
        inverse_distance: the score, ``-log(eps + |q - K|^2)`` or the dot product.
        precision: of the product that finds them: "tf32", "tf32x3" or "ieee".
    """
    batch, length, heads, _, topk = subkeys.shape
    memories, _, _, n, half = keys.shape
    block_t = 16
    block_n = min(power_of_two(n, 16), 512)
    nearest_subkeys_kernel[(triton.cdiv(length, block_t), heads * 2, batch)](
        query,
        keys,
        subkeys,
        scores,
        length,
        query.stride(0),
        query.stride(1),
        subkeys.stride(0),
        batch // memories,
        n,
        half,
        INVERSE_DISTANCE=inverse_distance,
        topk=topk,
        BLOCK_T=block_t,
        BLOCK_N=block_n,
        BLOCK_H=16,  # 32 need all 255 registers, and spill, at 512 sub-keys
        BLOCK_E=min(power_of_two(half, 16), 128),
        BLOCK_K=power_of_two(topk),
        ONE_BLOCK=n <= block_n,
        PRECISION="ieee" if scores.dtype == torch.float64 else precision,
        num_warps=8,
    )


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    scores,
    subkeys,
    staircase,
    slots,
    ranks,
    weights,
    rows,
    n,
    HEADS: tl.constexpr,
    JOINT: tl.constexpr,
    topk: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """The k best sums of two lists of k, and their softmax over a token's heads (``JOINT``) or each."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)[:, None]
    inside = row < rows
    pair, rank = tl.arange(0, BLOCK_P)[None, :], tl.arange(0, BLOCK_K)[None, :]
    first = tl.load(staircase + 2 * pair, pair < PAIRS, 0)
    second = tl.load(staircase + 2 * pair + 1, pair < PAIRS, 0)
    heads = tl.arange(0, BLOCK_HEADS)[None, :, None]
    found = tl.full([BLOCK_R, BLOCK_HEADS, BLOCK_K], float("-inf"), scores.dtype.element_ty)
    for head in tl.static_range(HEADS):
        base = (row * HEADS + head) * 2 * topk
        mask = inside & (pair < PAIRS)
        sums = tl.load(scores + base + first, mask, float("-inf"))
        sums += tl.load(scores + base + topk + second, mask, float("-inf"))
        best, chosen = best_of_rows(sums, pair + tl.zeros([BLOCK_R, BLOCK_P], tl.int32), topk, BLOCK_K)
        chosen = tl.minimum(chosen, PAIRS - 1)  # whatever NaN made of it
        kept = inside & (rank < topk)
        a, b = tl.load(staircase + 2 * chosen, kept, 0), tl.load(staircase + 2 * chosen + 1, kept, 0)
        slot = tl.load(subkeys + base + a, kept, 0).to(tl.int64) * n
        slot += tl.load(subkeys + base + topk + b, kept, 0)
        out = (row * HEADS + head) * topk + rank
        tl.store(slots + out, slot, kept)
        tl.store(ranks + out, a * topk + b, kept)
        found = tl.where(heads == head, best[:, None, :], found)
    width: tl.constexpr = BLOCK_HEADS * BLOCK_K
    place = tl.arange(0, width)[None, :]
    valid = (place // BLOCK_K < HEADS) & (place % BLOCK_K < topk)
    flat = tl.reshape(found, [BLOCK_R, width])
    if JOINT:
        share = softmax_rows(flat, valid & inside)
    else:
        share = tl.zeros_like(flat)
        for head in tl.static_range(HEADS):
            mine = valid & (place // BLOCK_K == head)
            share = tl.where(mine, softmax_rows(flat, mine & inside), share)
    out = (row * HEADS + place // BLOCK_K) * topk + place % BLOCK_K
    tl.store(weights + out, share, valid & inside)


def product(scores: Tensor, subkeys: Tensor, n: int, *, joint: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The best k slots of each head of a token and their weights.

    Args:
        scores, subkeys: ``[..., H, 2, k]`` contiguous, best first.
        n: sub-keys per half.
        joint: one softmax over the ``H*k`` slots of a token, or one for each head.

    Returns:
        Slots ``[..., H, k]`` int64, best first; the ranks in the two lists that each came from, int32
        ``first * k + second``; and the weights.
    """
    heads, _, topk = scores.shape[-3:]
    rows = scores.numel() // (heads * 2 * topk)
    shape = (*scores.shape[:-2], topk)
    slots = torch.empty(shape, dtype=torch.int64, device=scores.device)
    ranks = torch.empty(shape, dtype=torch.int32, device=scores.device)
    weights = torch.empty(shape, dtype=scores.dtype, device=scores.device)
    pairs = staircase(topk, scores.device)
    block_p = power_of_two(len(pairs))
    block_r = max(1, min(16, 2048 // block_p, 4096 // power_of_two(heads * topk)))
    product_kernel[(triton.cdiv(rows, block_r),)](
        scores,
        subkeys,
        pairs,
        slots,
        ranks,
        weights,
        rows,
        n,
        HEADS=heads,
        JOINT=joint,
        topk=topk,
        PAIRS=len(pairs),
        BLOCK_R=block_r,
        BLOCK_P=block_p,
        BLOCK_K=power_of_two(topk),
        BLOCK_HEADS=power_of_two(heads),
        num_warps=4,
    )
    return slots, ranks, weights
