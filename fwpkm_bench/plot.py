"""The pictures, drawn from rows alone."""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, Literal, TypeAlias

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from fwpkm_bench.palette import STYLE, marker_of, styled
from fwpkm_bench.tables import length_name

mpl.use("Agg")

TITLES = {"train": "Speed of training: forward and backward", "decode": "Speed of decoding"}
DPI = 160
TRADE_OFF_LENGTHS = 3
SMALLEST_MARK, LARGEST_MARK = 40.0, 900.0

LABEL_HEIGHT = 0.15  # in recall
LABEL_WIDTH = 2.2  # as a ratio of speeds: labels closer than this stand in two rows
MOST_NAMED, LONGEST_NAMED = 7, 12  # more or longer labels stand in a legend, not beside their marks

Place: TypeAlias = Literal["outside lower center", "outside upper center"]
Panel: TypeAlias = Callable[[Axes, pd.DataFrame], None]


def draw_all(frame: pd.DataFrame, short: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw every picture that the rows allow, as PNG and SVG; returns the PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    sns.set_theme(style="whitegrid", context="notebook", rc={"svg.hashsalt": "fwpkm-bench"})
    drawn: list[Path] = []
    for mode, rows in by_mode(short):
        rows = styled(rows)
        suffix = picture_suffix(mode)
        has_speed, has_recall = (
            name in rows and bool(rows[name].notna().any()) for name in ("tokens_per_s", "recall")
        )
        panels: dict[str, Panel] = {}
        if has_speed:
            panels |= {"tokens_per_s": draw_speed, "memory": draw_memory, "state": draw_state}
        if has_recall and not any(path.stem == "recall" for path in drawn):  # it is the same in every mode
            panels |= {"recall": draw_recall}
        for name, panel in panels.items():
            where = name if name == "recall" else name + suffix
            drawn.append(save(_row_of((panel,), rows), folder / where))
        if has_speed and has_recall:
            three = (draw_speed, draw_memory, draw_recall)
            drawn.append(save(_row_of(three, rows), folder / f"overview{suffix}"))
            if (rows["tokens_per_s"].notna() & rows["recall"].notna()).any():
                drawn.append(save(_trade_off(rows), folder / f"tradeoff{suffix}"))
        elif panels:
            drawn.append(save(_row_of(panels.values(), rows), folder / f"overview{suffix}"))
    if any(path.stem == "recall" for path in drawn):
        drawn.append(save(_by_age(frame), folder / "recall_by_age"))
    return drawn


def by_mode(short: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each mode; rows without one (recall alone) go with every mode."""
    if "mode" not in short or short["mode"].dropna().empty:
        return [("", short)]
    return [
        (str(m), short[(short["mode"] == m) | short["mode"].isna()]) for m in short["mode"].dropna().unique()
    ]


def picture_suffix(mode: str) -> str:
    """What the file names of the pictures of ``mode`` end in: nothing for the usual one."""
    return "" if mode in ("", "prefill") else f"_{mode}"


def draw_speed(axes: Axes, rows: pd.DataFrame) -> None:
    """Tokens a second against length, both logarithmic, with the interval of the median."""
    _lines(axes, rows, "tokens_per_s", low="tokens_per_s_lo", high="tokens_per_s_hi")
    axes.set(yscale="log", ylabel="tokens / s", title=TITLES.get(_mode(rows), "Speed"))
    _plain_numbers(axes.yaxis)
    if _mode(rows) == "decode" and rows["batch"].nunique() == 1:
        batch = int(rows["batch"].dropna().iloc[0])
        mirror = axes.secondary_yaxis("right", functions=(lambda v: _over(1e3 * batch, v),) * 2)
        mirror.set_ylabel("ms a token")
        _plain_numbers(mirror.yaxis)


def draw_memory(axes: Axes, rows: pd.DataFrame) -> None:
    """Peak memory above weights and inputs (decoding: and the state) against length."""
    _lines(axes, rows[rows["peak_memory_bytes"].fillna(0) > 0], "peak_memory_bytes")
    _byte_axis(axes)
    above = "weights and state" if _mode(rows) == "decode" else "weights and inputs"
    axes.set(ylabel=f"peak memory above {above}", title="Memory")


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
    for rank, (label, line) in enumerate(rows.groupby("label", sort=False)):
        layer, colour, dash, width = (line[name].iloc[0] for name in ("layer", *STYLE))
        line = line.sort_values("seq")
        x, y = (line[name].astype(float).to_numpy() for name in ("seq", column))
        axes.plot(
            x,
            y,
            linestyle=dash,
            color=colour,
            marker=marker_of(layer),
            markersize=4 + 1.25 * width,
            linewidth=width,
            zorder=2.5 - width / 10 + rank / 1000,  # thick lines lie below thin ones
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
    decode = _mode(rows) == "decode"
    axes.set_xlabel("context (tokens)" if decode else "sequence length (tokens)")


def _mode(rows: pd.DataFrame) -> str:
    """The mode that all of ``rows`` have, as far as they have one."""
    if "mode" not in rows or rows["mode"].dropna().empty:
        return ""
    return str(rows["mode"].dropna().iloc[0])


def _over(number: float, values: Any) -> Any:
    """``number / values``, infinity for 0; its own inverse."""
    with np.errstate(divide="ignore"):
        return number / np.asarray(values, dtype=float)


def _byte_axis(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    exponents = np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1)
    axes.set_yticks([2.0**e for e in exponents[:: 1 + len(exponents) // 8]])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: byte_name(n)))
    axes.yaxis.set_minor_locator(NullLocator())


def _plain_numbers(axis: Axis) -> None:
    """Of a logarithmic axis: 1, 2, 5, 10 ... rather than powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.10g}"))
    axis.set_minor_locator(NullLocator())


def byte_name(count: float) -> str:
    """``1048576`` as ``1 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"


def _row_of(panels: Collection[Panel], rows: pd.DataFrame) -> Figure:
    """The panels side by side, with one legend below them."""
    width = max(6.4, 4.6 * len(panels))
    figure = Figure(figsize=(width, 4.7), layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        panel(axes, rows)
    _legend(figure, grid, "outside lower center", width)
    return figure


def _legend(figure: Figure, grid: Iterable[Axes], where: Place, width: float) -> None:
    """One legend for all of ``grid``, in as many columns as fit into ``width`` inches."""
    handles = {label: h for axes in grid for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    longest = max(map(len, handles), default=0)
    columns = max(1, min(6, len(handles), int(width / (0.65 + 0.09 * longest))))
    figure.set_figheight(figure.get_figheight() + 0.25 * (-(-len(handles) // columns) - 1))
    figure.legend(handles.values(), handles.keys(), loc=where, ncols=columns, frameon=False)


def _trade_off(rows: pd.DataFrame) -> Figure:
    """Recall against tokens a second, larger marks for more state: up and to the right is better."""
    rows = rows[rows["tokens_per_s"].notna() & rows["recall"].notna()]
    lengths = sorted(rows["seq"].unique())
    shown = [
        lengths[i] for i in sorted({round(i) for i in np.linspace(0, len(lengths) - 1, TRADE_OFF_LENGTHS)})
    ]
    width = max(6.4, 4.6 * len(shown))
    figure = Figure(figsize=(width, 4.9), layout="constrained")
    grid = figure.subplots(1, len(shown), squeeze=False, sharex=True, sharey=True)[0]
    named = rows["label"].nunique() <= MOST_NAMED and rows["label"].str.len().max() <= LONGEST_NAMED
    state = rows["state_bytes"].astype(float)
    spread = np.sqrt(state / max(state.max(), 1.0))
    rows = rows.assign(area=SMALLEST_MARK + (LARGEST_MARK - SMALLEST_MARK) * spread)
    for axes, seq in zip(grid, shown, strict=True):
        here = rows[rows["seq"] == seq]
        for _, row in here.sort_values("area", ascending=False).iterrows():
            place = row["tokens_per_s"], row["recall"]
            axes.scatter(*place, s=row["area"], color=row["colour"], alpha=0.75, linewidth=0)
            if not named:
                axes.plot([], [], "o", color=row["colour"], label=row["label"])
        if named:
            _name_marks(axes, here)
        axes.set(xscale="log", ylim=(-0.06, 1.08), title=f"{length_name(seq)} tokens", xlabel="tokens / s")
        axes.margins(x=0.25)
    grid[0].set_ylabel("recall")
    figure.suptitle("Recall against speed; the larger the mark, the more state must be carried", fontsize=12)
    if not named:
        _legend(figure, grid, "outside lower center", width)
    return figure


def _name_marks(axes: Axes, rows: pd.DataFrame) -> None:
    """Write label and state beside each mark, above those at the bottom and below those at the top."""
    before: dict[bool, tuple[float, int]] = {}  # of labels at the top and bottom: speed and row
    for _, row in rows.sort_values("tokens_per_s").iterrows():
        low = bool(row["recall"] < 0.5)
        speed = float(row["tokens_per_s"])
        last_speed, last_row = before.get(low, (0.0, 1))
        level = 1 - last_row if speed < LABEL_WIDTH * last_speed else 0  # neighbours take turns
        before[low] = speed, level
        away = 9 + np.sqrt(row["area"]) / 2 + 30 * level
        near = rows["recall"][(rows["recall"] - row["recall"]).abs() < LABEL_HEIGHT]
        axes.annotate(
            f"{row['label']}\n{byte_name(float(row['state_bytes']))}",
            (speed, near.max() if low else near.min()),  # beyond the marks of all neighbours
            xytext=(0, away if low else -away),
            textcoords="offset points",
            ha="center",
            va="bottom" if low else "top",
            fontsize=9,
            color=tuple(0.75 * c for c in row["colour"]),
        )


def _by_age(frame: pd.DataFrame) -> Figure:
    """Recall of each tenth of the pairs, newest first, one panel a length."""
    rows = frame[(frame["workload"] == "recall") & frame["recall"].notna()]
    rows = styled(rows)
    lengths = sorted(rows["seq"].unique())
    columns = min(3, len(lengths))
    lines = -(-len(lengths) // columns)
    width = max(6.4, 4.2 * columns)
    figure = Figure(figsize=(width, 3.1 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    ages = [c for c in rows.columns if c.startswith("recall_age_")]
    tenths = np.arange(1, len(ages) + 1)
    for axes, seq in zip(grid, lengths, strict=False):
        for label, group in rows[rows["seq"] == seq].groupby("label", sort=False):
            layer, colour, dash, line = (group[name].iloc[0] for name in ("layer", *STYLE))
            axes.plot(
                tenths,
                group[ages].astype(float).mean(),
                linestyle=dash,
                marker=marker_of(layer),
                color=colour,
                label=label,
                markersize=4 + line,
                linewidth=line,
                zorder=2.5 - line / 10,
            )
        axes.set(title=f"{length_name(seq)} pairs", ylim=(-0.04, 1.06), xticks=range(1, len(ages) + 1))
    for axes in grid[len(lengths) :]:
        axes.set_visible(False)
    _legend(figure, grid[: len(lengths)], "outside upper center", width)
    figure.supxlabel("age of the pair, in tenths of all pairs (1 = newest)", fontsize=11)
    figure.supylabel("recall", fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """``figure`` as PNG and SVG; returns the PNG."""
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(path.with_suffix(".png"), dpi=DPI)
    return path.with_suffix(".png")
