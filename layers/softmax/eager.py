"""Causal softmax attention through torch's fused kernel, which never holds the T x S scores.

Shapes: B sequences, T queries, S >= T keys, H query heads, G key heads, Dk key and Dv value features a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # queries that share a mask when a piece follows earlier tokens


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One fused call, except for a piece of a sequence: the kernel aligns its own causal mask with the
    first key, not the last, so a piece goes through in blocks of queries, each with an explicit mask."""
    seq, past = q.shape[1], k.shape[1] - q.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    if seq == 1 or past == 0:
        return _attend(q, k, v, causal=seq > 1).transpose(1, 2)
    outputs = []
    for start in range(0, seq, BLOCK):
        stop = min(start + BLOCK, seq)
        mask = torch.ones(stop - start, past + stop, dtype=torch.bool, device=q.device).tril(past + start)
        seen_k, seen_v = k[:, :, : past + stop], v[:, :, : past + stop]
        outputs.append(_attend(q[:, :, start:stop], seen_k, seen_v, mask=mask))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *, mask: Tensor | None = None) -> Tensor:
    shared = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
