"""What a workload hands back, and the ways in which a case can end."""

from dataclasses import dataclass, field

STATUSES = ("ok", "oom", "timeout", "crashed", "unsupported", "diverged", "skipped")


@dataclass(frozen=True)
class Measurement:
    """Columns of the row, and the raw samples that some of them were computed from."""

    columns: dict[str, float | int | str | None]
    samples_ms: list[float] = field(default_factory=list)
    warmup_ms: list[float] = field(default_factory=list)


class UnsupportedError(Exception):
    """The layer cannot do what the case asks; becomes a row with status ``unsupported``."""


class DivergedError(Exception):
    """The layer made NaN or infinity from finite input; becomes a row with status ``diverged``."""
