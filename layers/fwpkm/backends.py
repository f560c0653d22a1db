"""The implementations that advance a memory, imported when they are first asked for."""

from importlib import import_module
from typing import Any

SPARSE = ("eager", "triton")  # they share one state
BACKENDS = ("reference", *SPARSE)


def forward_of(backend: str) -> Any:
    """The module whose ``run(state, query, target, gate, mask, flush=, tape=)`` reads and writes."""
    return import_module(f".{backend}", __package__)


def backward_of(backend: str) -> Any:
    """The module whose ``backward(ctx, query, gate, grads)`` undoes what a ``Tape`` recorded."""
    return import_module(f".{backend}_backward", __package__)
