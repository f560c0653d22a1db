"""Causal softmax attention as its equation reads (arXiv 1706.03762, eq. 1): the oracle of the other files.

Shapes: B sequences, T queries, S >= T keys, H query heads, G key heads, Dk key and Dv value features a head.
"""

import torch
from torch import Tensor

from fwpkm_bench.kernels.precision import full_precision, wide_type


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each query weighs every key up to its own; in float32 at least, rounded at the end."""
    group, kind = q.shape[2] // k.shape[2], v.dtype
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    q, k, v = (x.to(wide_type(x)) for x in (q, k, v))
    with full_precision(q.device.type):
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).to(kind)
