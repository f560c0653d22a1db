"""Linear attention by the Triton kernels of flash-linear-attention, the field's own; CUDA alone.

Shapes: B sequences, T tokens, H heads, Dk key and Dv value features a head.
"""

from torch import Tensor

from fwpkm_bench.kernels import fla_support


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, memory: Tensor, normaliser: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Their chunked kernel with its normaliser; q, k and v in the type that they come in.

    Raises:
        NotImplementedError: an fla-core before 0.6, which hands back no sum of the keys.
    """
    fla_support.require_fla(q.device)
    from fla.ops.linear_attn import chunk_linear_attn

    initial = (memory, normaliser.unsqueeze(1))
    output, final = chunk_linear_attn(q, k, v, initial_state=initial, output_final_state=True, normalize=True)
    if not isinstance(final, tuple):
        raise NotImplementedError("backend 'fla' needs fla-core 0.6, which returns the sum of the keys")
    return output, final[0], final[1].squeeze(1)
