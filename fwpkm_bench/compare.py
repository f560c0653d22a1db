"""Two sides, case by case: right first, then how fast, in how much memory, and with what recall."""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwpkm_bench.comparing import verdicts
from fwpkm_bench.comparing.compared import COLUMNS, FAILED, INTERRUPTED, Compared
from fwpkm_bench.comparing.duel import Fought, Rules, fight
from fwpkm_bench.comparing.gate import Checked, Gate, compare_outputs
from fwpkm_bench.comparing.remote import Remote, SideError
from fwpkm_bench.comparing.sides import Side
from fwpkm_bench.comparing.verdicts import Speed
from fwpkm_bench.ranges import format_length
from fwpkm_bench.tables import layer_name

PROFILE_S = 10.0  # a side


@dataclass(frozen=True)
class Plan:
    """What is compared. Each of ``requests`` has the fields of a `Sweep` that comes to one case."""

    a: Side
    b: Side
    requests: list[dict[str, Any]]
    rules: Rules  # the budget is that of a case
    seed: int = 0
    profile: bool = False  # both sides of what got slower


def requests(
    layers: tuple[str, ...],
    modes: tuple[str, ...],
    seq: tuple[int, ...],
    batch: tuple[int, ...],
    dtype: tuple[str, ...],
    **others: Any,
) -> list[dict[str, Any]]:
    """One request a case, short sequences first."""
    names = ("seq", "layers", "modes", "batch", "dtype")
    axes = itertools.product(seq, layers, modes, batch, dtype)
    return [{name: (value,) for name, value in zip(names, point, strict=True)} | others for point in axes]


def label(request: dict[str, Any]) -> str:
    """For people: ``fwpkm prefill 4k``, with what is not the usual."""
    (layer,), (mode,), (seq,) = request["layers"], request["modes"], request["seq"]
    (batch,), (dtype,) = request["batch"], request["dtype"]
    unusual = [f"B {batch}"] * (batch != 1) + [dtype] * (dtype != "float32")
    return " ".join([layer_name(layer), mode, format_length(seq), *unusual])


def compare(plan: Plan, say: Callable[[str], None]) -> Compared:
    """Compare the sides of ``plan``; what cannot be measured, or no more after Ctrl-C, is a row with its
    reason."""
    found = Compared()
    try:
        _compare(plan, say, found)
    except KeyboardInterrupt:
        for row in found.rows[-1:]:
            row |= {"status": INTERRUPTED, "reason": "interrupted; what came before is whole"}
    return found


