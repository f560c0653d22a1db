"""The pictures, drawn from rows alone: one colour a layer everywhere."""

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from fwpkm_bench.tables import labels, length_name

mpl.use("Agg")

LAYERS = ("softmax", "linear", "gdn", "pkm", "fwpkm")  # their colours never change; others follow
DASHES = ("-", "--", ":", "-.")
MARKERS = "os^Dv"
DPI = 160
TRADE_OFF_LENGTHS = 3
SMALLEST_MARK, LARGEST_MARK = 40.0, 900.0

LABEL_WIDTH = 2.2  # as a ratio of speeds: labels closer than this stand in two rows

Panel = Callable[[Axes, pd.DataFrame], None]


def draw_all(frame: pd.DataFrame, short: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw every picture that the rows allow, as PNG and SVG; returns the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    sns.set_theme(style="whitegrid", context="notebook", rc={"svg.hashsalt": "fwpkm-bench"})
    drawn: list[Path] = []
    has_speed = "tokens_per_s" in short and short["tokens_per_s"].notna().any()
    has_recall = "recall" in short and short["recall"].notna().any()
    for mode, rows in _modes(short):
        suffix = "" if mode in ("", "prefill") else f"_{mode}"
        panels: list[tuple[str, Panel]] = []
        if has_speed:
            panels += [("tokens_per_s", draw_speed), ("memory", draw_memory), ("state", draw_state)]
        if has_recall and not suffix:
            panels += [("recall", draw_recall)]
        for name, panel in panels:
            drawn.append(_save(_single(rows, panel), folder / f"{name}{suffix}"))
        if has_speed and has_recall:
            drawn.append(_save(_overview(rows), folder / f"overview{suffix}"))
            drawn.append(_save(_trade_off(rows), folder / f"tradeoff{suffix}"))
        elif panels:
            drawn.append(_save(_row_of([p for _, p in panels], rows), folder / f"overview{suffix}"))
    if has_recall:
        drawn.append(_save(_by_age(frame), folder / "recall_by_age"))
    return drawn


def draw_speed(axes: Axes, rows: pd.DataFrame) -> None:
    """Tokens a second against length, both logarithmic, with the interval of the median."""
    _lines(axes, rows, "tokens_per_s", low="tokens_per_s_lo", high="tokens_per_s_hi")
    axes.set(yscale="log", ylabel="tokens / s", title="Speed")


def draw_memory(axes: Axes, rows: pd.DataFrame) -> None:
    """Peak memory above weights and inputs against length."""
    _lines(axes, rows, "peak_memory_bytes")
    _byte_axis(axes)
    axes.set(ylabel="peak memory above weights and inputs", title="Memory")


def draw_state(axes: Axes, rows: pd.DataFrame) -> None:
    """Bytes that must be carried on after the sequence; a layer that carries none has no line."""
    _lines(axes, rows[rows["state_bytes"].fillna(0) > 0], "state_bytes")
    _byte_axis(axes)
    axes.set(ylabel="state carried after the sequence", title="State")


def draw_recall(axes: Axes, rows: pd.DataFrame) -> None:
    """Share of the written pairs that are recalled against their number."""
    _lines(axes, rows, "recall", low="recall_lo", high="recall_hi")
    axes.set(ylim=(-0.03, 1.05), ylabel="recall of single written pairs", title="Recall")
    axes.set_xlabel("pairs written")


def _lines(axes: Axes, rows: pd.DataFrame, column: str, *, low: str = "", high: str = "") -> None:
    rows = rows[rows[column].notna()]
    dashes: dict[str, itertools.cycle[str]] = {}
    for label, line in rows.groupby(labels(rows), sort=False):
        layer = str(line["layer"].iloc[0])
        style = next(dashes.setdefault(layer, itertools.cycle(DASHES)))
        line = line.sort_values("seq")
        x, y = (line[name].astype(float).to_numpy() for name in ("seq", column))
        colour = colour_of(layer)
        # The thick line lies below the thin ones, so that both show where they meet.
        own = layer == "fwpkm"
        axes.plot(
            x,
            y,
            style,
            color=colour,
            marker=_marker(layer),
            markersize=9 if own else 5.5,
            linewidth=4 if own else 1.8,
            zorder=2.1 if own else 2.5,
            label=label,
        )
        if low:
            below, above = (line[name].astype(float).to_numpy() for name in (low, high))
            axes.fill_between(x, below, above, color=colour, alpha=0.2, linewidth=0)
    axes.set_xscale("log", base=2)
    lengths = sorted(rows["seq"].unique())
    axes.set_xticks([float(n) for n in lengths][:: 1 + len(lengths) // 9])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: length_name(int(n))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sequence length (tokens)")


def colour_of(layer: str) -> tuple[float, float, float]:
    """The colour of a layer, from a palette that colour-blind people can tell apart."""
    palette = sns.color_palette("colorblind", 10)
    order = [0, 2, 1, 7, 3]  # blue, green, orange, grey, and vermilion for the memory this project is about
    if layer in LAYERS:
        return palette[order[LAYERS.index(layer)]]
    others = [i for i in range(10) if i not in order]
    return palette[others[sum(map(ord, layer)) % len(others)]]


def _marker(layer: str) -> str:
    return MARKERS[LAYERS.index(layer)] if layer in LAYERS else "P"


def _byte_axis(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    exponents = np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    axes.set_yticks([2.0**e for e in exponents[:: 1 + len(exponents) // 8]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: byte_name(n)))
    axes.yaxis.set_minor_locator(NullLocator())


def byte_name(count: float) -> str:
    """``1048576`` as ``1 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _modes(short: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each mode; rows without one (recall alone) go with every mode."""
    if "mode" not in short or short["mode"].dropna().empty:
        return [("", short)]
    return [
        (str(m), short[(short["mode"] == m) | short["mode"].isna()]) for m in short["mode"].dropna().unique()
    ]


def _single(rows: pd.DataFrame, panel: Panel) -> Figure:
    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    panel(axes, rows)
    axes.legend(frameon=True)
    return figure


def _overview(rows: pd.DataFrame) -> Figure:
    return _row_of([draw_speed, draw_memory, draw_recall], rows)


def _row_of(panels: list[Panel], rows: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(4.6 * len(panels), 4.7), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        panel(axes, rows)
    handles = {label: h for axes in grid for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(6, len(handles)),
        frameon=False,
    )
    return figure


def _trade_off(rows: pd.DataFrame) -> Figure:
    """Recall against tokens a second, larger marks for more state: up and to the right is better."""
    rows = rows[rows["tokens_per_s"].notna() & rows["recall"].notna()]
    lengths = sorted(rows["seq"].unique())
    shown = [
        lengths[i] for i in sorted({round(i) for i in np.linspace(0, len(lengths) - 1, TRADE_OFF_LENGTHS)})
    ]
    figure = Figure(figsize=(4.6 * len(shown), 4.9), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    names = labels(rows)
    state = rows["state_bytes"].astype(float)
    largest = max(state.max(), 1.0)
    for axes, seq in zip(grid, shown, strict=True):
        before: dict[bool, tuple[float, int]] = {}  # of labels at the top and bottom: speed and row
        for index, row in rows[rows["seq"] == seq].sort_values("tokens_per_s").iterrows():
            share = np.sqrt(float(row["state_bytes"]) / largest)
            area = SMALLEST_MARK + (LARGEST_MARK - SMALLEST_MARK) * share
            colour = colour_of(row["layer"])
            axes.scatter(row["tokens_per_s"], row["recall"], s=area, color=colour, alpha=0.75, linewidth=0)
            low = bool(row["recall"] < 0.5)
            speed = float(row["tokens_per_s"])
            last_speed, last_row = before.get(low, (0.0, 1))
            level = 1 - last_row if speed < LABEL_WIDTH * last_speed else 0  # neighbours take turns
            before[low] = speed, level
            away = 9 + np.sqrt(area) / 2 + 30 * level
            axes.annotate(
                f"{names[index]}\n{byte_name(float(row['state_bytes']))}",
                (row["tokens_per_s"], row["recall"]),
                xytext=(0, away if low else -away),
                textcoords="offset points",
                ha="center",
                va="bottom" if low else "top",
                fontsize=9,
                color=tuple(0.75 * c for c in colour),
            )
        axes.set(xscale="log", ylim=(-0.06, 1.08), title=f"{length_name(seq)} tokens", xlabel="tokens / s")
        axes.margins(x=0.25)
    grid[0].set_ylabel("recall")
    figure.suptitle("Recall against speed; the larger the mark, the more state must be carried", fontsize=12)
    return figure


def _by_age(frame: pd.DataFrame) -> Figure:
    """Recall of each tenth of the pairs, newest first, one panel a length."""
    rows = frame[(frame["workload"] == "recall") & frame["recall"].notna()].reset_index(drop=True)
    lengths = sorted(rows["seq"].unique())
    columns = min(3, len(lengths))
    lines = -(-len(lengths) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    ages = [c for c in rows.columns if c.startswith("recall_age_")]
    names = labels(rows)
    for axes, seq in zip(grid, lengths, strict=False):
        here = rows[rows["seq"] == seq]
        for label, group in here.groupby(names[here.index], sort=False):
            layer = group["layer"].iloc[0]
            mean = group[ages].astype(float).mean()
            tenths = np.arange(1, len(ages) + 1)
            own = layer == "fwpkm"
            axes.plot(
                tenths,
                mean,
                marker=_marker(layer),
                color=colour_of(layer),
                label=label,
                markersize=8 if own else 5,
                linewidth=3.5 if own else 1.5,
                zorder=2.1 if own else 2.5,
            )
        axes.set(title=f"{length_name(seq)} pairs", ylim=(-0.04, 1.06), xticks=range(1, len(ages) + 1))
    for axes in grid[len(lengths) :]:
        axes.set_visible(False)
    handles, texts = grid[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside upper center", ncols=min(6, len(texts)), frameon=False)
    figure.supxlabel("age of the pair, in tenths of all pairs (1 = newest)", fontsize=11)
    figure.supylabel("recall", fontsize=11)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=DPI)
    return path.with_suffix(".png")
