"""Product keys: the best k of n*n slots from two short lists (arXiv 1907.05242, section 3.2).

Shapes: n sub-keys per half, k = top-k; a slot's score is the sum of its two sub-keys' scores.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def staircase(topk: int, device: torch.device) -> Tensor:
    """The pairs (a, b) of ranks that can be among the best ``topk`` sums of two descending lists, ``[P, 2]``.

    Rank pair (a, b) is beaten by the (a+1)(b+1)-1 pairs above and left of it, so only those with
    (a+1)(b+1) <= topk count: 20 of 64 for k = 8, 119 of 1,024 for k = 32.
    """
    pairs = [(a, b) for a in range(topk) for b in range(topk // (a + 1))]
    with torch.inference_mode(False):  # the tensor outlives the mode it was first asked for in
        return torch.tensor(pairs, device=device)


def product_topk(scores: Tensor, indices: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best k slots of the product of two descending lists of k sub-keys each.

    Args:
        scores: ``[..., 2, k]``, each half's best scores, best first.
        indices: ``[..., 2, k]`` int64, the sub-keys that they belong to.
        n: sub-keys per half.

    Returns:
        Slot scores ``[..., k]``, best first; slot indices ``[..., k]`` int64, ``i1 * n + i2``; and the
        ranks ``[..., 2, k]`` in the two lists that each slot came from.
    """
    topk = scores.shape[-1]
    pairs = staircase(topk, scores.device)
    first, second = pairs.unbind(1)
    sums = scores[..., 0, :].index_select(-1, first) + scores[..., 1, :].index_select(-1, second)
    best, pair = sums.topk(topk, dim=-1)
    ranks = pairs[pair].transpose(-1, -2)
    first, second = indices.gather(-1, ranks).unbind(-2)
    return best, torch.add(second, first, alpha=n), ranks
