"""What a comparison comes to: tidy rows, one line that sums them up, and an exit code."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from fwpkm_bench.comparing.gate import Checked
from fwpkm_bench.comparing.verdicts import Turn

INTERRUPTED, FAILED = "interrupted", "failed"
WORSE = {"verdict": "slower", "memory": "more", "recall": "lower"}
NOTHING_WORSE, REGRESSED, WRONG, NOT_MEASURED = 0, 1, 3, 4  # exit codes; 2 is usage
COLUMNS = [
    *("layer", "settings", "mode", "seq", "batch", "dtype", "device", "backend_a", "backend_b"),
    *("status", "reason"),
    *("results", "worst_error", "verdict", "time_ratio", "time_ratio_lo", "time_ratio_hi", "p_value"),
    *("noise_lo", "noise_hi", "tokens_per_s_a", "tokens_per_s_b", "invocations", "rounds"),
    *("memory", "peak_memory_bytes_a", "peak_memory_bytes_b", "state_bytes_a", "state_bytes_b"),
    *("recall", "recall_a", "recall_b", "seconds"),
]


@dataclass
class Compared:
    """Tidy rows: a case, a checked quantity, a turn, a phase of a side."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)
    turns: list[tuple[str, Turn]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        if any(row["status"] == INTERRUPTED for row in self.rows):
            return 130
        if any(row["results"] == "wrong" for row in self.rows):
            return WRONG
        if any(row.get(name) == worse for row in self.rows for name, worse in WORSE.items()):
            return REGRESSED
        if not self.rows or any(row["status"] != "ok" or row["recall"] == FAILED for row in self.rows):
            return NOT_MEASURED
        return NOTHING_WORSE


def summed_up(found: Compared) -> str:
    """One line: how many cases came out how."""
    said = {
        "verdict": {v: v for v in ("slower", "faster", "same", "ambiguous")},
        "memory": {v: f"with {v} memory" for v in ("more", "less", "ambiguous")},
        "recall": {"lower": "with lower recall", "higher": "with higher recall", FAILED: "without recall"},
        "results": {"wrong": "wrong"},
    }
    parts = []
    for column, texts in said.items():
        counts = Counter(row[column] for row in found.rows)
        parts += [f"{counts[value]} {text}" for value, text in texts.items() if counts[value]]
    if failed := sum(row["status"] not in ("ok", INTERRUPTED) for row in found.rows):
        parts.append(f"{failed} not measured")
    if any(row["status"] == INTERRUPTED for row in found.rows):
        parts.append("interrupted")
    cases = f"{len(found.rows)} {'case' if len(found.rows) == 1 else 'cases'}"
    return f"{cases}: {', '.join(parts) or 'nothing worse'}"
