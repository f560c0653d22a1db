"""The gated delta rule as its equations read (arXiv 2412.06464, eq. 10): the oracle of the other files.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head.
"""

import torch
from torch import Tensor


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token after the other: forget, correct what the key recalls, read."""
    scale = q.shape[-1] ** -0.5
    outputs = []
    for t in range(q.shape[1]):
        state = log_decay[:, t, :, None, None].exp() * state
        recalled = torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        correction = beta[:, t, :, None] * (v[:, t] - recalled)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], correction)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * scale)
    return torch.stack(outputs, dim=1), state
