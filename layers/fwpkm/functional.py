"""The memory as a function: check the arguments once, pick the backend, name what comes out.

Shapes: B sequences, T tokens, S memories (B, or 1 where they share one), H heads, n sub-keys per half,
h = key_dim / 2, k = top-k, P written pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwpkm_bench.kernels.precision import full_precision, wide_type

from . import reference
from .backends import BACKENDS, SPARSE
from .overlay import OverlayState
from .settings import MemorySettings
from .state import FwPKMState, ReferenceState, check_unspent


@dataclass(frozen=True)
class FwPKMOutput:
    """What `fwpkm` returns.

    Attributes:
        retrieved: ``[B, T, value_dim]``, what each token read.
        state: the memory to go on with.
        indices: ``[B, T, H, k]`` int64, the slots read, ``i1 * n + i2``.
        weights: ``[B, T, H, k]``, one softmax over the ``H*k`` slots of a token.
        losses: ``[B, P]``, gate times the mean squared error of each pair written in this call.
        addressing_loss: scalar, ``addressing_weight`` times the mean over the chunks written in this call
            (and over memories); 0 where none was.
    """

    retrieved: Tensor
    state: FwPKMState
    indices: Tensor
    weights: Tensor
    losses: Tensor
    addressing_loss: Tensor


def fwpkm(
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    *,
    topk: int,
    chunk_size: int,
    lookahead: int = 1,
    score: str = "idw",
    learning_rate: float = 1.0,
    addressing_weight: float = 1.0,
    write_rule: str = "authors",
    boundary: str = "carry",
    scope: str = "per_sequence",
    mask: Tensor | None = None,
    state: FwPKMState | None = None,
    backend: str = "eager",
) -> FwPKMOutput:
    """Read a sequence with a fast-weight product key memory that is rewritten after every chunk.

    Args:
        query: ``[B, T, H*key_dim]``.
        target: ``[B, T, value_dim]``; the query of token t learns ``target[t + lookahead]``.
        gate: ``[B, T]`` in (0, 1), or None for 1.
        keys: ``[H, 2, n, h]``, the initial sub-keys.
        values: ``[n*n, value_dim]``, the initial slots. Never written: each memory overlays its own.
        topk, chunk_size, lookahead, score, learning_rate, addressing_weight, write_rule, boundary, scope:
            see `MemorySettings`.
        mask: ``[B, T]`` boolean or 0/1; the pair of a query with mask 0 is not learned.
        state: what an earlier call returned, or None to start from ``keys`` and ``values``. It is used up.
        backend: ``"eager"`` (sparse, closed form) or ``"reference"`` (dense, plain autograd).

    Raises:
        ValueError: naming the argument that does not fit, and what would.

    Gradients flow to query, target, gate, keys and values, through every later chunk and through the state
    that is carried on, unless it is detached. Fast weights are float32 at least, whatever the rest is.

    Source: arXiv 2601.00671, eq. 9-18.
    """
    settings = MemorySettings(
        topk=topk,
        chunk_size=chunk_size,
        lookahead=lookahead,
        score=score,
        learning_rate=learning_rate,
        addressing_weight=addressing_weight,
        write_rule=write_rule,
        boundary=boundary,
        scope=scope,
    )
    return run_memory(query, target, gate, keys, values, settings, mask, state, backend)


def run_memory(
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    settings: MemorySettings,
    mask: Tensor | None,
    state: FwPKMState | None,
    backend: str,
) -> FwPKMOutput:
    """`fwpkm` with the ``settings`` made and checked before."""
    _check_shapes(query, target, gate, keys, values, mask, settings.topk)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    batch, tokens, _ = query.shape
    state = init_state(keys, values, batch, settings, backend) if state is None else state
    _check_state(state, keys, values, batch, settings, backend)
    with full_precision(query.device.type):
        kind = wide_type(keys)  # of fast weights: float32, or float64 where the keys are
        gate = query.new_ones(batch, tokens) if gate is None else gate
        mask = None if mask is None else mask.to(kind)
        gate = gate.to(kind) if mask is None else gate.to(kind) * mask
        after, out = _run(state, backend, query.to(kind), target.to(kind), gate, mask)
    entropy = out["entropy"]
    return FwPKMOutput(
        retrieved=out["retrieved"].to(target.dtype),
        state=after,
        indices=out["slots"],
        weights=out["weights"],
        losses=out["losses"],
        addressing_loss=entropy.mean() if entropy.numel() else entropy.new_zeros(()),
    )


def _run(
    state: FwPKMState, backend: str, query: Tensor, target: Tensor, gate: Tensor, mask: Tensor | None
) -> tuple[FwPKMState, dict[str, Tensor]]:
    """Advance ``state``; the sparse backends share one state and can take turns."""
    if isinstance(state, ReferenceState):
        return _run_reference(state, query, target, gate, mask)
    assert isinstance(state, OverlayState)
    after = state.successor()
    after.backend = backend
    return after, after.advance(query, target, gate, mask)


def init_state(
    keys: Tensor, values: Tensor, batch: int, settings: MemorySettings, backend: str = "eager"
) -> FwPKMState:
    """The memory of ``batch`` sequences before their first token."""
    keys = keys.to(wide_type(keys))
    if backend in SPARSE:
        return OverlayState(keys, values, batch, settings, backend)
    memories = batch if settings.scope == "per_sequence" else 1
    sharers = batch // memories
    empty = keys.new_empty((sharers, 0, keys.shape[0] * 2 * keys.shape[-1]))
    one = reference.Memory(
        keys,
        values.to(keys.dtype),
        empty,
        keys.new_empty((sharers, 0)),
        keys.new_empty((sharers, 0, values.shape[1])),
    )
    return ReferenceState([one] * memories, settings)


def _run_reference(
    state: ReferenceState, query: Tensor, target: Tensor, gate: Tensor, mask: Tensor | None
) -> tuple[ReferenceState, dict[str, Tensor]]:
    """`reference.run` for every memory of the state, each with the sequences that share it."""
    sharers = len(query) // len(state.memories)
    memories, outputs = [], []
    for index, memory in enumerate(state.memories):
        own = slice(index * sharers, (index + 1) * sharers)
        own_mask = None if mask is None else mask[own]
        after, out = reference.run(memory, query[own], target[own], gate[own], state.settings, own_mask)
        memories.append(after)
        outputs.append(out)
    state.spent = True
    merged = {name: torch.cat([out[name] for out in outputs]) for name in outputs[0]}
    return ReferenceState(memories, state.settings), merged


def _check_shapes(
    query: Tensor,
    target: Tensor,
    gate: Tensor | None,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    topk: int,
) -> None:
    """Refuse arguments that do not fit each other."""

    def refuse(name: str, tensor: Tensor, must: str) -> ValueError:
        return ValueError(f"{name} is {list(tensor.shape)} {tensor.dtype}; it must be {must}")

    if keys.ndim != 4 or keys.shape[1] != 2 or 0 in keys.shape or not keys.is_floating_point():
        raise refuse("keys", keys, "[H, 2, n, key_dim / 2] floating point")
    heads, _, n, h = keys.shape
    if values.ndim != 2 or values.shape[0] != n * n or 0 in values.shape or not values.is_floating_point():
        raise refuse(
            "values", values, f"[{n * n}, value_dim] floating point, one row for each pair of sub-keys"
        )
    if (
        query.ndim != 3
        or 0 in query.shape
        or query.shape[-1] != heads * 2 * h
        or not query.is_floating_point()
    ):
        raise refuse("query", query, f"[B, T, {heads * 2 * h}] floating point, B and T at least 1")
    batch, tokens, _ = query.shape
    if target.shape != (batch, tokens, values.shape[1]) or not target.is_floating_point():
        raise refuse("target", target, f"[{batch}, {tokens}, {values.shape[1]}] floating point")
    if gate is not None and (gate.shape != (batch, tokens) or not gate.is_floating_point()):
        raise refuse("gate", gate, f"[{batch}, {tokens}] floating point")
    for name, tensor in (("query", query), ("target", target)):
        if tensor.dtype == torch.float64 and keys.dtype != torch.float64:
            raise refuse(name, tensor, f"at most as precise as keys, {keys.dtype}")
    if topk > n:
        raise ValueError(f"topk is {topk}; it must be at most the sub-keys per half, {n}")
    if mask is not None:
        if mask.shape != (batch, tokens):
            raise refuse("mask", mask, f"[{batch}, {tokens}] boolean or 0/1")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask has values other than 0 and 1; it must be boolean or 0/1")


def _check_state(
    state: Any, keys: Tensor, values: Tensor, batch: int, settings: MemorySettings, backend: str
) -> None:
    """Refuse a state of another configuration, backend, batch or shape, or one that is used up."""
    kind = OverlayState if backend in SPARSE else ReferenceState
    if not isinstance(state, kind):
        raise ValueError(
            f"state is a {type(state).__name__}; backend {backend!r} goes on from a {kind.__name__}"
        )
    check_unspent(state)
    if state.settings is not settings and state.settings != settings:
        raise ValueError(f"state was made with {state.settings}; it must be made with {settings}")
    if state.batch != batch:
        raise ValueError(f"state is of {state.batch} sequences; query has {batch}")
    if state.key_shape != keys.shape or state.value_shape != values.shape:
        raise ValueError(
            f"state is of keys {list(state.key_shape)} and values {list(state.value_shape)}; "
            f"the arguments are {list(keys.shape)} and {list(values.shape)}"
        )
