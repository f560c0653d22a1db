"""The gradients of product-key scores on a GPU: to the queries, and to the sub-keys.

Shapes: N tokens, H heads, n sub-keys per half of h features, k = top-k.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_blocks import spread
from .triton_support import power_of_two


@triton.jit(do_not_specialize=["tokens"])
def subkeys_weighted_kernel(
    pulls,
    subkeys,
    keys,
    out,
    tokens,
    n,
    half,
    topk: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """``out_t = sum_r pulls_tr K[subkeys_tr]``, for each half of each head."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    side, sides = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = token < tokens
    mask = inside[:, None] & (column < half)[None, :]
    kind = out.dtype.element_ty
    total = tl.zeros([BLOCK_T, BLOCK_H], kind)
    for r in range(topk):
        place = (token * sides + side) * topk + r
        row = side.to(tl.int64) * n + tl.load(subkeys + place, inside, 0)
        pull = tl.load(pulls + place, inside, 0.0)
        total += pull[:, None] * tl.load(keys + row[:, None] * half + column[None, :], mask, 0.0).to(kind)
    tl.store(out + (token * sides + side)[:, None] * half + column[None, :], total, mask)


def subkeys_weighted(pulls: Tensor, subkeys: Tensor, keys: Tensor) -> Tensor:
    """``sum_r pulls_tr K[subkeys_tr]`` ``[N, H, 2, h]``; pulls and subkeys ``[N, H, 2, k]``."""
    tokens, heads, _, topk = subkeys.shape
    n, half = keys.shape[2:]
    out = torch.empty((tokens, heads, 2, half), dtype=pulls.dtype, device=pulls.device)
    block_t, block_h = 16, min(power_of_two(half, 16), 128)
    subkeys_weighted_kernel[(triton.cdiv(tokens, block_t), heads * 2, triton.cdiv(half, block_h))](
        pulls, subkeys, keys, out, tokens, n, half, topk=topk, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def subkey_gradients_kernel(
    pulls,
    subkeys,
    query,
    out,
    tokens,
    n,
    half,
    topk: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``out_j = sum_t pulls_tr q_t`` over the tokens that selected sub-key j, as a product of matrices."""
    subkey = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    side, sides = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    rank = tl.arange(0, BLOCK_K)[None, :]
    kind = out.dtype.element_ty
    total = tl.zeros([BLOCK_J, BLOCK_H], kind)
    for start in range(0, tokens, BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        inside = token < tokens
        place = (token * sides + side)[:, None] * topk + rank
        valid = inside[:, None] & (rank < topk)
        pull = tl.load(pulls + place, valid, 0.0)
        chosen = tl.load(subkeys + place, valid, -1)
        mask = inside[:, None] & (column < half)[None, :]
        q = tl.load(query + (token * sides + side)[:, None] * half + column[None, :], mask, 0.0).to(kind)
        total = tl.dot(spread(pull, chosen, subkey), q, total, input_precision=PRECISION, out_dtype=kind)
    row = side.to(tl.int64) * n + subkey
    tl.store(
        out + row[:, None] * half + column[None, :], total, (subkey < n)[:, None] & (column < half)[None, :]
    )


def subkey_gradients(
    pulls: Tensor, subkeys: Tensor, query: Tensor, n: int, precision: str = "tf32x3"
) -> Tensor:
    """``sum_t pulls_tr q_t`` for each sub-key, ``[H, 2, n, h]``.

    Args:
        pulls, subkeys: ``[N, H, 2, k]``.
        query: ``[N, H, 2*h]`` contiguous.
        n: sub-keys per half.
        precision: of the matrix product, see `nearest_subkeys`.
    """
    tokens, heads, _, topk = subkeys.shape
    half = query.shape[-1] // 2
    out = torch.empty((heads, 2, n, half), dtype=pulls.dtype, device=pulls.device)
    block_k = power_of_two(topk)
    block_j, block_t, block_h = 32, max(16, 256 // block_k), min(power_of_two(half, 16), 128)
    subkey_gradients_kernel[(triton.cdiv(n, block_j), heads * 2, triton.cdiv(half, block_h))](
        pulls,
        subkeys,
        query,
        out,
        tokens,
        n,
        half,
        topk=topk,
        BLOCK_J=block_j,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_H=block_h,
        PRECISION="ieee" if out.dtype == torch.float64 else precision,
        num_warps=4,
    )
    return out
