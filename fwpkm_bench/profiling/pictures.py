"""The pictures of a profile, drawn from its tables alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MultipleLocator

from fwpkm_bench.palette import Colour, colour_of, shade
from fwpkm_bench.plot import byte_name, save
from fwpkm_bench.profiling.folder import CASE, MEMORY, PHASES, read_profile, read_table

mpl.use("Agg")

LEADER: dict[str, Any] = {"arrowstyle": "-", "color": "0.45", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 0}
LEADER["relpos"] = (0, 0.5)  # from the left of the name
HALO = [withStroke(linewidth=2.5, foreground="white")]
BACK = "backward"
KINDS = ("weights", "inputs", "state", "gradients", "activations")
MOST_NAMED = 14  # phases beside their marks in the roofline
LEAST_INTENSITY = 1e-3  # FLOP a byte: what computes less does not belong under a roofline
CHARACTER, LINE = 6.3, 11.0  # of a name there, in points
SMALLEST = 0.01  # share of a phase that has a name there


def draw_all(folder: Path) -> list[Path]:
    """Draw what the tables of the profile ``folder`` allow, as PNG and SVG; returns the PNGs."""
    sns.set_theme(style="whitegrid", context="notebook", rc={"svg.hashsalt": "fwpkm-bench"})
    layer = str(read_profile(folder)["case"]["layer"])
    drawn = []
    if (folder / PHASES).exists():
        phases, total = read_table(folder / PHASES), read_table(folder / CASE).iloc[0]
        drawn.append(save(phase_bars(phases, colour_of(layer)), folder / "phases"))
        if (phases["flops"] > LEAST_INTENSITY * phases["bytes"]).any():
            drawn.append(save(roofline(phases, total, colour_of(layer)), folder / "roofline"))
    if (folder / MEMORY).exists():
        drawn.append(save(memory_over_time(read_table(folder / MEMORY)), folder / "memory"))
    return drawn


def phase_bars(phases: pd.DataFrame, colour: Colour) -> Figure:
    """How long each phase takes, and in a darker shade the time that the roofline asks for."""
    figure = Figure(figsize=(8.6, 1.5 + 0.42 * len(phases)), layout="constrained")
    axes = figure.subplots()
    rows = phases.iloc[::-1].reset_index(drop=True)
    light, dark = shade(colour, 0, 3), shade(colour, 2, 3)
    axes.barh(rows["phase"], rows["ms_p50"], color=light, height=0.72, label="measured (95% interval)")
    known = rows["ms_lo"].notna()
    middle = rows["ms_p50"][known]
    sides = [middle - rows["ms_lo"][known], rows["ms_hi"][known] - middle]
    axes.errorbar(middle, rows.index[known], xerr=sides, fmt="none", ecolor="0.25", elinewidth=1.2, capsize=3)
    floor = rows["roofline_ms"].fillna(0)
    axes.barh(
        rows["phase"], floor, color=dark, height=0.3, label="at the roofline: what it computes or moves"
    )
    reach = rows[["ms_p50", "ms_hi", "roofline_ms"]].max(axis=1)
    for place, (_, row) in enumerate(rows.iterrows()):
        said = f" {row['share']:.0%}, {row['bound']}"
        axes.annotate(said, (float(reach.iloc[place]), place), va="center", fontsize=9, color="0.25")
    axes.set(xlabel="ms a step", title="Phases")
    axes.set_xlim(0, 1.22 * float(reach.max()))
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def roofline(phases: pd.DataFrame, total: pd.Series, colour: Colour) -> Figure:
    """Operations a second against operations a byte, under the ceilings of the device."""
    rows = phases[(phases["flops"].fillna(0) > 0) & (phases["bytes"].fillna(0) > 0)].copy()
    rows["intensity"] = rows["flops"] / rows["bytes"]
    rows["rate"] = rows["tflop_per_s"] * 1e3
    rows = rows[(rows["rate"] > 0) & (rows["intensity"] > LEAST_INTENSITY)]
    peak, band = float(total["ceiling_tflop_per_s"]) * 1e3, float(total["ceiling_gb_per_s"])
    figure = Figure(figsize=(8.6, 5.4), layout="constrained")
    axes = figure.subplots()
    low, high = rows["intensity"].min() / 8, max(rows["intensity"].max() * 100, 30 * peak / band)
    x = np.geomspace(low, high, 200)
    axes.plot(x, np.minimum(peak, band * x), color="0.3", linewidth=2)
    light, dark = shade(colour, 0, 3), shade(colour, 2, 3)
    for back, fill in ((False, dark), (True, light)):
        some = rows[rows["phase"].str.startswith(BACK) == back]
        axes.scatter(some["intensity"], some["rate"], s=_area(some["share"]), color=fill, alpha=0.8,
                     linewidth=0.8, edgecolor="0.25")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP a byte moved by operators", ylabel="GFLOP / s",
             title="Roofline; the larger the mark, the more of the time")  # fmt: skip
    axes.set_xlim(low, high)
    bottom = float(rows["rate"].min()) / 4
    axes.set_ylim(bottom, peak * 3)
    start = max(low, bottom / band)
    look: dict[str, Any] = {
        "textcoords": "offset points",
        "fontsize": 9,
        "color": "0.3",
        "path_effects": HALO,
    }
    axes.annotate(f"matrix product: {peak:,.3g} GFLOP/s", (high, peak), (-4, 12), ha="right", **look)
    axes.annotate(f"copy: {band:,.3g} GB/s", (start, band * start), (26, 8), **look)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.10g}"))
    rows = rows.sort_values("rate", ascending=False)
    _name_points(axes, rows, rows[rows["share"] >= SMALLEST].nlargest(MOST_NAMED, "share"))
    return figure


def _name_points(axes: Axes, rows: pd.DataFrame, named: pd.DataFrame) -> None:
    """A name right of each of the marks ``named``, moved down until it meets no name and no mark."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    places = axes.transData.transform(rows[["intensity", "rate"]].to_numpy()) * scale
    radii = np.sqrt(_area(rows["share"]).to_numpy()) / 2
    # left, right, height, half of what they take up: in points
    taken = [(x - r, x + r, y, r) for (x, y), r in zip(places, radii, strict=True)]
    for (x, y), radius, (_, row) in zip(places, radii, rows.iterrows(), strict=True):
        if row["phase"] not in set(named["phase"]):
            continue
        left, height = x + radius + 4, y
        right = left + CHARACTER * len(row["phase"])
        for other_left, other_right, other, half in sorted(taken, key=lambda t: -t[2]):
            if left < other_right and other_left < right and abs(height - other) < half + LINE / 2:
                height = other - half - LINE / 2
        taken.append((left, right, height, LINE / 2))
        axes.annotate(
            row["phase"],
            (row["intensity"], row["rate"]),
            (left - x, height - y - 3),
            textcoords="offset points",
            fontsize=9,
            color="0.2",
            path_effects=HALO,
            arrowprops=LEADER if abs(height - y) > LINE / 2 else None,
        )


