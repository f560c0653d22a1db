"""Tidy tables from the journal: one row a case, and one row a configuration."""

from pathlib import Path
from typing import Any

import pandas as pd

from fwpkm_bench import catalog
from fwpkm_bench.ranges import format_length
from fwpkm_bench.stats import wilson_interval
from fwpkm_bench.store import read_journal, read_run, write_atomically

COLUMNS = [
    *("case_id", "layer", "backend", "workload", "mode", "seq", "batch", "dtype", "device", "seed"),
    *("status", "reason", "tokens_per_s", "tokens_per_s_lo", "tokens_per_s_hi"),
    *("latency_ms_p20", "latency_ms_p50", "latency_ms_p80", "samples"),
    *("peak_memory_bytes", "vram_process_bytes", "state_bytes", "parameters"),
    *("recall", "recall_lo", "recall_hi", "cosine"),
]
KEYS = ["layer", "backend", "seq", "dtype", "device"]  # what rows of all workloads have in common
SPEED = ["tokens_per_s", "tokens_per_s_lo", "tokens_per_s_hi", "peak_memory_bytes", "state_bytes"]
RECALL = ["recall", "recall_lo", "recall_hi"]
OTHER = "_of_recall"
SAME = ["mode", "seq", "batch", "dtype", "device"]  # what a layer and its peer must have in common
RATIOS = [
    *("layer", "peer", *SAME, "tokens_per_s_ratio", "tokens_per_s_ratio_lo", "tokens_per_s_ratio_hi"),
    "peak_memory_ratio",
]


