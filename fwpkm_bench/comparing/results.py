"""What a comparison leaves behind: tidy tables first, then the page and the picture drawn from them."""

import dataclasses
import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fwpkm_bench.comparing.compared import COLUMNS, FAILED, WORSE, Compared, summed_up
from fwpkm_bench.errors import UsageError
from fwpkm_bench.plot import byte_name, save, use_style
from fwpkm_bench.ranges import format_length
from fwpkm_bench.report import machine_line, markdown_table
from fwpkm_bench.store import write_atomically
from fwpkm_bench.tables import layer_name

COMPARISON = "comparison.json"
HEADINGS = ["case", "results", "time, B / A", "95% interval", "noise (A / A)", "verdict", "memory", "recall"]
WIDE = 140
LEAST_SHARE = 0.1  # of the time lost: a phase that lost less is not named
COLOURS = {"faster": 2, "slower": 3, "same": 0, "ambiguous": 7}  # of the palette
NOTES = """\
Time is that of a step, B over A; above 1, B is slower. Its interval comes from resampling invocations (fresh
processes of each side) and the rounds in them, widened for their small number; the noise is the same interval
for two processes of side A. `slower` and `faster` lie beyond the threshold and the noise, with an interval
that excludes 1 and a Mann-Whitney p below 0.01; of `same` the whole interval lies within the threshold."""


def prepare(out: Path) -> None:
    """Make the folder ``out``, or refuse one that holds something else.

    Raises:
        UsageError: it cannot be written, or is not empty and no comparison's.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = not any(out.iterdir())
    except OSError as error:
        raise UsageError(f"cannot write to {out}: {error.strerror}; choose another --out") from None
    if not empty and not (out / COMPARISON).is_file():
        raise UsageError(f"{out} is not empty and holds no comparison; choose another --out")


def write(out: Path, found: Compared, about: dict[str, Any]) -> None:
    """Write the tables, ``compare.md`` and the picture."""
    rows = pd.DataFrame(found.rows, columns=COLUMNS).convert_dtypes()
    checks = pd.DataFrame([dataclasses.asdict(check) for check in found.checks])
    turns = pd.DataFrame([{"case": case, **dataclasses.asdict(turn)} for case, turn in found.turns])
    write_atomically(out / COMPARISON, json.dumps(about, indent=2) + "\n")
    phases = pd.DataFrame(found.phases)
    for name, table in (("compare", rows), ("checks", checks), ("turns", turns), ("phases", phases)):
        if len(table):
            write_atomically(out / f"{name}.csv", table.to_csv(index=False))
        else:
            (out / f"{name}.csv").unlink(missing_ok=True)  # of an earlier comparison
    timed = rows[rows["time_ratio"].notna()]
    picture = len(timed) > 0
    if picture:
        save(_draw(timed, about), out / "compare")
    else:
        for suffix in ("png", "svg"):
            (out / f"compare.{suffix}").unlink(missing_ok=True)
    write_atomically(out / "compare.md", "\n".join(_page(found, about, picture)) + "\n")


def print_table(found: Compared) -> None:
    """The cases on the screen; under them what went wrong or stayed open, a line each."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in found.rows:
        worse = any(row[name] == value for name, value in WORSE.items()) or row["results"] == "wrong"
        table.add_row(*(escape(cell) for cell in _cells(row)), style="bold red" if worse else None)
    console = Console(highlight=False, width=max(WIDE, Console().width))  # a verdict is never cut off
    console.print(table)
    for line in _reasons(found):
        console.print(escape(line), soft_wrap=True)


def _page(found: Compared, about: dict[str, Any], picture: bool) -> list[str]:
    lines = ["# fwpkm-bench compare", "", f"`{about['command']}`", "", machine_line(about["environment"]), ""]
    lines += [f"- A: {about['a']['label']}", f"- B: {about['b']['label']}"]
    lines += [*(f"- {warning}" for warning in about["warnings"]), ""]
    if picture:
        lines += ["![The time of B over that of A, by case](compare.png)", ""]
    lines += markdown_table(HEADINGS, [_cells(row) for row in found.rows])
    lines += ["", *(f"- {reason}" for reason in _reasons(found)), "", NOTES, ""]
    return [*lines, f"**{summed_up(found)}** (threshold {about['threshold']:.0%})"]


def _reasons(found: Compared) -> list[str]:
    """What went wrong or stayed open, and which phases moved."""
    said = [f"{_name(row)}: {row['reason']}" for row in found.rows if row["reason"]]
    return said + [_moved(case, list(rows)) for case, rows in groupby(found.phases, key=itemgetter("case"))]


