"""FwPKM as its equations read (arXiv 2601.00671, eq. 9-18): dense, plain autograd, any float type.

The oracle of every other backend. Shapes: b sequences that share one memory, T tokens, C chunk size,
H heads, n sub-keys per half, h = key_dim / 2, k = top-k, l lookahead.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase, phase

from .settings import MemorySettings

EPSILON = 1e-3  # of the inverse-distance score
LOG_EPSILON = 1e-8  # of the addressing loss


@dataclass(frozen=True)
class Memory:
    """One fast memory and its pending tokens (those that have been read but not written)."""

    keys: Tensor  # [H, 2, n, h]
    values: Tensor  # [n*n, value_dim]
    query: Tensor  # [b, up to l + pending, H*key_dim]: queries whose target has not come, then pending
    gate: Tensor  # [b, up to l + pending]
    target: Tensor  # [b, pending, value_dim]


@dataclass(frozen=True)
class Addresses:
    """Where M tokens read."""

    slots: Tensor  # [b, M, H, k]
    weights: Tensor  # [b, M, H, k]
    usage: Tensor  # [2, n]: how much each sub-key was used, averaged over tokens and heads (p bar)


@in_phase("address")
def address(query: Tensor, keys: Tensor, settings: MemorySettings) -> Addresses:
    """Eq. 9-11: the k best slots of each head, and one softmax over the H*k scores of a token."""
    heads, _, n, h = keys.shape
    k = settings.topk
    q = query.unflatten(-1, (heads, 2, h))  # [b, M, H, 2, h]
    if settings.score == "idw":
        distance = (q.unsqueeze(-2) - keys).square().sum(-1)
        scores = -torch.log(EPSILON + distance)  # [b, M, H, 2, n]
    else:
        scores = torch.einsum("bmszh,sznh->bmszn", q, keys)
    best, subkeys = scores.topk(k, dim=-1)  # [b, M, H, 2, k]
    sums = (best[..., 0, :, None] + best[..., 1, None, :]).flatten(-2)  # [b, M, H, k*k]
    slot_scores, pair = sums.topk(k, dim=-1)
    slots = subkeys[..., 0, :].gather(-1, pair // k) * n + subkeys[..., 1, :].gather(-1, pair % k)
    weights = slot_scores.flatten(-2).softmax(-1).view_as(slot_scores)
    usage = torch.zeros_like(scores).scatter(-1, subkeys, best.softmax(-1)).mean((0, 1, 2))
    return Addresses(slots, weights, usage)


@in_phase("read")
def read(addresses: Addresses, values: Tensor) -> Tensor:
    """Eq. 12: ``v_hat_t = sum_i w_ti V[i]``, ``[b, M, value_dim]``."""
    return torch.einsum("bmsk,bmskd->bmd", addresses.weights, values[addresses.slots])


def addressing_loss(usage: Tensor) -> Tensor:
    """Eq. 17: the negative entropy of the use of sub-keys, summed over the two halves."""
    return (usage * torch.log(usage + LOG_EPSILON)).sum()


def write_coefficient(weights: Tensor, rule: str) -> Tensor:
    """``c_ti``: how much of a token's error each of its slots takes, ``[b, M, H, k]``."""
    if rule == "paper":
        return weights
    if rule == "authors":
        return weights * (weights.shape[-1] * weights.shape[-2])
    return weights / weights.square().sum((-1, -2), keepdim=True)


@in_phase("write")
def write(memory: Memory, settings: MemorySettings, mask: Tensor | None) -> tuple[Memory, Tensor, Tensor]:
    """Eq. 13-18 for the pending tokens: the memory after it, the losses ``[b, P]``, the addressing loss."""
    b, own = memory.target.shape[:2]
    pairs = max(0, memory.query.shape[1] - settings.lookahead)  # (q_t, v_{t+l}) with v_{t+l} pending
    query, gate = memory.query[:, :pairs], memory.gate[:, :pairs]
    target = memory.target[:, own - pairs :]
    written = address(query, memory.keys, settings)
    error = read(written, memory.values) - target
    scale: float | Tensor = 1.0
    counted = written.slots
    if settings.boundary == "drop":
        counted = address(memory.query, memory.keys, settings).slots
        tokens = b * own if mask is None else mask[:, :pairs].sum()
        scale = tokens / (b * pairs) if pairs else 0.0
    counts = torch.bincount(counted.flatten(), minlength=len(memory.values))
    gated = gate.unsqueeze(-1) * error
    step = write_coefficient(written.weights, settings.write_rule) / counts[written.slots]
    change = step.unsqueeze(-1) * gated[:, :, None, None, :]  # [b, P, H, k, value_dim]
    values = memory.values.index_add(
        0, written.slots.flatten(), -settings.learning_rate * scale * change.flatten(0, 3)
    )

    differentiable = torch.is_grad_enabled()
    with phase("keys"), torch.enable_grad():
        keys = memory.keys if memory.keys.requires_grad else memory.keys.detach().requires_grad_()
        usage = address(memory.query[:, -own:], keys, settings).usage
        entropy = addressing_loss(usage)
        (key_gradient,) = torch.autograd.grad(entropy, keys, create_graph=differentiable)
    if not differentiable:
        entropy = entropy.detach()
    entropy = settings.addressing_weight * entropy
    keys = memory.keys - settings.learning_rate * settings.addressing_weight * key_gradient

    kept = min(settings.lookahead, memory.query.shape[1]) if settings.boundary == "carry" else 0
    rest = slice(memory.query.shape[1] - kept, None)
    after = Memory(keys, values, memory.query[:, rest], memory.gate[:, rest], memory.target[:, :0])
    losses = gate * error.square().mean(-1)
    return after, losses, entropy


def run(
    memory: Memory, query: Tensor, target: Tensor, gate: Tensor, settings: MemorySettings, mask: Tensor | None
) -> tuple[Memory, dict[str, Tensor]]:
    """Read and write ``[b, T]`` tokens with one memory.

    Returns the memory and ``retrieved``, ``slots``, ``weights`` per token, ``losses`` per written token
    and ``entropy`` per written chunk.
    """
    retrieved, slots, weights, losses, entropy = [], [], [], [], []
    start = 0
    while start < query.shape[1]:
        room = settings.chunk_size - memory.target.shape[1]
        piece = slice(start, start + room)
        at = address(query[:, piece], memory.keys, settings)
        retrieved.append(read(at, memory.values))
        slots.append(at.slots)
        weights.append(at.weights)
        memory = replace(
            memory,
            query=torch.cat((memory.query, query[:, piece]), 1),
            gate=torch.cat((memory.gate, gate[:, piece]), 1),
            target=torch.cat((memory.target, target[:, piece]), 1),
        )
        start += room
        if memory.target.shape[1] == settings.chunk_size or settings.boundary == "drop":
            chunk_mask = None if mask is None else mask[:, piece]
            memory, chunk_losses, chunk_entropy = write(memory, settings, chunk_mask)
            losses.append(chunk_losses)
            entropy.append(chunk_entropy)
    return memory, {
        "retrieved": torch.cat(retrieved, 1),
        "slots": torch.cat(slots, 1),
        "weights": torch.cat(weights, 1),
        "losses": torch.cat(losses, 1) if losses else gate[:, :0],
        "entropy": torch.stack(entropy) if entropy else gate.new_zeros(0),
    }