def table(path: Path) -> pd.DataFrame:
    """One row a case of the run folder ``path``, in the order of the sweep's axes."""
    records = read_journal(path)
    rows = [_row(record) for record in records]
    frame = pd.DataFrame(rows, columns=None if rows else COLUMNS)
    for name in COLUMNS:
        if name not in frame:
            frame[name] = None
    sweep = read_run(path)["sweep"]
    order = {name: i for i, name in enumerate((*sweep["modes"], *sweep["layers"]))}
    settings = sorted(c for c in frame.columns if "." in c)
    others = [c for c in frame.columns if c not in COLUMNS and c not in settings]
    frame = frame[[*COLUMNS, *settings, *others]]
    if frame.empty:
        return frame
    keys = ["workload", "mode", "layer", "backend", "dtype", "batch", *settings, "seed", "seq"]
    # Whole numbers stay whole in a column with gaps.
    frame = frame.convert_dtypes()
    return _sorted(frame, keys, order)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a configuration and length, with speed, memory and recall side by side.

    Seeds are pooled: the median of tokens/s and memory with the widest of their intervals, and recall
    over the questions of all seeds.
    """
    if frame.empty:
        return frame
    settings = [c for c in frame.columns if "." in c]
    workloads = set(frame["workload"].unique())
    speed = _grouped(frame[frame["workload"] == "throughput"], settings, ["mode", "batch"], _pool_speed)
    recall = _grouped(frame[frame["workload"] == "recall"], settings, [], _pool_recall)
    if speed.empty or recall.empty:
        merged = recall if speed.empty else speed
    else:
        merged = _side_by_side(speed, recall, [c for c in settings if c.partition(".")[0] not in workloads])
    for name in (*SPEED, *RECALL, "cosine"):
        if name not in merged:
            merged[name] = None
    first = [
        c
        for c in ("layer", "backend", "mode", "seq", "batch", "dtype", "device", "status", "reason")
        if c in merged
    ]
    varied = [c for c in merged.columns if "." in c]
    rest = [*SPEED, "samples", *RECALL, "cosine"]
    order = {name: i for i, name in enumerate((*frame["mode"].unique(), *frame["layer"].unique()))}
    merged = merged[[*first, *(c for c in rest if c in merged), *varied]].convert_dtypes()
    for name in (*SPEED, *RECALL, "cosine"):
        if merged[name].isna().all():  # numbers still, such as the intervals where all were measured once
            merged[name] = merged[name].astype("Float64")
    by = [c for c in ("mode", "layer", "backend", *varied, "batch", "dtype", "seq") if c in merged]
    return _sorted(merged, by, order)


def ratios(short: pd.DataFrame) -> pd.DataFrame:
    """Each layer against its peers and its own reference where `summary` has both at the same mode and size.

    Ratios are ours over theirs. The interval of the speeds' ratio reaches from our lower end over their
    upper end to the reverse, so it covers both intervals; it is empty where either was measured once.
    """
    rows = []
    measured = "tokens_per_s" in short and "mode" in short
    speeds = short[short["tokens_per_s"].notna()] if measured else short[:0]
    speeds = speeds.assign(label=labels(speeds))
    for _, theirs in speeds.iterrows():
        layer = theirs["layer"] if theirs["backend"] == "reference" else catalog.peer_of(theirs["layer"])
        ours = speeds[(speeds["layer"] == layer) & (speeds["backend"] != "reference")]
        for name in SAME:
            ours = ours[ours[name] == theirs[name]]
        for _, mine in ours.iterrows():
            row = {"layer": mine["label"], "peer": theirs["label"], **{n: theirs[n] for n in SAME}}
            for column, above, below in (
                ("tokens_per_s_ratio", "tokens_per_s", "tokens_per_s"),
                ("tokens_per_s_ratio_lo", "tokens_per_s_lo", "tokens_per_s_hi"),
                ("tokens_per_s_ratio_hi", "tokens_per_s_hi", "tokens_per_s_lo"),
                ("peak_memory_ratio", "peak_memory_bytes", "peak_memory_bytes"),
            ):
                row[column] = _quotient(mine[above], theirs[below])
            rows.append(row)
    return pd.DataFrame(rows, columns=RATIOS).convert_dtypes()


def _quotient(above: Any, below: Any) -> float | None:
    return None if pd.isna(above) or pd.isna(below) or not below else float(above) / float(below)


def write_tables(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Derive ``table.csv`` and ``summary.csv`` of the run folder ``path`` from its journal,
    ``ratios.csv`` where a layer and one of its peers were measured, and ``phases.csv`` where cases kept
    theirs."""
    frame = table(path)
    short = summary(frame)
    write_atomically(path / "table.csv", frame.to_csv(index=False))
    write_atomically(path / "summary.csv", short.to_csv(index=False))
    if len(compared := ratios(short)):
        write_atomically(path / "ratios.csv", compared.to_csv(index=False))
    if len(phases := phase_table(path)):
        write_atomically(path / "phases.csv", phases.to_csv(index=False))
    return frame, short


def phase_table(path: Path) -> pd.DataFrame:
    """One row a phase of each case of the run folder ``path`` that kept them (``sweep --profile``)."""
    rows = []
    for record in read_journal(path):
        case = {name: record["case"][name] for name in ("layer", "backend", "mode", "seq")}
        rows += [{"case_id": record["case_id"], **case, **row} for row in record.get("phases", ())]
    return pd.DataFrame(rows).convert_dtypes()


def labels(frame: pd.DataFrame) -> pd.Series:
    """What to call each row: the layer, and those settings in which rows of this layer differ."""
    names = frame["layer"].map(layer_name)
    for column in ("backend", "dtype", "batch", *(c for c in frame.columns if "." in c)):
        if column not in frame:
            continue
        varies = frame.groupby("layer")[column].transform(lambda c: c.nunique(dropna=True) > 1)
        value = column.rpartition(".")[2] + " " + frame[column].astype("string")
        names = names.where(~varies.astype(bool) | frame[column].isna(), names + ", " + value)
    return names


def layer_name(layer: str) -> str:
    """``path/to/file.py:Class`` as ``Class``; any other name, such as ``peer:...``, as it is."""
    return layer.rpartition(":")[2] if catalog.is_file(layer) else layer


def length_name(seq: int) -> str:
    """``4096`` as ``4k``."""
    return format_length(int(seq))


