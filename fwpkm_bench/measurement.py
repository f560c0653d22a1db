"""What is handed back by a workload, a check or a compiler, and the ways in which a case can end."""

from dataclasses import dataclass, field
from typing import Any

STATUSES = ("ok", "oom", "timeout", "crashed", "unsupported", "diverged", "skipped")


@dataclass(frozen=True)
class Measurement:
    """Columns of the row, the raw samples that some of them were computed from, and what more was seen."""

    columns: dict[str, float | int | str | None]
    samples_ms: list[float] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)  # a row a phase, where that was asked for


SLACK = 20.0  # how much more than the reference in float32 a backend may lose
LEAST = 1e-6  # what any backend may lose
MOST = 2e-3  # what none may: inputs that would ask for it hold a near tie, and are drawn anew
HALF = 2e-2  # what one may lose that computes in half precision
INPUTS = 10  # drawn at most in search of some that the reference itself has no trouble with


@dataclass(frozen=True)
class Check:
    """One quantity of one backend, or the reason why there is none."""

    layer: str
    backend: str
    variant: str  # of the settings
    dtype: str
    what: str
    error: float | None  # |mine - reference| / |reference|, both in the Euclidean norm
    allowed: float | None
    status: str  # "ok", "wrong", "failed" or "skipped"
    reason: str = ""


@dataclass(frozen=True)
class Compiled:
    """One kernel as it was compiled for a GPU."""

    kernel: str
    constants: str  # what it was compiled for, such as "BLOCK_T=16 topk=8"
    warps: int
    registers: int  # of a thread
    spilled_bytes: int  # of a thread
    shared_bytes: int  # of a program


class UnsupportedError(Exception):
    """The layer cannot do what the case asks; becomes a row with status ``unsupported``."""


class DivergedError(Exception):
    """The layer made NaN or infinity from finite input; becomes a row with status ``diverged``."""
