"""What the numbers of a profile say, in words."""

from pathlib import Path
from typing import Any

import pandas as pd

from fwpkm_bench.plot import byte_name
from fwpkm_bench.profiling.folder import CASE, read_table


def whole(case: dict[str, Any], total: pd.Series) -> str:
    """What a step takes, and which bound the whole of it is under."""
    tokens, ms = int(total["tokens_a_step"]), float(total["off_ms_p50"])
    step = "One token of each sequence" if case["mode"] == "decode" else f"A call of {tokens:,} tokens"
    said = f"{step} takes {ms_name(ms)}{_interval(total, 'off_ms')}, {tokens / ms * 1e3:,.0f} tokens/s. "
    if total["off_ms_hi"] > SCATTERED * total["off_ms_lo"]:
        said += "**These calls scatter: something else had the cores, and no time below is to be trusted.** "
    if pd.isna(total["roofline_ms"]):
        return said + "As a whole: " + bound_of(total, total, ms)
    said += "**" + VERDICTS[total["bound"]] + "** As a whole: " + bound_of(total, total, ms)
    each = total["phases_roofline_ms"]
    if not pd.isna(each):
        said += f" With each phase at its own ceiling it would take {ms_name(each)}."
    return said


SCATTERED = 1.3  # upper over lower end of the interval
VERDICTS = {
    "compute": "It is bound by computing.",
    "memory": "It is bound by moving memory.",
    "overhead": "It is bound by calling operators, not by their work.",
    "neither": "Neither computing nor moving memory explains its time.",
    "unknown": "What bounds it is not known.",
}


def bound_of(row: pd.Series, total: pd.Series, ms: float | None = None) -> str:
    """Which bound a phase is under, and how far from it, with the numbers."""
    ms = float(row["ms_p50"]) if ms is None else ms
    operators, each = row["operators"], row["us_an_operator"]
    calls = f"{count_name(operators)} operators at {us_name(each)} each" if operators else "no operator"
    if row["bound"] == "unknown":
        return (
            f"{count_name(row['launches'])} Triton kernels, whose operations and bytes are not counted, and "
            f"{calls}; --ncu counts them."
        )
    flops, moved = row["flops"], row["bytes"]
    compute = f"{count_name(flops)}FLOP at {total['ceiling_tflop_per_s'] * 1e3:,.3g} GFLOP/s"
    memory = f"{count_name(moved)}B at {total['ceiling_gb_per_s']:,.3g} GB/s" if not pd.isna(moved) else ""
    if row["bound"] == "compute":
        return (
            f"compute. {compute} would take {ms_name(row['compute_ms'])}; it takes {_times(row['distance'])}."
        )
    if row["bound"] == "memory":
        cached = ", for caches serve what one operator leaves to the next" if row["distance"] < 1 else ""
        worth = f"{memory} would take {ms_name(row['memory_ms'])}"
        return f"memory. {worth}; it takes {_times(row['distance'])}{cached}."
    if row["bound"] == "overhead":
        floor = us_name(total["operator_floor_us"])
        return f"overhead. {calls}, where one that does nothing takes {floor}; the work itself is small."
    if not flops and not moved:
        return f"neither. It computes and moves nothing that is counted ({calls})."
    worth = "computing" if row["roofline_ms"] == row["compute_ms"] else "moving memory"
    explained = row["roofline_ms"] / ms
    return (
        f"neither. {compute} and {memory} explain {explained:.0%} of it at the most ({worth}); {calls}: "
        "searching, sorting, scattered rows, waiting, or Python between the operators."
    )


def overheads(folder: Path, parts: list[dict[str, Any]]) -> list[str]:
    """What it costs to look, for each part that was delivered."""
    figures = {part["part"]: part["figures"] for part in parts if part["status"] == "ok"}
    said = []
    plain: float | None = None
    if "phases" in figures:
        total = read_table(folder / CASE).iloc[0]
        plain = float(total["off_ms_p50"])
        ratio, pairs = total["overhead_ratio"], int(total["samples"])
        many = f"{pairs} pair{'s' * (pairs > 1)} of calls in turn"
        said.append(
            f"Looking costs: with the phase clock on a call takes {ratio:.3f} times what it takes without"
            f"{_interval(total, 'overhead_ratio', '{:.3f}')}, {many}."
        )
    if "trace" in figures:
        seen = figures["trace"]
        said.append(
            f"The traced call, of {seen['tokens']:,} tokens, took {ms_name(seen['traced_ms'])} and "
            f"{ms_name(seen['plain_ms'])} without the profiler."
        )
    if "host" in figures:
        seen = figures["host"]
        against = "" if plain is None else f", {seen['step_ms'] / plain:.3f} times the median without it"
        said.append(f"Watched by py-spy a step took {ms_name(seen['step_ms'])}{against}.")
    if "memory" in figures:
        seen = figures["memory"]
        said.append(
            f"The call whose memory was followed took {ms_name(seen['call_ms'])}; it is the first, "
            f"which also pays for new pages. Its peak is {byte_name(seen['peak_bytes'])} above what was "
            f"there before, {byte_name(seen['total_bytes'])} in all."
        )
    return said


def ms_name(ms: float) -> str:
    """``0.5`` as ``0.5 ms``, ``12345`` as ``12.35 s``."""
    return f"{ms / 1e3:,.4g} s" if ms >= 10_000 else f"{ms:,.4g} ms"


def us_name(us: float) -> str:
    """``5`` as ``5 µs``."""
    return f"{us:,.3g} µs" if us < 1000 else ms_name(us / 1e3)


def count_name(count: float) -> str:
    """``8_800_000_000`` as ``8.8 G``, ``120`` as ``120``, followed by a space where there is a prefix."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.3g} {unit}"
    return f"{count:,.0f}" if count >= 10 or count == int(count) else f"{count:,.2g}"


def _times(distance: float) -> str:
    return f"{distance:,.3g} times that"


def _interval(row: pd.Series, name: str, form: str = "{:,.4g}") -> str:
    low, high = row[f"{name}_lo"], row[f"{name}_hi"]
    if pd.isna(low):
        return " (measured once)"
    return f" (95% interval {form.format(low)} to {form.format(high)})"
