"""Two run folders against each other: the cases that both measured, from their journals."""

import json
from pathlib import Path
from typing import Any

from fwpkm_bench.comparing import verdicts
from fwpkm_bench.comparing.compared import COLUMNS, Compared
from fwpkm_bench.errors import UsageError
from fwpkm_bench.store import read_journal, read_run

NO_MATTER = ("budget_s",)  # for what is measured
ENVIRONMENT = ("cpu", "threads", "gpus", "versions", "python")


def compare_runs(a: Path, b: Path, threshold: float) -> Compared:
    """One row a case of the throughput workload that is in both, with the recall of the same layer, settings
    and length beside it; a recall that no such case goes with is a row of its own.

    Raises:
        UsageError: a folder holds no run, or the two have no case in common.
    """
    records = [{_key(r["case"]): r for r in read_journal(path)} for path in (a, b)]
    pairs = [(records[0][key], records[1][key]) for key in records[0] if key in records[1]]
    if not pairs:
        raise UsageError(f"{a} and {b} have no case in common; nothing can be compared")
    recalls: dict[str, list[dict[str, Any]]] = {}
    for mine, theirs in pairs:
        if mine["case"]["workload"] == "recall":
            row = _base(mine, theirs) | _recall_columns(mine, theirs, threshold)
            recalls.setdefault(_memory(mine["case"]), []).append(row)
    found = Compared()
    beside = set()
    for mine, theirs in pairs:
        if mine["case"]["workload"] == "throughput":
            memory = _memory(mine["case"])
            found.rows.append(_row(mine, theirs, threshold))
            if len(recalls.get(memory, ())) == 1:  # one of its size and settings: it stands beside the speed
                beside.add(memory)
                (recall,) = recalls[memory]
                found.rows[-1] |= {name: recall[name] for name in ("recall", "recall_a", "recall_b")}
    found.rows += [row for memory, rows in recalls.items() if memory not in beside for row in rows]
    varied = _varied([mine["case"] for mine, _ in pairs])
    for row in found.rows:
        row["settings"] = " ".join(f"{n}={v}" for n, v in row.pop("all_settings").items() if n in varied)
    return found


def unmatched(a: Path, b: Path) -> int:
    """How many cases are in one of the two runs alone."""
    keys = [{_key(record["case"]) for record in read_journal(path)} for path in (a, b)]
    return len(keys[0] ^ keys[1])


def differences(a: Path, b: Path) -> list[str]:
    """What the machines and the software of two runs differ in, a line each."""
    environments = [read_run(path)["environment"] for path in (a, b)]
    return [
        f"{name}: {json.dumps(environments[0].get(name))} and {json.dumps(environments[1].get(name))}"
        for name in ENVIRONMENT
        if environments[0].get(name) != environments[1].get(name)
    ]


def _key(case: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in case.items() if k not in NO_MATTER}, sort_keys=True)


def _memory(case: dict[str, Any]) -> str:
    names = ("layer", "backend", "seq", "dtype", "device", "seed", "layer_settings")
    return json.dumps({name: case[name] for name in names}, sort_keys=True)


def _settings(case: dict[str, Any]) -> dict[str, Any]:
    layer = {f"{case['layer']}.{name}": value for name, value in case["layer_settings"].items()}
    return layer | {f"{case['workload']}.{name}": value for name, value in case["workload_settings"].items()}


def _varied(cases: list[dict[str, Any]]) -> set[str]:
    """The settings that ``cases`` differ in."""
    values: dict[str, set[Any]] = {}
    for case in cases:
        for name, value in _settings(case).items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def _base(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    case = mine["case"]
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {name: case[name] for name in ("layer", "mode", "seq", "batch", "dtype", "device")}
    row |= {"backend_a": case["backend"], "backend_b": case["backend"], "status": "ok", "reason": ""}
    row["all_settings"] = _settings(case)
    for side, record in (("A", mine), ("B", theirs)):
        if record["status"] != "ok":
            row |= {"status": record["status"], "reason": f"side {side}: {record['reason']}"}
    return row


def _row(mine: dict[str, Any], theirs: dict[str, Any], threshold: float) -> dict[str, Any]:
    row = _base(mine, theirs)
    if row["status"] != "ok":
        return row
    steps = [record["columns"].get("decode_tokens") or 1 for record in (mine, theirs)]
    a, b = ([ms / n for ms in r["samples_ms"]] for r, n in zip((mine, theirs), steps, strict=True))
    said = verdicts.apart(a, b, threshold)
    row |= {
        "verdict": said.verdict,
        "reason": said.reason,
        "time_ratio": said.time.ratio,
        "time_ratio_lo": said.time.lo,
        "time_ratio_hi": said.time.hi,
        "p_value": said.p_value,
    }
    for side, record in (("a", mine), ("b", theirs)):
        columns = record["columns"]
        row |= {f"{n}_{side}": columns[n] for n in ("tokens_per_s", "peak_memory_bytes", "state_bytes")}
    peak_a, peak_b, state_a, state_b = (
        row[f"{name}_{side}"] for name in ("peak_memory_bytes", "state_bytes") for side in "ab"
    )
    row["memory"] = verdicts.memory_and_state([peak_a], [peak_b], state_a, state_b, threshold, row["device"])
    return row


def _recall_columns(mine: dict[str, Any], theirs: dict[str, Any], threshold: float) -> dict[str, Any]:
    if mine["status"] != "ok" or theirs["status"] != "ok":
        return {}
    a, b = mine["columns"], theirs["columns"]
    said = verdicts.recall((a["right"], a["queries"]), (b["right"], b["queries"]), threshold)
    return {"recall": said, "recall_a": a["recall"], "recall_b": b["recall"]}
