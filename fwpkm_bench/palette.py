"""How a row looks in every picture: one colour a layer, and shades of it for its settings."""

from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import seaborn as sns

from fwpkm_bench import catalog
from fwpkm_bench.tables import labels

LAYERS = ("softmax", "linear", "gdn", "pkm", "fwpkm")  # their colours never change; others follow
MARKERS = "os^Dv"
DASHES = ("-", (0, (5, 1.5)), (0, (2, 1.2)), (0, (5, 1.5, 1, 1.5)))
STYLE = ("colour", "dash", "width")
SHADE = 0.55  # how far the shades of a colour go towards white and black

Colour: TypeAlias = tuple[float, ...]


def styled(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` with columns ``label``, ``colour``, ``dash`` and ``width``, one combination a label.

    A layer that is there once has its colour. Its settings, if it is there with several, go from a light
    shade of it to a dark one and from a wide line to a thin one, so that lines on top of each other show.
    """
    rows = rows.assign(label=labels(rows))
    styles: dict[str, tuple[Colour, Any, float]] = {}
    for layer, group in rows.groupby("layer", sort=False):
        names = list(group["label"].unique())
        widths = [4.0 if layer == "fwpkm" else 1.8]
        if len(names) > 1:
            widths = list(np.linspace(4.5, 1.5, len(names)))
        for index, name in enumerate(names):
            colour = shade(colour_of(str(layer)), index, len(names))
            styles[name] = (colour, DASHES[index % len(DASHES)], widths[index])
    looks = pd.DataFrame([styles[label] for label in rows["label"]], rows.index, STYLE)
    return pd.concat([rows, looks], axis=1)


def colour_of(layer: str) -> Colour:
    """The colour of a layer, from a palette that colour-blind people can tell apart."""
    palette = sns.color_palette("colorblind", 10)
    order = [0, 2, 1, 7, 3]  # blue, green, orange, grey, and vermilion for the memory this project is about
    if layer in LAYERS:
        return palette[order[LAYERS.index(layer)]]
    others = [i for i in range(10) if i not in order]
    peers = catalog.peer_names()
    if layer in peers:
        return palette[others[peers.index(layer) % len(others)]]
    return palette[others[sum(map(ord, layer)) % len(others)]]


def shade(colour: Colour, index: int, count: int) -> Colour:
    """``colour`` itself where ``count`` is 1; otherwise one of so many shades, from light to dark."""
    if count == 1:
        return colour
    place = 2 * index / (count - 1) - 1  # -1 to 1
    target = 1.0 if place < 0 else 0.0
    return tuple(c + SHADE * abs(place) * (target - c) for c in colour)


def marker_of(layer: str) -> str:
    """The mark of a layer's points."""
    return MARKERS[LAYERS.index(layer)] if layer in LAYERS else "P"
