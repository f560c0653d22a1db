"""Where tokens read, and how the addressing loss moves the keys: sparse and in closed form.

Shapes: B sequences, S memories (B, or 1 where they share one), L tokens, H heads, n sub-keys per half,
h = key_dim / 2, k = top-k. A *place* is one of the S*H*2*n sub-keys of all memories.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fwpkm_bench.kernels.phases import in_phase
from fwpkm_bench.kernels.product_key import product_topk

from .reference import EPSILON, LOG_EPSILON, write_coefficient
from .settings import MemorySettings

# Squared distances under this share of |q|^2 are computed again, without cancellation. Beyond it,
# |K| <= |q| + |q - K| keeps what cancels, |q|^2 + |K|^2, under 26 times the distance.
CLOSE = 1 / 8


@dataclass(frozen=True)
class Addresses:
    """Where L tokens read."""

    subkeys: Tensor  # [B, L, H, 2, k]
    scores: Tensor  # [B, L, H, 2, k]: of those sub-keys, best first
    ranks: Tensor  # [B, L, H, 2, k]: of each slot's sub-keys among those
    slots: Tensor  # [B, L, H, k]: within the memory of the sequence
    weights: Tensor  # [B, L, H, k]

    def tokens(self, which: slice) -> Self:
        """The addresses of some of the tokens."""
        parts = (self.subkeys, self.scores, self.ranks, self.slots, self.weights)
        return type(self)(*(part[:, which] for part in parts))


def square_norms(keys: Tensor) -> Tensor:
    """``|K|^2 [S*H*2, n]`` of ``keys [S, H, 2, n, h]``."""
    return keys.square().sum(-1).flatten(0, 2)


def address(query: Tensor, keys: Tensor, key_norms: Tensor, settings: MemorySettings) -> Addresses:
    """The slots and weights of ``query [B, L, H*key_dim]`` under ``keys [S, H, 2, n, h]``.

    The nearest sub-keys are found by one matrix product, ``|q - K|^2 = |q|^2 + |K|^2 - 2 q.K``, with the
    ``key_norms`` of `square_norms`, which outlive a call where the keys do.
    """
    batch, length, _ = query.shape
    memories, heads, _, n, h = keys.shape
    q = by_memory(query.reshape(batch, length, heads, 2, h), memories)
    k = keys.reshape(-1, n, h)
    if settings.score == "idw":
        partial = torch.baddbmm(key_norms.unsqueeze(1), q, k.transpose(1, 2), alpha=-2)
        nearest, subkeys = partial.topk(settings.topk, dim=-1, largest=False)
        query_norms = q.square().sum(-1, keepdim=True)
        distance = nearest + query_norms
        pair, token, rank = (distance < CLOSE * query_norms).nonzero(as_tuple=True)
        if pair.numel():
            exact = (q[pair, token] - k[pair, subkeys[pair, token, rank]]).square().sum(-1)
            distance[pair, token, rank] = exact
            distance, order = distance.sort(dim=-1)
            subkeys = subkeys.gather(-1, order)
        scores = -torch.log(EPSILON + distance)
    else:
        scores, subkeys = torch.bmm(q, k.transpose(1, 2)).topk(settings.topk, dim=-1)
    scores, subkeys = (by_token(t, batch, heads) for t in (scores, subkeys))
    sums, slots, ranks = product_topk(scores, subkeys, n)
    return Addresses(subkeys, scores, ranks, slots, _softmax(sums))


def slot_weights(scores: Tensor, ranks: Tensor) -> Tensor:
    """One softmax over the H*k slots of a token, from the scores of their sub-keys: ``[B, L, H, k]``."""
    return _softmax(scores.gather(-1, ranks).sum(-2))


def _softmax(sums: Tensor) -> Tensor:
    """Over the last two of the dimensions of ``[B, L, H, k]``."""
    return sums.flatten(-2).softmax(-1).view_as(sums)


def by_memory(t: Tensor, memories: int) -> Tensor:
    """``[B, L, H, 2, x]`` as ``[S*H*2, (B/S)*L, x]``."""
    batch, length, heads, _, features = t.shape
    t = t.reshape(memories, batch // memories * length, heads, 2, features)
    return t.permute(0, 2, 3, 1, 4).reshape(memories * heads * 2, -1, features)


def by_token(t: Tensor, batch: int, heads: int) -> Tensor:
    """``[S*H*2, (B/S)*L, x]`` as ``[B, L, H, 2, x]``."""
    t = t.view(-1, heads, 2, *t.shape[1:]).permute(0, 3, 1, 2, 4)
    return t.reshape(batch, -1, heads, 2, t.shape[-1])


def places(subkeys: Tensor, memories: int, n: int) -> Tensor:
    """The places ``[B, L, H, 2, k]`` of ``subkeys`` among the keys of all memories."""
    batch, _, heads, _, _ = subkeys.shape
    device = subkeys.device
    memory = torch.arange(batch, device=device).div(batch // memories, rounding_mode="floor")
    head, half = torch.arange(heads, device=device), torch.arange(2, device=device)
    row = (memory.view(-1, 1, 1, 1, 1) * heads + head.view(-1, 1, 1)) * 2 + half.view(2, 1)
    return row * n + subkeys


@dataclass(frozen=True)
class ByPlace:
    """Selected sub-keys of all tokens, sorted by place, to sum over the tokens that selected each."""

    order: Tensor  # [entries]
    starts: Tensor  # [S*H*2*n]
    topk: int

    @classmethod
    def of(cls, place: Tensor, count: int) -> Self:
        """Sort ``place [B, L, H, 2, k]``, each below ``count``."""
        ordered, order = place.flatten().sort()
        starts = torch.searchsorted(ordered, torch.arange(count, device=place.device))
        return cls(order, starts, place.shape[-1])

    def sum(self, coefficient: Tensor, query: Tensor) -> Tensor:
        """``sum_t coefficient_tj q_t`` for every place j, ``[S*H*2*n, h]``; query ``[B*L*H*2, h]``."""
        return F.embedding_bag(
            torch.div(self.order, self.topk, rounding_mode="floor"),
            query,
            self.starts,
            mode="sum",
            per_sample_weights=coefficient.flatten()[self.order],
        )


def total(coefficient: Tensor, place: Tensor, count: int) -> Tensor:
    """``sum_t coefficient_tj`` for every place j, ``[S*H*2*n, 1]``."""
    sums = torch.zeros(count, dtype=coefficient.dtype, device=coefficient.device)
    return sums.index_add(0, place.flatten(), coefficient.flatten()).unsqueeze(-1)


def pull(scores: Tensor, subkeys: Tensor, memories: int, n: int, score: str) -> tuple[Tensor, Tensor]:
    """How strongly each token moves the sub-keys that it selected, and the addressing loss (eq. 17).

    With ``p`` the softmax of a token's k scores, ``p_bar`` their mean over tokens and heads, and ``G`` the
    gradient of the entropy to it: ``dL/ds = p * (G - sum_j p_j G_j) / (L*H)``; and ``dL/dK`` is
    ``sum_t a_t (q_t - K)`` with ``a = dL/ds * 2 / (eps + |q - K|^2)`` for the inverse distance, or
    ``sum_t a_t q_t`` with ``a = dL/ds`` for the dot product. Differentiable.

    Returns:
        ``a [B, L, H, 2, k]`` and the loss of each memory ``[S]``.
    """
    batch, length, heads, _, _ = scores.shape
    tokens = batch // memories * length * heads
    p = scores.softmax(-1)
    memory = torch.arange(batch, device=scores.device).div(batch // memories, rounding_mode="floor")
    half = torch.arange(2, device=scores.device).view(2, 1)
    where = (memory.view(-1, 1, 1, 1, 1) * 2 + half) * n + subkeys  # into [S, 2, n]: heads are averaged
    usage = total(p, where, memories * 2 * n).squeeze(-1) / tokens
    log_usage = torch.log(usage + LOG_EPSILON)
    loss = (usage * log_usage).view(memories, -1).sum(-1)
    gradient = (log_usage + usage / (usage + LOG_EPSILON))[where] / tokens
    a = p * (gradient - (p * gradient).sum(-1, keepdim=True))
    return (a * (2 * scores.exp()) if score == "idw" else a), loss  # exp(score) = 1 / (eps + |q - K|^2)


@in_phase("keys")
def update_keys(
    query: Tensor, at: Addresses, keys: Tensor, settings: MemorySettings
) -> tuple[Tensor, Tensor]:
    """The keys ``[S, H, 2, n, h]`` after one step of the addressing loss, and that loss ``[S]``, weighted."""
    memories, _, _, n, h = keys.shape
    count = keys.numel() // h
    place = places(at.subkeys, memories, n)
    a, loss = pull(at.scores, at.subkeys, memories, n, settings.score)
    gradient = ByPlace.of(place, count).sum(a, query.reshape(-1, h))
    if settings.score == "idw":
        gradient -= total(a, place, count) * keys.reshape(-1, h)
    step = settings.learning_rate * settings.addressing_weight
    return keys - step * gradient.view_as(keys), loss * settings.addressing_weight


@in_phase("address")
def address_backward(
    query: Tensor,
    at: Addresses,
    keys: Tensor,
    settings: MemorySettings,
    *,
    own: int,
    grad_weights: Tensor,
    grad_coefficients: Tensor,
    grad_keys_after: Tensor,
    grad_loss: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of `address` and of the `update_keys` by the last ``own`` tokens that followed it.

    Args:
        query, at, keys: of the chunk, ``L`` tokens.
        own: 0 where no update followed.
        grad_weights: ``[B, L, H, k]``.
        grad_coefficients: ``[B, P, H, k]``, to the write coefficients of the first P tokens.
        grad_keys_after: ``[S, H, 2, n, h]``, to the keys after the update.
        grad_loss: ``[S]``, to the weighted addressing loss.

    Returns:
        Gradients to ``query`` and to ``keys``.
    """
    memories, heads, _, n, h = keys.shape
    batch, length = query.shape[:2]
    k = settings.topk
    step = settings.learning_rate * settings.addressing_weight
    mine = slice(length - own, None)
    place = places(at.subkeys, memories, n)
    flat_keys, after = keys.reshape(-1, h), grad_keys_after.reshape(-1, h)
    own_query = query[:, mine]

    # What depends on the k*k scores of a token alone is left to autograd.
    with torch.enable_grad():
        scores = at.scores.detach().requires_grad_()
        weights = slot_weights(scores, at.ranks)
        outputs, gradients = [weights], [grad_weights]
        if grad_coefficients.shape[1]:
            outputs.append(write_coefficient(weights[:, : grad_coefficients.shape[1]], settings.write_rule))
            gradients.append(grad_coefficients)
        if own and step:
            a, loss = pull(scores[:, mine], at.subkeys[:, mine], memories, n, settings.score)
            split = own_query.reshape(batch, own, heads, 2, h)
            dots = torch.bmm(by_memory(split, memories), grad_keys_after.reshape(-1, n, h).transpose(1, 2))
            dots = by_token(dots.gather(-1, by_memory(at.subkeys[:, mine], memories)), batch, heads)
            if settings.score == "idw":
                dots = dots - (after * flat_keys).sum(-1)[place[:, mine]]
            outputs += [a, loss]
            gradients += [-step * dots, grad_loss * settings.addressing_weight]
        (grad_scores,) = torch.autograd.grad(outputs, scores, gradients)

    rows = query.reshape(-1, h)  # [B*L*H*2, h]
    grouped = ByPlace.of(place, len(flat_keys))

    def over_subkeys(coefficient: Tensor, table: Tensor, where: Tensor) -> Tensor:
        """``sum_j coefficient_tj table_j`` for every half query t."""
        weights = coefficient.reshape(-1, k)
        return F.embedding_bag(where.reshape(-1, k), table, mode="sum", per_sample_weights=weights)

    if settings.score == "idw":
        pulled = -2 * grad_scores * at.scores.exp()  # to |q - K|^2, twice
        grad_query = pulled.sum(-1).view(-1, 1) * rows - over_subkeys(pulled, flat_keys, place)
        grad_keys = total(pulled, place, len(flat_keys)) * flat_keys - grouped.sum(pulled, rows)
    else:
        grad_query = over_subkeys(grad_scores, flat_keys, place)
        grad_keys = grouped.sum(grad_scores, rows)
    grad_query = grad_query.view(query.shape)
    grad_keys = grad_keys + after
    if own and step:
        a = a.detach()
        grad_query[:, mine] -= step * over_subkeys(a, after, place[:, mine]).view(own_query.shape)
        if settings.score == "idw":
            grad_keys += step * total(a, place[:, mine], len(flat_keys)) * after
    return grad_query, grad_keys.view_as(keys)