def _row(record: dict[str, Any]) -> dict[str, Any]:
    case = dict(record["case"])
    own = case.pop("layer_settings")
    extra = case.pop("workload_settings")
    prefix = layer_name(case["layer"])
    return {
        "case_id": record["case_id"],
        **case,
        "status": record["status"],
        "reason": record["reason"] or None,
        **record["columns"],
        **{f"{prefix}.{name}": value for name, value in own.items()},
        **{f"{case['workload']}.{name}": value for name, value in extra.items()},
        "elapsed_s": record["elapsed_s"],
        "commit": record.get("commit"),
    }


def _sorted(frame: pd.DataFrame, by: list[str], order: dict[str, int]) -> pd.DataFrame:
    """Sorted by the columns ``by``, modes and layers in the sweep's ``order``."""

    def rank(column: pd.Series) -> pd.Series:
        return column.map(order) if column.name in ("mode", "layer") else column

    return frame.sort_values(by, key=rank, kind="stable", na_position="first").reset_index(drop=True)


def _side_by_side(speed: pd.DataFrame, recall: pd.DataFrame, settings: list[str]) -> pd.DataFrame:
    """Rows of both workloads joined where layer, settings, length, dtype and device are the same."""
    on = [*KEYS, *settings]
    sides = []
    for side in (speed, recall):
        side = side.reindex(columns=side.columns.union(on, sort=False)).astype(object)
        known = side[on].where(side[on].notna(), "")  # columns of other layers only: empty on both sides
        side["same"] = known.map(str).agg("|".join, axis=1)
        sides.append(side)
    merged = sides[0].merge(sides[1], on="same", how="outer", suffixes=("", OTHER))
    for name in (*on, "reason"):
        merged[name] = merged[name].combine_first(merged[name + OTHER])
    merged["status"] = merged[["status", "status" + OTHER]].apply(_worst, axis=1)
    return merged.drop(columns=["same", *(c for c in merged.columns if c.endswith(OTHER))])


def _grouped(frame: pd.DataFrame, settings: list[str], more: list[str], pool: Any) -> pd.DataFrame:
    if frame.empty:
        return frame
    settings = [c for c in settings if frame[c].notna().any()]
    rows = []
    for keys, group in frame.groupby([*KEYS, *more, *settings], dropna=False, sort=False):
        row = dict(zip([*KEYS, *more, *settings], keys, strict=True))
        good = group[group["status"] == "ok"]
        row["status"] = _worst(group["status"])
        reasons = group["reason"].dropna()
        row["reason"] = reasons.iloc[0] if len(reasons) else None
        rows.append(row | (pool(good) if len(good) else {}))
    return pd.DataFrame(rows)


def _pool_speed(group: pd.DataFrame) -> dict[str, Any]:
    pooled = {name: group[name].median() for name in SPEED}
    pooled["tokens_per_s_lo"] = group["tokens_per_s_lo"].min()
    pooled["tokens_per_s_hi"] = group["tokens_per_s_hi"].max()
    if len(group) > 1:  # the seeds' medians differ too
        pooled["tokens_per_s_lo"] = min(
            filter(pd.notna, (pooled["tokens_per_s_lo"], group["tokens_per_s"].min()))
        )
        pooled["tokens_per_s_hi"] = max(
            filter(pd.notna, (pooled["tokens_per_s_hi"], group["tokens_per_s"].max()))
        )
    for name in ("peak_memory_bytes", "state_bytes"):
        pooled[name] = int(pooled[name])
    return pooled | {"samples": int(group["samples"].sum())}


def _pool_recall(group: pd.DataFrame) -> dict[str, Any]:
    right, asked = int(group["right"].sum()), int(group["queries"].sum())
    low, high = wilson_interval(right, asked)
    return {"recall": right / asked, "recall_lo": low, "recall_hi": high, "cosine": group["cosine"].mean()}


def _worst(statuses: pd.Series) -> str:
    bad = [s for s in statuses.dropna() if s != "ok"]
    return bad[0] if bad else "ok"
