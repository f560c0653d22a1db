"""Causal softmax attention through one kernel of torch's that the user chose, never another.

Shapes: B sequences, T queries, S >= T keys, H query heads, G key heads, Dk key and Dv value features a head.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ON_CPU = ("flash",)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, kernel: str) -> Tensor:
    """`F.scaled_dot_product_attention` with ``kernel`` of `KERNELS`.

    Raises:
        NotImplementedError: the kernel does not run on this device.
        RuntimeError: it does not take these shapes or this type, by torch's own word.
    """
    if q.device.type == "cpu" and kernel not in ON_CPU:
        raise NotImplementedError(f"backend {kernel!r} runs on a CUDA device, not on cpu")
    seq, past = q.shape[1], k.shape[1] - q.shape[1]
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
    with sdpa_kernel(KERNELS[kernel]):
        if seq == 1 or past == 0:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=seq > 1, enable_gqa=shared)
        else:
            mask = _ending_with_the_last_key(seq, past, q.device)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)
    return out.transpose(1, 2)


def _ending_with_the_last_key(seq: int, past: int, device: torch.device) -> Tensor:
    """The causal mask of a piece; on a GPU by name, so that no kernel has to read one."""
    if device.type == "cpu":
        return torch.ones(seq, past + seq, dtype=torch.bool).tril(past)
    from torch.nn.attention.bias import causal_lower_right  # brings the compiler along, which takes a second

    return causal_lower_right(seq, past + seq)


IMPLEMENTATIONS = {name: partial(softmax_attention, kernel=name) for name in KERNELS}
