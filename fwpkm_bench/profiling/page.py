"""What people read of a profile: ``profile.md``, one page in words, and the table on the screen."""

from pathlib import Path
from typing import Any

import pandas as pd

from fwpkm_bench.plot import byte_name
from fwpkm_bench.profiling import folder as files
from fwpkm_bench.profiling.folder import read_profile, read_table
from fwpkm_bench.profiling.words import bound_of, count_name, ms_name, overheads, whole
from fwpkm_bench.report import machine_line, markdown_table, print_table
from fwpkm_bench.store import write_atomically
from fwpkm_bench.tables import length_name

HEADINGS = ["phase", "ms", "95% interval", "share", "GFLOP/s", "GB/s", "x roofline", "operators", "bound"]
MOST_ROWS = 12  # of operators and of the host's lines
KERNEL_COLUMNS = ("kernel", "constants", "registers", "spilled_bytes")
LEAST_SHOWN = 5e-4  # of a rate
SMALL = 0.01  # share of a phase of which no word is said
PICTURES = {
    "phases": "What each phase takes, and what the roofline asks for.",
    "roofline": "Each phase under the ceilings of the machine.",
    "memory": "Memory over the time of the first call.",
}
CONTENTS = {
    "profile.md": "this page",
    files.PHASES: "a row a phase: time, interval, share, operations, bytes, rates, distance to the roofline",
    files.CASE: "the whole step, what the clock costs, the ceilings",
    files.PARTS: "a row a part: whether it could be delivered, or why not",
    files.PROFILE: "command, case, machine and versions, each part's figures",
    files.OPERATORS: "a row an operator or named range of the traced call",
    files.TRACE: "the traced call, for ui.perfetto.dev or chrome://tracing",
    files.HOST: "a row a line of Python: samples in it, and in what it called",
    files.SPEEDSCOPE: "the host's samples over time, for speedscope.app",
    files.FLAMES: "the host's samples as flames, by py-spy, with imports and set-up",
    files.MEMORY: "a row a sample: bytes of tensors by what they are, and of the process",
    files.MEMORY_SPLIT: "a row a kind of memory: its highest, at the peak of all, at the end",
    files.SNAPSHOT: "the allocator's segments and its history, as JSON",
    files.KERNELS: "a row a Triton kernel as it is compiled: registers, spills, shared memory",
    "ncu.ncu-rep": "Nsight Compute's report",
    "nsys.nsys-rep": "Nsight Systems' report",
}


def write(folder: Path) -> None:
    """Write ``profile.md`` of the profile ``folder`` from its tables."""
    profile = read_profile(folder)
    case = profile["case"]
    title = f"{case['layer']}, {case['mode']}, {length_name(case['seq'])} tokens, {case['backend']}"
    lines = [f"# Where {title} spends time and memory", "", f"`{profile['command']}`", ""]
    lines += [machine_line(profile["environment"]), ""]
    lines += _in_words(folder, profile)
    for name, said in PICTURES.items():
        if (folder / f"{name}.png").exists():
            lines += [f"![{said}]({name}.png)", ""]
    lines += _tables(folder)
    lines += ["## Parts", ""]
    rows = [[p["part"], p["status"], p["reason"], f"{p['elapsed_s']:.1f}"] for p in profile["parts"]]
    lines += [*markdown_table(["part", "outcome", "why", "s"], rows), "", "## Files", ""]
    there = {path.name for path in folder.iterdir()} | {"profile.md"}
    lines += [f"- [{name}]({name}): {said}" for name, said in CONTENTS.items() if name in there]
    write_atomically(folder / "profile.md", "\n".join(lines) + "\n")


