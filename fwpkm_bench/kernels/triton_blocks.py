"""What the kernels are made of: pieces of Triton that work on blocks in registers.

Shapes: R rows of W values, k = top-k, K = k rounded up to a power of two.
"""

import triton
import triton.language as tl


@triton.jit
def best_of_rows(values, index, topk: tl.constexpr, BLOCK_K: tl.constexpr):
    """The ``topk`` largest of each row of ``values [R, W]``, best first, the left one of equals.

    Returns values and ``index [R, W]`` of them, both ``[R, BLOCK_K]``; beyond ``topk``, -inf and 0.
    """
    column = tl.arange(0, values.shape[1])[None, :]
    rank = tl.arange(0, BLOCK_K)[None, :]
    best = tl.full([values.shape[0], BLOCK_K], float("-inf"), values.dtype)
    chosen = tl.zeros([values.shape[0], BLOCK_K], index.dtype)
    for r in range(topk):
        top, place = tl.max(values, axis=1, return_indices=True)
        hit = column == place[:, None]
        best = tl.where(rank == r, top[:, None], best)
        chosen = tl.where(rank == r, tl.sum(tl.where(hit, index, 0), axis=1)[:, None], chosen)
        values = tl.where(hit, float("-inf"), values)
    return best, chosen


@triton.jit
def best_of_two(first, first_index, second, second_index, topk: tl.constexpr):
    """The ``topk`` largest of two lists ``[R, K]`` a row, best first; of equals the first list's."""
    rank = tl.arange(0, first.shape[1])[None, :]
    best = tl.full(first.shape, float("-inf"), first.dtype)
    chosen = tl.zeros(first.shape, first_index.dtype)
    for r in range(topk):
        a, a_place = tl.max(first, axis=1, return_indices=True)
        b, b_place = tl.max(second, axis=1, return_indices=True)
        from_first = (a >= b)[:, None]
        a_hit = (rank == a_place[:, None]) & from_first
        b_hit = (rank == b_place[:, None]) & (from_first == 0)
        picked = tl.sum(tl.where(a_hit, first_index, 0) + tl.where(b_hit, second_index, 0), axis=1)
        best = tl.where(rank == r, tl.maximum(a, b)[:, None], best)
        chosen = tl.where(rank == r, picked[:, None], chosen)
        first = tl.where(a_hit, float("-inf"), first)
        second = tl.where(b_hit, float("-inf"), second)
    return best, chosen


@triton.jit
def softmax_rows(values, inside):
    """The softmax of each row of ``values [R, W]`` over where it is ``inside``; 0 elsewhere."""
    top = tl.max(tl.where(inside, values, float("-inf")), axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    power = tl.where(inside, tl.exp(values - top[:, None]), 0.0)
    total = tl.sum(power, axis=1)
    return power / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def spread(coefficient, index, places):
    """The matrix ``[J, R]`` of what each row gives each place: its coefficients where ``index`` is the place.

    ``coefficient, index [R, K]``, ``places [J]``; comparisons, so that sums over rows need no atomics.
    """
    equal = places[:, None, None] == index[None, :, :]
    return tl.sum(tl.where(equal, coefficient[None, :, :], 0.0), axis=2)
