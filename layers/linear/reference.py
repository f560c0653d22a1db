"""Linear attention as its equations read (arXiv 2006.16236, eq. 18-20): the oracle of the other files.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head.
"""

import torch
from torch import Tensor


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One token after the other: add its key and value, read, divide by the weight of all keys so far."""
    outputs = []
    for t in range(q.shape[1]):
        memory = memory + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        normaliser = normaliser + k[:, t]
        read = torch.einsum("bhkv,bhk->bhv", memory, q[:, t])
        weight = torch.einsum("bhk,bhk->bh", normaliser, q[:, t])
        outputs.append(read / weight[..., None])
    return torch.stack(outputs, dim=1), memory, normaliser
