"""Reading weighted rows of a table on a GPU, and the sums over reads that go back into it.

The sums follow a stable sort of the reads by row, so they have one order and need no float atomics.
Shapes: N tokens with R reads each, E = N*R reads, G groups of reads of the same row, d features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import wide_type
from .triton_support import power_of_two


@triton.jit(do_not_specialize=["tokens"])
def weighted_rows_kernel(
    table, index, weights, out, tokens, reads, features, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``out_t = sum_r weights_tr table[index_tr]``."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    kind = weights.dtype.element_ty
    total = tl.zeros([BLOCK_D], kind)
    for start in range(0, reads, BLOCK_R):
        read = start + tl.arange(0, BLOCK_R)
        row = tl.load(index + token * reads + read, read < reads, 0).to(tl.int64)
        weight = tl.load(weights + token * reads + read, read < reads, 0.0)
        mask = (read < reads)[:, None] & (column < features)[None, :]
        value = tl.load(table + row[:, None] * features + column[None, :], mask, 0.0).to(kind)
        total += tl.sum(weight[:, None] * value, axis=0)
    tl.store(out + token * features + column, total, column < features)


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``sum_r weights_tr table[index_tr]`` ``[N, d]``; table ``[rows, d]``, index and weights ``[N, R]``."""
    tokens, reads = index.shape
    features = table.shape[1]
    out = torch.empty((tokens, features), dtype=weights.dtype, device=table.device)
    block_d = min(power_of_two(features, 16), 512)
    block_r = max(1, min(power_of_two(reads), 4096 // block_d))
    weighted_rows_kernel[(tokens, triton.cdiv(features, block_d))](
        table, index, weights, out, tokens, reads, features, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=[])
def row_dots_kernel(
    table, index, vectors, out, reads, features, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """``out_tr = <table[index_tr], vectors_t>``."""
    token = tl.program_id(0).to(tl.int64)
    read = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    kind = out.dtype.element_ty
    row = tl.load(index + token * reads + read, read < reads, 0).to(tl.int64)
    total = tl.zeros([BLOCK_R], kind)
    for start in range(0, features, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        vector = tl.load(vectors + token * features + column, column < features, 0.0).to(kind)
        mask = (read < reads)[:, None] & (column < features)[None, :]
        value = tl.load(table + row[:, None] * features + column[None, :], mask, 0.0).to(kind)
        total += tl.sum(value * vector[None, :], axis=1)
    tl.store(out + token * reads + read, total, read < reads)


def row_dots(table: Tensor, index: Tensor, vectors: Tensor) -> Tensor:
    """``<table[index_tr], vectors_t>`` ``[N, R]``; table ``[., d]``, index ``[N, R]``, vectors ``[N, d]``."""
    tokens, reads = index.shape
    features = table.shape[1]
    out = torch.empty((tokens, reads), dtype=wide_type(table), device=table.device)
    block_d = min(power_of_two(features, 16), 512)
    block_r = max(1, min(power_of_two(reads), 4096 // block_d))
    row_dots_kernel[(tokens, triton.cdiv(reads, block_r))](
        table, index, vectors, out, reads, features, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=4
    )
    return out


@triton.jit(do_not_specialize=["first"])
def grouped_sum_kernel(
    table,
    rows,
    rate,
    starts,
    order,
    coefficient,
    vectors,
    before,
    first,
    reads,
    features,
    ADD: tl.constexpr,
    RATED: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``table[rows_g] (+)= rate_g sum_(e in g) coefficient_e vectors[e // reads]``, one program a group."""
    group = first + tl.program_id(0)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < features
    kind = table.dtype.element_ty
    begin, end = tl.load(starts + group), tl.load(starts + group + 1)
    total = tl.zeros([BLOCK_D], coefficient.dtype.element_ty)
    for start in range(begin, end, BLOCK_E):
        entry = start + tl.arange(0, BLOCK_E)
        read = tl.load(order + entry, entry < end, 0).to(tl.int64)
        share = tl.load(coefficient + read, entry < end, 0.0)
        mask = (entry < end)[:, None] & inside[None, :]
        vector = tl.load(vectors + (read // reads)[:, None] * features + column[None, :], mask, 0.0)
        total += tl.sum(share[:, None] * vector.to(share.dtype), axis=0)
    if RATED:
        total *= tl.load(rate + group)
    place = table + tl.load(rows + group).to(tl.int64) * features + column
    if ADD:
        old = tl.load(place, inside, 0.0)
        if RECORD:
            tl.store(before + group.to(tl.int64) * features + column, old, inside)
        total += old
    tl.store(place, total.to(kind), inside)


def grouped_sum(
    table: Tensor,
    rows: Tensor,
    starts: Tensor,
    order: Tensor,
    coefficient: Tensor,
    vectors: Tensor,
    *,
    reads: int,
    groups: range | None = None,
    rate: Tensor | None = None,
    before: Tensor | None = None,
    add: bool = True,
) -> None:
    """``table[rows_g] += rate_g * sum_(e in g) coefficient_e vectors[e // reads]`` for each group of reads.

    Args:
        table: ``[rows, d]``, written in place.
        rows: ``[G]``, distinct among ``groups``.
        starts: ``[G + 1]``, where each group begins in ``order``.
        order: ``[E]``, the reads sorted by group.
        coefficient: ``[E]``, in the order of the reads.
        vectors: ``[E / reads, d]``.
        groups: which of them; all by default.
        rate: ``[G]`` or None for 1.
        before: ``[G, d]``, takes the rows as they were.
        add: to what is there, or in its place.
    """
    groups = range(len(rows)) if groups is None else groups
    if not len(groups):
        return
    features = table.shape[1]
    block_d = min(power_of_two(features, 16), 512)
    grouped_sum_kernel[(len(groups), triton.cdiv(features, block_d))](
        table,
        rows,
        starts if rate is None else rate,
        starts,
        order,
        coefficient,
        vectors,
        table if before is None else before,
        groups.start,
        reads,
        features,
        ADD=add,
        RATED=rate is not None,
        RECORD=before is not None,
        BLOCK_E=4,
        BLOCK_D=block_d,
        num_warps=4,
    )


def group_reads(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The reads ``index [...]`` grouped by row: distinct rows ``[G]``, ``starts [G + 1]``, ``order [E]``."""
    ordered, order = index.flatten().sort(stable=True)
    distinct, sizes = torch.unique_consecutive(ordered, return_counts=True)
    starts = torch.zeros(len(sizes) + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(sizes, 0, out=starts[1:])
    return distinct, starts, order
