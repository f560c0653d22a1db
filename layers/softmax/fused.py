"""Causal softmax attention through one kernel of torch's that the user chose, never another.

Shapes: B sequences, T queries, S >= T keys, H query heads, G key heads, Dk key and Dv value features a head.
"""

from functools import partial

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import eager

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
    group = q.shape[2] // k.shape[2]
    if kernel == "efficient" and group > 1:  # it has no grouped heads
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    with sdpa_kernel(KERNELS[kernel]):
        if seq > 1 and past and (kernel == "cudnn" or q.device.type == "cpu"):  # they have no such mask
            return eager.softmax_attention(q, k, v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, T, D]
        mask = None
        if seq > 1 and past:
            from torch.nn.attention.bias import causal_lower_right  # brings the compiler along: a second

            mask = causal_lower_right(seq, past + seq)
        causal, shared = seq > 1 and not past, q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)
    return out.transpose(1, 2)


IMPLEMENTATIONS = {name: partial(softmax_attention, kernel=name) for name in KERNELS}
