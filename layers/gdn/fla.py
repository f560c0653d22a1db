"""The gated delta rule by the Triton kernels of flash-linear-attention, the field's own; CUDA alone.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head.
"""

import torch
from torch import Tensor

from fwpkm_bench.kernels import fla_support


def gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunks for a sequence, their recurrent kernel for one token; q, k and v keep their type."""
    fla_support.require_fla(q.device)
    from fla.ops import gated_delta_rule as ops

    one = q.shape[1] == 1 and not torch.is_grad_enabled()  # their recurrent kernel has no backward
    run = ops.fused_recurrent_gated_delta_rule if one else ops.chunk_gated_delta_rule
    output, after = run(q, k, v, g=log_decay, beta=beta, initial_state=state, output_final_state=True)
    return output, after