def _in_words(folder: Path, profile: dict[str, Any]) -> list[str]:
    lines = ["## In words", ""]
    if (folder / files.PHASES).exists():
        phases, total = read_table(folder / files.PHASES), read_table(folder / files.CASE).iloc[0]
        lines += [whole(profile["case"], total), ""]
        for _, row in phases.sort_values("ms_p50", ascending=False).iterrows():
            if row["share"] >= SMALL:
                said = f"- **{row['phase']}**, {ms_name(row['ms_p50'])} ({row['share']:.1%}): "
                lines.append(said + bound_of(row, total))
        lines += [
            "",
            "Bytes are those that operators read and write, whether or not a cache serves them;",
            "",
        ]
        lines[-2] += " the roofline is a matrix product and a copy, timed in the same process."
    lines += [f"- {said}" for said in overheads(folder, profile["parts"])]
    return [*lines, ""]


def _tables(folder: Path) -> list[str]:
    lines: list[str] = []
    if (folder / files.PHASES).exists():
        lines += ["## Phases", "", *markdown_table(HEADINGS, phase_rows(read_table(folder / files.PHASES)))]
        lines += [""]
    if (folder / files.MEMORY_SPLIT).exists():
        rows = []
        for _, row in read_table(folder / files.MEMORY_SPLIT).iterrows():
            counts = [row[n] for n in ("highest_bytes", "bytes_at_peak", "bytes_at_end", "used_bytes")]
            rows.append([row["what"], *("" if pd.isna(n) else byte_name(n) for n in counts)])
        headings = ["what", "highest", "at the peak of all", "at the end", "of these in use"]
        lines += ["## Memory of tensors", "", *markdown_table(headings, rows), ""]
        lines += [
            "No optimiser takes part in a case. What the state has allocated and not yet used may not be"
        ]
        lines[-1] += " resident."
        lines += [""]
    if (folder / files.OPERATORS).exists():
        table = read_table(folder / files.OPERATORS)
        on = "device" if table["self_device_ms"].notna().any() else "cpu"
        rows = [
            [
                r["operator"],
                count_name(r["calls"]),
                f"{r[f'self_{on}_ms']:,.4g}",
                _share(r[f"self_{on}_share"]),
            ]
            for _, r in table.head(MOST_ROWS).iterrows()
        ]
        lines += ["## Operators of the traced call", ""]
        lines += [*markdown_table(["operator or range", "calls", "ms itself", "share"], rows), ""]
    if (folder / files.HOST).exists():
        rows = [
            [f"{r['function']} ({r['file']}:{r['line']})", _share(r["self_share"]), _share(r["total_share"])]
            for _, r in read_table(folder / files.HOST).head(MOST_ROWS).iterrows()
        ]
        lines += ["## The host", ""]
        lines += [*markdown_table(["line of Python", "share itself", "with what it calls"], rows), ""]
    if (folder / files.KERNELS).exists():
        rows = [
            [*(str(r[n]) for n in KERNEL_COLUMNS), byte_name(r["shared_bytes"])]
            for _, r in read_table(folder / files.KERNELS).drop_duplicates(["kernel", "constants"]).iterrows()
        ]
        headings = ["kernel", "constants", "registers", "spilled bytes", "shared memory"]
        lines += ["## Triton kernels as compiled", "", *markdown_table(headings, rows), ""]
    return lines


def phase_rows(phases: pd.DataFrame) -> list[list[str]]:
    """The phases as text, those that take the longest first."""
    rows = []
    for _, row in phases.sort_values("ms_p50", ascending=False).iterrows():
        interval = "" if pd.isna(row["ms_lo"]) else f"{row['ms_lo']:,.4g} to {row['ms_hi']:,.4g}"
        rates = [row["tflop_per_s"] * 1e3, row["gb_per_s"], row["distance"]]
        cells = [row["phase"], f"{row['ms_p50']:,.4g}", interval, f"{row['share']:.1%}"]
        cells += ["" if pd.isna(v) else _rate(v) for v in rates]
        rows.append([*cells, count_name(row["operators"]), row["bound"]])
    return rows


def print_phases(phases: pd.DataFrame) -> None:
    """The phases on the screen."""
    print_table(HEADINGS, phase_rows(phases))


def _share(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.1%}"


def _rate(value: float) -> str:
    return f"{value:,.3g}" if value >= LEAST_SHOWN else "0"
