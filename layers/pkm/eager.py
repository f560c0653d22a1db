"""Product key memory in plain torch: addresses in blocks of tokens, one sparse read for all of them.

Shapes: N tokens, H heads, n sub-keys per half of h features each, k = top-k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase
from fwpkm_bench.kernels.precision import wide_type
from fwpkm_bench.kernels.product_key import product_topk

BLOCK = 256  # tokens whose scores exist at a time: 4 MiB at 4 heads of 2 * 512 sub-keys


def pkm(
    query: Tensor, keys: Tensor, values: Tensor, topk: int, sparse_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """One read for all tokens: each read of its own would add a dense gradient of all values."""
    keys = keys.to(wide_type(keys))
    blocks = [_address(block, keys, topk) for block in query.split(BLOCK)]
    indices, weights = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    with phase("read"):
        output = F.embedding_bag(
            indices.flatten(1),
            values,
            per_sample_weights=weights.flatten(1).to(values.dtype),
            mode="sum",
            sparse=sparse_grad and values.requires_grad,
        )
    return output, indices, weights.to(query.dtype)


@in_phase("address")
def _address(query: Tensor, keys: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Slots and weights ``[N, H, k]`` of one block of tokens, in the type of ``keys``."""
    halves = query.to(keys.dtype).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # [H, 2, N, h]
    best, subkeys = (halves @ keys.mT).topk(topk, dim=-1)
    scores, slots, _ = product_topk(best.transpose(1, 2), subkeys.transpose(1, 2), keys.shape[2])
    return slots.transpose(0, 1), scores.softmax(-1).transpose(0, 1)
