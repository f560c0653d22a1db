"""Whether one backend computes what its layer's reference does, under one variant of the settings.

Outputs, gradients and states on fresh random inputs, against the reference in float64 on the CPU. A backend
may be off by `SLACK` times what the reference itself loses in float32, and by `LEAST` in any case; one that
computes in half precision, or in the tf32 of a library's kernels, by `HALF`.
"""

import math
from dataclasses import dataclass, field, fields, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from fwpkm_bench import catalog, worker
from fwpkm_bench.kernels.triton_support import INTERPRETED
from fwpkm_bench.measurement import HALF, INPUTS, LEAST, MOST, SLACK, Check

SEQUENCES, TOKENS, CUT = 2, 100, 45
SMALL = {"width": 64, "head_dim": 32, "key_dim": 64, "value_dim": 48, "n_subkeys": 40, "chunk_size": 32}
NOT_HERE = (ImportError, NotImplementedError)


@dataclass(frozen=True)
class Variant:
    """Settings that differ from the layer's own; for the layers that have all of them."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    half: bool = False  # in bfloat16


PLAIN = Variant("plain")
VARIANTS = (
    PLAIN,
    Variant("shared", {"scope": "shared"}),
    Variant("projected", {"write_rule": "projected"}),
    Variant("drop", {"boundary": "drop"}),
    Variant("dot", {"score": "dot"}),
    Variant("top-1", {"heads": 1, "topk": 1}),
    Variant("two-heads", {"heads": 2, "topk": 5}),
    Variant("narrow", {"n_subkeys": 40, "value_dim": 20}),
    Variant("many-subkeys", {"n_subkeys": 521, "value_dim": 20}),  # more than a block of scores holds, odd
    Variant("bfloat16", half=True),
)


def variants_of(layer: str, names: tuple[str, ...]) -> list[str]:
    """Those of the variants ``names`` that ``layer`` has the settings for."""
    known = {f.name for f in fields(catalog.load_layer(layer).sizes["laptop"])}
    return [v.name for v in VARIANTS if v.name in names and v.changes.keys() <= known]


def work(layer: str, backend: str, device: str, seed: int, names: list[str], connection: Connection) -> None:
    """In a process of its own: send the checks of each variant, and end after one that failed.

    A kernel that wrote where it must not takes the GPU from all that its process does afterwards.
    """
    worker.settle(connection)
    for name in names:
        checks = check(layer, backend, device, seed, name)
        connection.send(checks)
        if checks[0].status == "failed":
            break
    connection.close()


def check(layer: str, backend: str, device: str, seed: int, variant: str) -> list[Check]:
    """The checks of one variant; after a miss those of a second draw, each of which says so.

    Where two scores nearly tie, float32 and float64 rightly choose different slots. That is rare: who misses
    in two draws is wrong.
    """
    chosen = next(v for v in VARIANTS if v.name == variant)
    first = _draw(layer, backend, device, seed, chosen)
    missed = {c.what: c for c in first if c.status == "wrong"}
    if not missed:
        return first
    told = []
    for c in _draw(layer, backend, device, seed + INPUTS, chosen):
        before = f"; the first was off by {missed[c.what].error:.1e}" if c.what in missed else ""
        told.append(replace(c, reason=": ".join(filter(None, (f"second draw{before}", c.reason)))))
    return told


def _draw(layer: str, backend: str, device: str, seed: int, variant: Variant) -> list[Check]:
    layer_class = catalog.load_layer(layer)
    half = variant.half or backend in layer_class.half_backends
    dtype = torch.bfloat16 if half else torch.float32
    kind = str(dtype).removeprefix("torch.")

    def nothing(status: str, reason: str) -> list[Check]:
        return [Check(layer, backend, variant.name, kind, "", None, None, status, reason)]

    if backend == "triton" and device == "cpu" and not INTERPRETED:
        return nothing("skipped", "needs a GPU, or TRITON_INTERPRET=1")
    try:
        seed, expected, allowed = _oracle(layer_class, device, seed, variant)
        mine = _outcome(layer_class, backend, device, dtype, seed, variant)
    except NOT_HERE as error:
        return nothing("skipped", str(error).split("\n")[0])
    except Exception as error:  # noqa: BLE001  # whatever a kernel or its compiler throws is a result
        return nothing("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    exact = not half and backend != "fla"
    checks = []
    for what, wanted in expected.items():
        off = _error(mine[what], wanted) if what in mine else math.inf
        room = allowed[what] if exact else HALF
        status = "ok" if off <= room else "wrong"  # NaN is wrong
        checks.append(Check(layer, backend, variant.name, kind, what, off, room, status))
    return checks


def _oracle(
    layer_class: Any, device: str, seed: int, variant: Variant
) -> tuple[int, dict[str, Tensor], dict[str, float]]:
    """A seed, what the reference says of its inputs, and how far a backend in float32 may be off.

    Inputs on which the reference itself goes astray in float32 hold a near tie and would allow anything: the
    next seed's are taken, before any backend has seen them. A variant in half precision is held to the
    reference in that type on the same device: which slots are chosen hangs on how the projections are
    rounded, and these both have in common.
    """
    if variant.half:
        return seed, _outcome(layer_class, "reference", device, torch.bfloat16, seed, variant), {}
    for candidate in range(seed, seed + INPUTS):
        exact, rough = (
            _outcome(layer_class, "reference", "cpu", dtype, candidate, variant)
            for dtype in (torch.float64, torch.float32)
        )
        allowed = {what: max(LEAST, SLACK * _error(rough[what], exact[what])) for what in exact}
        if max(allowed.values()) <= MOST:
            return candidate, exact, allowed
    raise RuntimeError(
        f"the reference itself loses more than {MOST / SLACK:g} in float32, {INPUTS} times over"
    )


def _outcome(
    layer_class: Any, backend: str, device: str, dtype: torch.dtype, seed: int, variant: Variant
) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    base = layer_class.sizes["laptop"]
    small = {f.name: SMALL[f.name] for f in fields(base) if f.name in SMALL}
    layer = layer_class(replace(base, **small | variant.changes), backend=backend)
    found = outcome(layer.to(device, dtype), device, dtype, seed)
    return {what: tensor.double().cpu() for what, tensor in found.items()}


def outcome(layer: Any, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Output and state after two pieces of random inputs, and the gradients of a random projection of the
    whole."""
    generator = torch.Generator().manual_seed(seed)
    shape = (SEQUENCES, TOKENS, layer.settings.width)
    x, cotangent = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    with torch.no_grad():
        first, state = layer(x[:, :CUT])
        second, state = layer(x[:, CUT:], state)
    x.requires_grad_()
    y, _ = layer(x)
    y.backward(cotangent)
    found = {"output": y, "output in pieces": torch.cat((first, second), 1)}
    found |= {f"state: {name}": tensor for name, tensor in _state(layer, state).items()}
    found["gradient: x"] = x.grad
    found |= {f"gradient: {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {what: tensor.detach() for what, tensor in found.items()}


def _state(layer: Any, state: Any) -> dict[str, Tensor]:
    """What a state holds; of a memory over an initial table, how far it has moved from it."""
    if hasattr(state, "materialize"):
        keys, values = state.materialize()
        return {"keys": keys - layer.keys, "values": values - layer.values}
    return {name: tensor for name, tensor in state.tensors().items() if tensor.is_floating_point()}


def _error(mine: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((mine - expected).norm()) / (size if size else 1.0)
