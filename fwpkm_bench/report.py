"""What people read: the table on the screen, ``report.md`` and ``report.html``, and the doctor's word."""

import html
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

from fwpkm_bench.measurement import Check, Compiled
from fwpkm_bench.plot import by_mode, byte_name, picture_suffix
from fwpkm_bench.store import read_run, write_atomically
from fwpkm_bench.tables import labels, length_name, ratios

HEADINGS = ("layer", "tokens", "tokens/s", "95% interval", "peak memory", "state", "recall", "95% interval")
RATIO_HEADINGS = (
    *("ours", "theirs", "mode", "tokens", "tokens/s, ours / theirs", "interval"),
    "peak memory, ours / theirs",
)
PICTURES = {
    "overview": "Speed, memory and recall against sequence length.",
    "tradeoff": "Recall against speed; the larger the mark, the more state must be carried.",
    "recall_by_age": "Recall by the age of the pair.",
    "state": "What a layer must carry to go on after the sequence.",
}
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
img {{ max-width: 100% }} code {{ background: #f3f3f3; padding: .1rem .3rem }}
</style></head><body>
<h1>{title}</h1><p><code>{command}</code></p><p>{machine}</p>
{pictures}
<h2>Table</h2>{table}
<p>All columns: <a href="summary.csv">summary.csv</a>, <a href="table.csv">table.csv</a>.
Tokens/s is the median; its interval and that of recall are 95%.
Peak memory is above weights and inputs, in decode also above the state.</p>
</body></html>
"""


def write(out: Path, frame: pd.DataFrame, short: pd.DataFrame) -> None:
    """Write ``report.md`` and ``report.html`` of the run folder ``out``."""
    run = read_run(out)
    title = f"fwpkm-bench: {run['sweep']['name'] or out.name}"
    machine = machine_line(run["environment"])
    headings, rows = headings_and_rows(short)
    shown = pictures_and_captions(out / "plots", short)

    lines = [f"# {title}", "", f"`{run['command']}`", "", machine, ""]
    lines += [line for name, text in shown.items() for line in (f"![{text}](plots/{name}.png)", "")]
    lines += markdown_table(headings, rows)
    compared = ratio_headings_and_rows(ratios(short))
    if compared[1]:
        lines += ["", "## Against other implementations", "", *markdown_table(*compared)]
    write_atomically(out / "report.md", "\n".join(lines) + "\n")

    pictures = "\n".join(
        f'<p><img src="plots/{name}.png" alt="{html.escape(text)}"></p>' for name, text in shown.items()
    )
    tables = html_table(headings, rows)
    if compared[1]:
        tables += f"<h2>Against other implementations</h2>{html_table(*compared)}"
    page = PAGE.format(
        title=html.escape(title),
        command=html.escape(run["command"]),
        machine=html.escape(machine),
        pictures=pictures,
        table=tables,
    )
    write_atomically(out / "report.html", page)


def pictures_and_captions(plots: Path, short: pd.DataFrame) -> dict[str, str]:
    """The pictures of the folder ``plots`` that a report shows: of all modes, then those of each."""
    modes = {picture_suffix(mode): mode for mode, _ in by_mode(short)}
    found = {}
    for suffix, mode in {"": "", **modes}.items():
        for name, caption in PICTURES.items():
            if (plots / f"{name}{suffix}.png").exists():
                found[name + suffix] = f"{mode.capitalize()}. {caption}" if suffix else caption
    return found


def markdown_table(headings: list[str], rows: list[list[str]]) -> list[str]:
    """The lines of a table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def html_table(headings: list[str], rows: list[list[str]]) -> str:
    """The same as a page shows it."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def print_summary(short: pd.DataFrame) -> None:
    """The table on the screen, and under it the ratios to the peers that were measured."""
    print_table(*headings_and_rows(short))
    headings, rows = ratio_headings_and_rows(ratios(short))
    if rows:
        print()
        print_table(headings, rows)


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """``rows`` on the screen; those of fwpkm stand out."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row), style="bold" if row[0].startswith("fwpkm") else None)
    Console(width=None if Console().is_terminal else 140).print(table)


def headings_and_rows(short: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """The summary as text, one row a configuration; a row that failed says why in place of numbers."""
    if short.empty:
        return list(HEADINGS), []
    modes = "mode" in short and short["mode"].nunique() > 1
    rows = []
    for label, (_, row) in zip(labels(short), short.iterrows(), strict=True):
        name = f"{label} ({row['mode']})" if modes and pd.notna(row["mode"]) else label
        cells = [name, length_name(row["seq"])]
        cells += [_number(row["tokens_per_s"]), _interval(row, "tokens_per_s", "{:,.0f}")]
        cells += [_bytes(row["peak_memory_bytes"]), _bytes(row["state_bytes"])]
        cells += [_share(row["recall"]), _interval(row, "recall", "{:.3f}")]
        if row["status"] != "ok":
            reason = f"{row['status']}: {row['reason']}" if pd.notna(row["reason"]) else row["status"]
            cells[2] = reason if cells[2] == "" else f"{cells[2]} ({reason})"
        rows.append(cells)
    return list(HEADINGS), rows


def ratio_headings_and_rows(compared: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """`ratios` as text."""
    rows = []
    for _, row in compared.iterrows():
        cells = [row["layer"], row["peer"], row["mode"], length_name(row["seq"])]
        cells += [_ratio(row["tokens_per_s_ratio"]), _interval(row, "tokens_per_s_ratio", "{:,.3g}")]
        rows.append([*cells, _ratio(row["peak_memory_ratio"])])
    return list(RATIO_HEADINGS), rows


def machine_line(environment: dict[str, Any]) -> str:
    """Where it was measured, in one line."""
    gpus = "".join(f"{gpu['name']}; " for gpu in environment["gpus"])
    cores = environment["threads"] or environment["cores"]
    memory = environment["memory_bytes"] / 2**30
    versions = environment["versions"]
    git = environment["git"]
    commit = f"commit {git['commit'][:10]}{' with changes' if git['dirty'] else ''}" if git else "no checkout"
    return (
        f"{gpus}{environment['cpu']}, {cores} cores, {memory:.0f} GiB; "
        f"Python {environment['python']}, torch {versions['torch']}; {commit}"
    )


WIDE = 160  # columns that a table of checks may take: a reason stays on its line


def print_checks(checks: list[Check], seed: int) -> None:
    """One line a quantity: its relative error and what is allowed; then how to see it again."""
    console = Console(highlight=False, width=WIDE)
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "backend", "variant", "dtype", "what", "relative error", "allowed", ""):
        side: JustifyMethod = "right" if heading in ("relative error", "allowed") else "left"
        table.add_column(heading, justify=side, no_wrap=True)
    for check in checks:
        numbers = ("" if x is None else f"{x:.1e}" for x in (check.error, check.allowed))
        said = escape(": ".join(filter(None, (check.status, check.reason))))
        table.add_row(check.layer, check.backend, check.variant, check.dtype, check.what, *numbers, said)
    console.print(table)
    statuses = [check.status for check in checks]
    counts = {status: statuses.count(status) for status in ("ok", "wrong", "failed", "skipped")}
    summed = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    again = sum(check.status == "ok" and check.reason.startswith("second draw") for check in checks)
    summed += f", {again} of the ok ones in a second draw" if again else ""
    console.print(f"{summed or 'nothing to check'} (--seed {seed})")


def print_kernels(rows: list[Compiled], capability: int) -> None:
    """One line a kernel as it was compiled, the costliest of those that differ in what does not show."""
    console = Console(highlight=False, width=WIDE)
    table = Table(box=None, pad_edge=False)
    for heading in ("kernel", "constants", "warps", "registers", "spilled bytes", "shared memory"):
        side: JustifyMethod = "left" if heading in ("kernel", "constants") else "right"
        table.add_column(heading, justify=side, no_wrap=True)
    worst: dict[tuple[str, str], Compiled] = {}
    for row in rows:
        known = worst.setdefault((row.kernel, row.constants), row)
        if (row.spilled_bytes, row.registers) > (known.spilled_bytes, known.registers):
            worst[row.kernel, row.constants] = row
    for row in worst.values():
        numbers = (row.warps, row.registers, row.spilled_bytes)
        shared = byte_name(row.shared_bytes)
        table.add_row(row.kernel, escape(row.constants), *map(str, numbers), shared)
    console.print(table)
    console.print(f"{len(worst)} kernels for sm_{capability}; registers and spills are of a thread")


def print_doctor() -> None:
    """Versions, devices, and each layer's backends with what keeps one from running."""
    import torch

    from fwpkm_bench import catalog
    from fwpkm_bench.measure.environment import describe

    console = Console(highlight=False, soft_wrap=True)
    environment = describe()
    console.print(escape(machine_line(environment)))
    for package, version in environment["versions"].items():
        console.print(f"  {package:<14} {version}")
    cuda = torch.cuda.is_available()
    console.print("device cpu: yes")
    console.print(f"device cuda: {'yes' if cuda else 'no, torch sees no GPU'}")
    for name in catalog.layer_names():
        try:
            backends = ", ".join(catalog.load_layer(name).backends)
        except Exception as error:  # noqa: BLE001 - an entry point of somebody else's may fail anyhow
            backends = f"fails to import: {type(error).__name__}: {error}"
        console.print(f"layer {name:<10} {escape(backends)}")


def _number(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:,.0f}"


def _bytes(value: Any) -> str:
    return "" if pd.isna(value) else byte_name(float(value))


def _ratio(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:,.3g}"


def _share(value: Any) -> str:
    return "" if pd.isna(value) else f"{value:.3f}"


def _interval(row: pd.Series, name: str, form: str) -> str:
    low, high = row[f"{name}_lo"], row[f"{name}_hi"]
    if pd.isna(row[name]):
        return ""
    return "measured once" if pd.isna(low) else f"{form.format(low)} to {form.format(high)}"
