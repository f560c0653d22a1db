"""What a workload hands back, and the ways in which a case can end."""

from dataclasses import dataclass, field

STATUSES = ("ok", "oom", "timeout", "crashed", "unsupported", "diverged", "skipped")


@dataclass(frozen=True)
class Measurement:
    """Columns of the row, and the raw samples that some of them were computed from."""

    columns: dict[str, float | int | str | None]
    samples_ms: list[float] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """One quantity of one backend, or the reason why there is none."""

    layer: str
    backend: str
    dtype: str
    what: str
    error: float | None  # |mine - reference| / |reference|, both in the Euclidean norm
    allowed: float | None
    status: str  # "ok", "wrong", "failed" or "skipped"
    reason: str = ""


class UnsupportedError(Exception):
    """The layer cannot do what the case asks; becomes a row with status ``unsupported``."""


class DivergedError(Exception):
    """The layer made NaN or infinity from finite input; becomes a row with status ``diverged``."""