def _compare(plan: Plan, say: Callable[[str], None], found: Compared) -> None:
    recalls: dict[Any, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fwpkm-bench-") as temporary:
        gate = Gate(plan.a, Path(temporary), plan.rules.timeout_s)
        for request in plan.requests:
            row = _row(request)
            found.rows.append(row)
            name = label(request)
            try:
                say(f"{name}: are the results right?")
                for side in (plan.a, plan.b):
                    _note_checks(row, gate.check(name, side, request, plan.seed), found)
                if row["results"] == "right":
                    _judge_speed(row, plan, request, found, Path(temporary), say)
                if row["results"] == "wrong":
                    say(f"{name}: wrong; there is no speed to it")
                    continue
                key = tuple(request[of] for of in ("layers", "seq", "dtype"))
                if key not in recalls:
                    recalls[key] = _recall(plan, request)
                _note(row, recalls[key])
                if plan.profile and row["verdict"] == "slower":
                    say(f"{name}: which phase?")
                    found.phases += phases_of(plan, request)
            except SideError as error:
                timed = row["verdict"] is not None  # then the profile failed, which takes nothing from it
                _note(row, {"reason": str(error)} | ({} if timed else {"status": error.status}))
                say(f"{name}: could not be {'profiled' if timed else 'measured'}: {error}")


def _note(row: dict[str, Any], columns: dict[str, Any]) -> None:
    """Add ``columns``; a reason comes after one that is there."""
    reasons = [reason for reason in (row["reason"], columns.get("reason")) if reason]
    row |= columns | {"reason": "; ".join(reasons)}


def _row(request: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    names = {"layer": "layers", "mode": "modes", "seq": "seq", "batch": "batch", "dtype": "dtype"}
    row |= {column: request[name][0] for column, name in names.items()}
    return row | {"device": request["device"], "status": "ok", "reason": ""}


def _note_checks(row: dict[str, Any], checks: list[Checked], found: Compared) -> None:
    """Add ``checks``, and say in ``row`` by how much the worst is off: of those that miss, or of all."""
    found.checks += checks
    wrong = [c for c in checks if not c.right]
    worst = max((c.error for c in wrong or checks), key=lambda e: float("inf") if e != e else e)
    if wrong or row["results"] is None:
        row["worst_error"] = worst
    elif row["results"] == "right":
        row["worst_error"] = max(worst, row["worst_error"])
    if wrong and row["results"] != "wrong":
        _note(row, {"results": "wrong", "reason": _said_of(wrong[0])})
    elif row["results"] is None:
        row["results"] = "right"


def _said_of(wrong: Checked) -> str:
    if wrong.error == float("inf"):
        return f"side {wrong.side} has no {wrong.what}, or of another shape, where {wrong.against} has it"
    return (
        f"side {wrong.side}: {wrong.what} is off by {wrong.error:.1e} from {wrong.against}, "
        f"allowed {wrong.allowed:.1e}"
    )


def _judge_speed(
    row: dict[str, Any],
    plan: Plan,
    request: dict[str, Any],
    found: Compared,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    name = label(request)
    outputs = {side: folder / f"outputs-{side[-1]}" for side in ("A", "B", verdicts.AGAIN)}
    fought = Fought()

    def check() -> bool:
        a, b = (fought.starts[side][0] for side in ("A", "B"))
        row.update(backend_a=a["backend"], backend_b=b["backend"])
        shared = a["settings"].keys() & b["settings"].keys()
        if any(a["settings"][key] != b["settings"][key] for key in shared):
            return True  # their outputs differ by intention
        if a["parameters"] != b["parameters"]:
            _note(row, {"reason": "the sides draw other parameters: outputs as timed were not compared"})
            return True
        (dtype,), (mode,) = request["dtype"], request["modes"]
        files = outputs["A"], outputs["B"]
        _note_checks(row, compare_outputs(name, plan.a, plan.b, files, dtype, mode), found)
        return row["results"] == "right"

    def show(invocation: int, said: Speed) -> None:
        say(f"{name}: {invocation} x 3 processes, B/A {ratio_text(said.time)}")

    try:
        fight(fought, plan.a, plan.b, request, plan.rules, outputs=outputs, check=check, show=show)
    finally:
        found.turns += [(name, turn) for turn in fought.turns]
    if row["results"] == "right":
        _note(row, _speed_columns(fought, plan.rules.threshold))
        _note(row, _memory_columns(fought, plan.rules.threshold, request["device"]))


def _speed_columns(fought: Fought, threshold: float) -> dict[str, Any]:
    said = verdicts.speed(fought.turns, threshold)
    tokens = fought.starts["A"][0]["step_tokens"]
    middle = {side: np.median([t.ms for t in fought.turns if t.side == side]) for side in ("A", "B")}
    columns = {
        "verdict": said.verdict,
        "time_ratio": said.time.ratio,
        "time_ratio_lo": said.time.lo,
        "time_ratio_hi": said.time.hi,
        "p_value": said.p_value,
        "noise_lo": said.noise.lo,
        "noise_hi": said.noise.hi,
        "tokens_per_s_a": tokens / middle["A"] * 1e3,
        "tokens_per_s_b": tokens / middle["B"] * 1e3,
        "invocations": len({t.invocation for t in fought.turns}),
        "rounds": len({(t.invocation, t.round) for t in fought.turns}),
        "seconds": fought.seconds,
    }
    return columns | ({"reason": said.reason} if said.reason else {})


def _memory_columns(fought: Fought, threshold: float, device: str) -> dict[str, Any]:
    peaks = {
        name: [s["peak_memory_bytes"] for side in sides for s in fought.starts[side]]
        for name, sides in {"a": ("A", verdicts.AGAIN), "b": ("B",)}.items()
    }
    states = {name: fought.starts[side][0]["state_bytes"] for name, side in (("a", "A"), ("b", "B"))}
    return {
        "memory": verdicts.memory_and_state(
            peaks["a"], peaks["b"], states["a"], states["b"], threshold, device
        ),
        **{f"peak_memory_bytes_{name}": int(np.median(values)) for name, values in peaks.items()},
        **{f"state_bytes_{name}": value for name, value in states.items()},
    }


def _recall(plan: Plan, request: dict[str, Any]) -> dict[str, Any]:
    """The recall of both sides' memories at the length of ``request``; empty for a layer without one."""
    found, failed = {}, {}
    for side in (plan.a, plan.b):
        try:
            with Remote(side, request, plan.rules.timeout_s) as remote:
                found[side.name] = remote.call("recall")
        except SideError as error:
            failed[side.name] = error
    if not failed:
        a, b = found["A"], found["B"]
        said = verdicts.recall((a["right"], a["queries"]), (b["right"], b["queries"]), plan.rules.threshold)
        return {"recall": said, "recall_a": a["recall"], "recall_b": b["recall"]}
    if len(failed) == 2 and {error.status for error in failed.values()} == {"unsupported"}:
        return {}
    reason = "; ".join(f"recall could not be measured: {error}" for error in failed.values())
    return {"recall": FAILED, "reason": reason}


def phases_of(plan: Plan, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The phases of both sides, the one that lost the most time first."""
    sides = {}
    for side in (plan.a, plan.b):
        with Remote(side, request | {"budget_s": PROFILE_S}, plan.rules.timeout_s) as remote:
            sides[side.name] = {row["phase"]: row for row in remote.call("phases")}
    a, b = sides["A"], sides["B"]
    rows = []
    for phase in dict.fromkeys((*a, *b)):
        row: dict[str, Any] = {"case": label(request), "phase": phase}
        for name, column in (("ms_p50", "ms"), ("ms_lo", "ms_lo"), ("ms_hi", "ms_hi"), ("share", "share")):
            row |= {f"{column}_{key}": s.get(phase, {}).get(name) for key, s in (("a", a), ("b", b))}
        rows.append(row | {"ms_more": (row["ms_b"] or 0.0) - (row["ms_a"] or 0.0)})
    return sorted(rows, key=lambda row: -row["ms_more"])


def ratio_text(ratio: verdicts.Ratio) -> str:
    """``1.02 (0.99 to 1.05)``."""
    interval = "" if ratio.lo is None else f" ({ratio.lo:.3f} to {ratio.hi:.3f})"
    return f"{ratio.ratio:.3f}{interval}"
