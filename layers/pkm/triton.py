"""Product key memory in Triton kernels: addresses, one weighted read, and the backward of both.

Shapes: N tokens, H heads, n sub-keys per half of h features each, k = top-k.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.kernels.precision import wide_type
from fwpkm_bench.kernels.product_key_triton import nearest_subkeys, product
from fwpkm_bench.kernels.rows_triton import group_reads, grouped_sum, row_dots, weighted_rows
from fwpkm_bench.kernels.subkey_gradients_triton import subkey_gradients, subkeys_weighted
from fwpkm_bench.kernels.triton_support import require_triton

BLOCK = 4096  # tokens


def pkm(query: Tensor, keys: Tensor, values: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `reference.pkm`, in the type of ``query``; computed in float32 at least."""
    require_triton(query.device)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        output, indices, weights = _Read.apply(query, keys, values, topk)
    return output, indices, weights


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, keys: Tensor, values: Tensor, topk: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, (heads, _, n, _) = query.shape[0], keys.shape
        query, keys, values = query.contiguous(), keys.contiguous(), values.contiguous()
        with phase("address"):
            shape = (1, tokens, heads, 2, topk)
            subkeys = torch.empty(shape, dtype=torch.int32, device=query.device)
            scores = torch.empty(shape, dtype=wide_type(query), device=query.device)
            nearest_subkeys(
                query.view(1, tokens, -1), keys.unsqueeze(0), subkeys, scores, inverse_distance=False
            )
            slots, ranks, weights = product(scores[0], subkeys[0], n, joint=False)
        with phase("read"):
            output = weighted_rows(values, slots.flatten(1), weights.flatten(1))
        ctx.save_for_backward(query, keys, values, subkeys[0], slots, ranks, weights)
        ctx.mark_non_differentiable(slots)
        return output.to(values.dtype), slots, weights.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor, _slots: Tensor, grad_weights: Tensor) -> tuple[Any, ...]:
        query, keys, values, subkeys, slots, ranks, weights = ctx.saved_tensors
        need_query, need_keys, need_values, _ = ctx.needs_input_grad
        heads, k = slots.shape[1:]
        index, grad_output = slots.flatten(1), grad_output.to(weights.dtype).contiguous()
        grad_query = grad_keys = grad_values = None
        if need_values:
            with phase("read"):
                rows, starts, order = group_reads(index)
                summed = torch.zeros(values.shape, dtype=weights.dtype, device=values.device)
                grouped_sum(
                    summed, rows, starts, order, weights.flatten(), grad_output, reads=heads * k, add=False
                )
                grad_values = summed.to(values.dtype)
        if need_query or need_keys:
            with phase("address"):
                share = row_dots(values, index, grad_output).view_as(weights) + grad_weights
                sums = weights * (share - (weights * share).sum(-1, keepdim=True))
                pulls = torch.zeros(subkeys.shape, dtype=weights.dtype, device=values.device)
                places = torch.arange(k, dtype=ranks.dtype, device=ranks.device)
                for piece in range(0, len(ranks), BLOCK):  # [BLOCK, H, k, k] at a time; no atomics
                    some = slice(piece, piece + BLOCK)
                    for half, rank in enumerate((ranks[some] // k, ranks[some] % k)):
                        equal = rank.unsqueeze(-1) == places
                        pulls[some, :, half] = (sums[some].unsqueeze(-1) * equal).sum(-2)
                grad_query = subkeys_weighted(pulls, subkeys, keys).view_as(query).to(query.dtype)
                grad_keys = subkey_gradients(pulls, subkeys, query, keys.shape[2]).to(keys.dtype)
        return grad_query, grad_keys, grad_values, None
