"""Where the tokens of a call read: the keys pass through all its chunks, three launches each.

Shapes: B sequences, S memories, A tokens addressed in a call, H heads, n sub-keys per half of h features,
k = top-k.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase
from fwpkm_bench.kernels.product_key_triton import nearest_subkeys, product
from fwpkm_bench.kernels.triton_support import GPU_BLOCKS, power_of_two

from .overlay import OverlayState
from .settings import MemorySettings
from .triton_key_kernels import move_keys_kernel, usage_kernel
from .triton_plan import Plan, Step

# Sub-keys a program: few, for one sequence alone must fill the chip; interpreted, each program takes a while.
FEW, SOME = (8, 16) if GPU_BLOCKS else (32, 32)


@dataclass(frozen=True)
class Addressed:
    """Where all tokens of a call read."""

    subkeys: Tensor  # [B, A, H, 2, k] int32
    scores: Tensor  # [B, A, H, 2, k]
    slots: Tensor  # [B, A, H, k]
    ranks: Tensor  # [B, A, H, k] int32: first * k + second, in the two lists
    weights: Tensor  # [B, A, H, k]
    keys: list[Tensor]  # before each step, [S, H, 2, n, h]
    usage: list[Tensor]  # of each written chunk, [S, 2, n]


@in_phase("address")
def address(state: OverlayState, queries: Tensor, plan: Plan) -> Addressed:
    """Address the chunks of a call in turn, each with the keys that the last one left to it."""
    settings = state.settings
    memories, heads, _, n, _ = state.keys.shape
    shape = (len(queries), plan.addressed, heads, 2, settings.topk)
    subkeys = torch.empty(shape, dtype=torch.int32, device=queries.device)
    scores = torch.empty(shape, dtype=queries.dtype, device=queries.device)
    step_size = key_step(settings, queries) if any(s.own for s in plan.steps) else None
    keys, usage = [], []
    for step in plan.steps:
        keys.append(state.keys)
        nearest_subkeys(
            queries[:, step.start : step.stop],
            state.keys,
            subkeys[:, step.rows],
            scores[:, step.rows],
            inverse_distance=settings.score == "idw",
        )
        if step_size is not None and step.own and settings.addressing_weight:
            usage.append(queries.new_empty((memories, 2, n)))
            state.keys = _move_keys(
                queries, state.keys, scores, subkeys, usage[-1], step_size, step, settings
            )
    slots, ranks, weights = product(scores, subkeys, n, joint=True)
    return Addressed(subkeys, scores, slots, ranks, weights, keys, usage)


def key_step(settings: MemorySettings, like: Tensor) -> Tensor:
    """The step of the keys, for a kernel to load: as a constant, each learning rate would compile again, and
    as a number, Triton would round it to float32."""
    return like.new_full((1,), settings.learning_rate * settings.addressing_weight)


@in_phase("keys")
def _move_keys(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    subkeys: Tensor,
    usage: Tensor,
    step_size: Tensor,
    step: Step,
    settings: MemorySettings,
) -> Tensor:
    """Fill ``usage [S, 2, n]`` from the own tokens of ``step``; the keys after its addressing loss."""
    memories, heads, _, n, half = keys.shape
    batch, addressed = scores.shape[:2]
    first = step.first + step.length - step.own
    block_k = power_of_two(settings.topk)
    block_j, block_t = SOME, max(16, 256 // block_k)
    usage_kernel[(triton.cdiv(n, FEW), 2, memories)](
        scores,
        subkeys,
        usage,
        first,
        step.own,
        addressed,
        batch // memories,
        n,
        HEADS=heads,
        topk=settings.topk,
        BLOCK_J=FEW,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        num_warps=4,
    )
    own = queries[:, step.stop - step.own : step.stop]
    after = torch.empty_like(keys)
    move_keys_kernel[(triton.cdiv(n, block_j), heads * 2, memories)](
        own,
        keys,
        scores,
        subkeys,
        usage,
        step_size,
        after,
        first,
        step.own,
        own.stride(0),
        own.stride(1),
        addressed,
        batch // memories,
        n,
        half,
        HEADS=heads,
        topk=settings.topk,
        INVERSE_DISTANCE=settings.score == "idw",
        BLOCK_J=block_j,
        BLOCK_T=block_t,
        BLOCK_K=block_k,
        BLOCK_H=power_of_two(half, 16),
        PRECISION="ieee" if keys.dtype == torch.float64 else "tf32x3",
        num_warps=8,
    )
    return after
