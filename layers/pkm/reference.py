"""Product key memory as its equations read (arXiv 1907.05242, section 3.2): the oracle of the other files.

Shapes: N tokens, H heads, n sub-keys per half of h features each, k = top-k.
"""

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.kernels.precision import wide_type


def pkm(query: Tensor, keys: Tensor, values: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best k of the k*k pairs of each half's best k sub-keys; their softmax-weighted values, summed.

    Float32 at least; at the end the output is rounded to the type of ``values``, the weights to that of
    ``query``.
    """
    kind = wide_type(query)
    with phase("address"):
        n = keys.shape[2]
        halves = query.to(kind).unflatten(-1, (2, -1))
        scores = torch.einsum("nHch,Hcsh->nHcs", halves, keys.to(kind))
        best, subkeys = scores.topk(topk, dim=-1)  # [N, H, 2, k]
        pairs = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)
        slots = (subkeys[..., 0, :, None] * n + subkeys[..., 1, None, :]).flatten(-2)
        slot_scores, chosen = pairs.topk(topk, dim=-1)
        indices = slots.gather(-1, chosen)
        weights = slot_scores.softmax(-1)
    with phase("read"):
        output = torch.einsum("nHk,nHkd->nd", weights, values[indices].to(kind))
    return output.to(values.dtype), indices, weights.to(query.dtype)