def _moved(case: str, phases: list[dict[str, Any]]) -> str:
    """The phases of a case that lost time, by how much."""
    whole = sum(row["ms_more"] for row in phases)
    said = [
        f"{row['phase']} {row['ms_a'] or 0:.3g} to {row['ms_b'] or 0:.3g} ms ({row['ms_more'] / whole:.0%})"
        for row in phases
        if whole > 0 and row["ms_more"] > LEAST_SHARE * whole and _apart(row)
    ]
    found = "; ".join(said) or "no phase lost time while both sides were profiled"
    return f"{case}: of {whole:.3g} ms more a step: {found}" if said else f"{case}: {found}"


def _apart(row: dict[str, Any]) -> bool:
    """Whether a phase's intervals on the two sides leave a gap, so far as there are any."""
    return row["ms_lo_b"] is None or row["ms_hi_a"] is None or row["ms_lo_b"] > row["ms_hi_a"]


def _name(row: dict[str, Any]) -> str:
    parts = [
        layer_name(row["layer"]),
        row["settings"] or "",
        row["mode"] or "recall",
        format_length(int(row["seq"])),
    ]
    parts += [f"B {row['batch']}"] * (row["batch"] != 1) + [row["dtype"]] * (row["dtype"] != "float32")
    return " ".join(filter(None, parts))


def _cells(row: dict[str, Any]) -> list[str]:
    results = row["results"] or ""
    if row["worst_error"] is not None:
        results += f", off by {row['worst_error']:.0e}"
    ratio = "" if row["time_ratio"] is None else f"{row['time_ratio']:.3f}"
    verdict = row["verdict"] or (row["status"] if row["status"] != "ok" else "")
    return [
        _name(row),
        results,
        ratio,
        _interval(row, "time_ratio"),
        _interval(row, "noise"),
        verdict,
        _memory(row),
        _recall(row),
    ]


def _interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_lo"], row[f"{name}_hi"]
    return "" if low is None else f"{low:.3f} to {high:.3f}"


def _memory(row: dict[str, Any]) -> str:
    if row["memory"] in (None, "same"):
        return row["memory"] or ""
    changed = {name: [row[f"{name}_bytes_{side}"] for side in "ab"] for name in ("peak_memory", "state")}
    said = [
        f"{name.partition('_')[0]} {byte_name(a)} to {byte_name(b)}"
        for name, (a, b) in changed.items()
        if a != b
    ]
    return f"{row['memory']}: {', '.join(said)}"


def _recall(row: dict[str, Any]) -> str:
    if row["recall"] in (None, "same", FAILED):
        return row["recall"] or ""
    return f"{row['recall']}: {row['recall_a']:.3f} to {row['recall_b']:.3f}"


def _draw(rows: pd.DataFrame, about: dict[str, Any]) -> Figure:
    """One line a case: the ratio and its interval, the noise behind it, the threshold as a band."""
    use_style()
    names = [_name(dict(row)) for _, row in rows.iterrows()]
    figure = Figure(figsize=(8.0, 1.9 + 0.42 * len(names)), layout="constrained")
    axes = figure.subplots()
    band = 1 + about["threshold"]
    axes.axvspan(1 / band, band, color="0.93", label=f"within {about['threshold']:.0%}")
    axes.axvline(1.0, color="0.6", linewidth=1)
    palette = sns.color_palette("colorblind", 10)
    said: set[str] = set()
    for place, (_, row) in enumerate(rows.iterrows()):
        verdict = row["verdict"]
        colour = palette[COLOURS[verdict]]
        if pd.notna(row["noise_lo"]):
            noise = "noise: A over A" if not place else None
            axes.plot([row["noise_lo"], row["noise_hi"]], [place] * 2, color="0.75", linewidth=9, label=noise)
        if pd.notna(row["time_ratio_lo"]):
            axes.plot([row["time_ratio_lo"], row["time_ratio_hi"]], [place] * 2, color=colour, linewidth=2.5)
        axes.plot(row["time_ratio"], place, "o", color=colour, label=None if verdict in said else verdict)
        said.add(verdict)
    axes.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    axes.set_xlabel("time of B over time of A (below 1: B is faster)")
    axes.grid(axis="y", visible=False)
    figure.suptitle(f"A: {about['a']['label']}    B: {about['b']['label']}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
