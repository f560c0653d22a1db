"""Whether each backend computes what its layer's reference does, on the device at hand.

Outputs, gradients and states on fresh random inputs, against the reference in float64 on the CPU. A backend
may be off by `SLACK` times what the reference itself loses in float32, and by `LEAST` in any case; one that
computes in half precision, or in the tf32 of a library's kernels, by `HALF`.
"""

import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fwpkm_bench import catalog
from fwpkm_bench.kernels.triton_support import INTERPRETED
from fwpkm_bench.measurement import Check

SLACK = 20.0
LEAST = 1e-6
HALF = 2e-2
SEQUENCES, TOKENS, CUT = 2, 150, 67
SMALL = {"width": 64, "head_dim": 32, "key_dim": 64, "value_dim": 48, "n_subkeys": 40, "chunk_size": 32}
NOT_HERE = (ImportError, NotImplementedError)


def verify(layers: tuple[str, ...], backends: tuple[str, ...], device: str, seed: int) -> list[Check]:
    """Check the ``backends`` (all if none is named) of ``layers`` on ``device``."""
    found = []
    for name in layers:
        layer_class = catalog.load_layer(name)
        chosen = [b for b in layer_class.backends if b != "reference" and (not backends or b in backends)]
        if not chosen:
            continue
        expected, rough = (
            _outcome(layer_class, "reference", "cpu", dtype, seed) for dtype in (torch.float64, torch.float32)
        )
        losses = {what: _error(rough[what], expected[what]) for what in expected}
        for backend in chosen:
            found += _check(name, layer_class, backend, device, seed, expected, losses)
    return found


def _check(
    name: str,
    layer_class: Any,
    backend: str,
    device: str,
    seed: int,
    expected: dict[str, Tensor],
    losses: dict[str, float],
) -> list[Check]:
    dtype = torch.bfloat16 if backend in layer_class.half_backends else torch.float32
    kind = str(dtype).removeprefix("torch.")

    def nothing(status: str, error: Exception) -> list[Check]:
        kind_of_error = "" if status == "skipped" else f"{type(error).__name__}: "
        reason = f"{kind_of_error}{error}".splitlines()[0]
        return [Check(name, backend, kind, "", None, None, status, reason)]

    if backend == "triton" and device == "cpu" and not INTERPRETED:
        return nothing("skipped", NotImplementedError("needs a GPU, or TRITON_INTERPRET=1"))
    try:
        mine = _outcome(layer_class, backend, device, dtype, seed)
    except NOT_HERE as error:
        return nothing("skipped", error)
    except Exception as error:  # noqa: BLE001  # whatever a kernel or its compiler throws is a result
        return nothing("failed", error)
    exact = dtype == torch.float32 and backend != "fla"
    checks = []
    for what, wanted in expected.items():
        off = _error(mine[what], wanted) if what in mine else math.inf
        allowed = max(LEAST, SLACK * losses[what]) if exact else HALF
        status = "ok" if off <= allowed else "wrong"  # NaN is wrong
        checks.append(Check(name, backend, kind, what, off, allowed, status))
    return checks


def _outcome(layer_class: Any, backend: str, device: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Output and state after two pieces, and the gradients of a random projection of both pieces."""
    torch.manual_seed(seed)
    base = layer_class.sizes["laptop"]
    small = {f.name: SMALL[f.name] for f in fields(base) if f.name in SMALL}
    layer = layer_class(replace(base, **small), backend=backend)
    x = torch.randn(SEQUENCES, TOKENS, small["width"])
    cotangent = torch.randn(SEQUENCES, TOKENS, small["width"])
    layer = layer.to(device, dtype)
    x, cotangent = x.to(device, dtype), cotangent.to(device, dtype)
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
    return {what: tensor.detach().double().cpu() for what, tensor in found.items()}


def _state(layer: Any, state: Any) -> dict[str, Tensor]:
    """What a state holds; of a memory over an initial table, how far it has moved from it."""
    if hasattr(state, "materialize"):
        keys, values = state.materialize()
        return {"keys": keys - layer.keys, "values": values - layer.values}
    return {name: tensor for name, tensor in state.tensors().items() if tensor.is_floating_point()}


def _error(mine: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    return float((mine - expected).norm()) / (size if size else 1.0)