def _area(share: pd.Series) -> pd.Series:
    return 30 + 900 * share


def memory_over_time(rows: pd.DataFrame) -> Figure:
    """What lives in tensors, stacked, and the lines of what the process holds; on a GPU its power too."""
    power = "power_w" in rows and bool(rows["power_w"].notna().any())
    figure = Figure(figsize=(8.6, 6.4 if power else 4.6), layout="constrained")
    grid = figure.subplots(
        2 if power else 1, 1, squeeze=False, sharex=True, height_ratios=[3, 1][: 1 + power]
    )
    axes = grid[0, 0]
    palette = sns.color_palette("colorblind", 10)
    colours = [palette[i] for i in (7, 9, 3, 1, 0)]
    heights = [rows[f"{kind}_bytes"].fillna(0) for kind in KINDS]
    shown = [i for i, height in enumerate(heights) if height.max() > 0]
    axes.stackplot(
        rows["time_ms"],
        [heights[i] for i in shown],
        labels=[KINDS[i] for i in shown],
        colors=[colours[i] for i in shown],
        alpha=0.75,
        linewidth=0,
        step="post",
    )
    for name, label, dash in (
        ("resident_bytes", "resident in memory", "-"),
        ("reserved_bytes", "reserved by the allocator", "--"),
        ("process_bytes", "held by the process", "-"),
    ):
        if name in rows and rows[name].notna().any():
            axes.plot(rows["time_ms"], rows[name], dash, color="0.15", linewidth=1.4, label=label)
    backward = rows.loc[rows["phase"].str.startswith(BACK), "time_ms"]
    if len(backward):
        axes.axvline(backward.iloc[0], color="0.25", linewidth=1, linestyle=":")
        axes.annotate("backward", (backward.iloc[0], 1), (4, -12), xycoords=("data", "axes fraction"),
                      textcoords="offset points", fontsize=9, color="0.25")  # fmt: skip
    axes.yaxis.set_major_locator(MultipleLocator(_byte_step(axes.get_ylim()[1])))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda n, _: byte_name(n)))
    axes.set(ylabel="memory", title="Memory over the first call")
    axes.set_xlim(max(0.0, rows["time_ms"].min()), rows["time_ms"].max())
    axes.set_ylim(0, None)
    if power:
        grid[1, 0].plot(rows["time_ms"], rows["power_w"], color="0.15", linewidth=1.4)
        grid[1, 0].set(ylabel="W", ylim=(0, None))
    grid[-1, 0].set_xlabel("ms, stretched by the observation")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _byte_step(highest: float) -> float:
    """A power of two, some eight of which reach ``highest``."""
    return float(2.0 ** np.ceil(np.log2(max(highest, 8.0) / 8)))
