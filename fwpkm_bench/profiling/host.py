"""Programs that look at a case from outside: py-spy at Python, Nsight at a GPU, Triton's compiler at kernels.

A profiler starts the case as a child of its own and watches that, which needs no root; a system that forbids
even this says so in the outcome.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fwpkm_bench
from fwpkm_bench import catalog
from fwpkm_bench.measurement import UnsupportedError
from fwpkm_bench.profiling.folder import FLAMES, HOST, KERNELS, SPEEDSCOPE, write_table
from fwpkm_bench.spec import Case
from fwpkm_bench.store import write_atomically

SECONDS = 5.0  # of calls to be watched, each time
RATE = 200  # samples a second
ROOT = Path(fwpkm_bench.__file__).resolve().parents[1]
CALLS = "profiled_calls"  # of one_case.py: what is not below it is not the case's


def sample(case: Case, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Write ``host.csv``, ``host.speedscope.json`` and ``host.svg``; returns what the watched case says.

    Raises:
        UnsupportedError: py-spy is missing, or may not watch.
    """
    tool = find("py-spy")
    if tool is None:
        raise UnsupportedError("py-spy is not installed: pip install py-spy")
    record = [tool, "record", "--rate", str(RATE), "--format"]
    with tempfile.TemporaryDirectory() as aside:
        raw, picture = Path(aside) / "speedscope.json", Path(aside) / "flames.svg"
        said = watch([*record, "speedscope", "--output", str(raw), "--"], case, timeout_s)
        profile = cut(json.loads(raw.read_text(encoding="utf-8")))
        write_atomically(folder / SPEEDSCOPE, json.dumps(profile))
        write_table(folder / HOST, functions(profile))
        watch([*record, "flamegraph", "--output", str(picture), "--"], case, timeout_s)
        flames = picture.read_text(encoding="utf-8")
    for path in (Path(sys.executable).parent, ROOT, Path(tempfile.gettempdir())):
        flames = flames.replace(f"{path}/", "")  # a profile is published, and where it was made is nobody's
    write_atomically(folder / FLAMES, flames)
    return said


def compute(case: Case, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Nsight Compute on one call: ``ncu.ncu-rep``.

    Raises:
        UnsupportedError: it is not on the path, or the case runs on no GPU.
    """
    report = folder / "ncu"
    options = ["--force-overwrite", "--target-processes", "all", "--profile-from-start", "off"]
    return watch(
        [_nsight("ncu", case), *options, "--set", "basic", "--export", str(report)], case, timeout_s, calls=1
    )


def systems(case: Case, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Nsight Systems on one call: ``nsys.nsys-rep``.

    Raises:
        UnsupportedError: it is not on the path, or the case runs on no GPU.
    """
    options = ["--force-overwrite", "true", "--capture-range", "cudaProfilerApi", "--trace", "cuda,nvtx"]
    command = [_nsight("nsys", case), "profile", *options, "--output", str(folder / "nsys")]
    return watch(command, case, timeout_s, calls=1)


def kernels(case: Case, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Write ``kernels.csv``, what Triton makes of each kernel of the layer for a GPU, here or not.

    Raises:
        UnsupportedError: the layer has no Triton kernels, or they could not be compiled.
    """
    if "triton" not in catalog.load_layer(case.layer).backends:
        raise UnsupportedError(f"{case.layer} has no backend triton, so no kernels to compile")
    module = (sys.executable, "-m", "fwpkm_bench.profiling.kernels", case.layer, str(folder / KERNELS))
    code, said = _run(module, timeout_s, TRITON_INTERPRET="0")
    if code is None:
        raise UnsupportedError(f"not compiled within {timeout_s:g} s; raise --timeout")
    if code:
        raise UnsupportedError((said.strip().splitlines() or [f"exit code {code}"])[-1][:300])
    return {}


def _nsight(name: str, case: Case) -> str:
    if case.device != "cuda":
        raise UnsupportedError(f"{name} looks into GPUs, and the case runs on {case.device}")
    tool = find(name)
    if tool is None:
        raise UnsupportedError(f"{name} is not on the path; it comes with NVIDIA's Nsight tools")
    return tool


def find(name: str) -> str | None:
    """The program ``name``: beside the interpreter, or else on the path."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def watch(tool: Sequence[str], case: Case, timeout_s: float, *, calls: int = 0) -> dict[str, Any]:
    """Run ``case`` under ``tool``, so many calls or for `SECONDS`; what the case itself says it took.

    Raises:
        UnsupportedError: the tool's or the case's own words for what went wrong.
    """
    with tempfile.TemporaryDirectory() as aside:
        asked, result = Path(aside) / "case.json", Path(aside) / "result.json"
        asked.write_text(json.dumps(dataclasses.asdict(case)), encoding="utf-8")
        much = ["--calls", str(calls)] if calls else ["--seconds", str(SECONDS)]
        module = [sys.executable, "-m", "fwpkm_bench.profiling.one_case", str(asked), str(result), *much]
        code, said = _run([*tool, *module], timeout_s)
        name = Path(tool[0]).name
        if code is None:
            raise UnsupportedError(f"{name}: no result after {timeout_s:g} s; raise --timeout")
        outcome = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    if code or outcome is None:
        raise UnsupportedError(f"{name}: {reason(said) or f'exit code {code}'}")
    if outcome["status"] != "ok":
        raise UnsupportedError(f"under {name}: {outcome['status']}: {outcome['reason']}")
    return dict(outcome["columns"])


def _run(command: Sequence[str], timeout_s: float, **variables: str) -> tuple[int | None, str]:
    """The exit code, None where it took too long, and what was said; no child outlives this."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | {"PYTHONPATH": path} | variables,
        start_new_session=True,
    )
    try:
        said, _ = child.communicate(timeout=timeout_s)
        return child.returncode, said
    except subprocess.TimeoutExpired:
        return None, ""
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def reason(said: str) -> str:
    """The line of a tool's output that says what went wrong, and what it says to it."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for index, line in enumerate(lines):
        if "error" in line.lower() or "permission" in line.lower():
            causes = [c for c in lines[index + 1 : index + 3] if c.lower().startswith("reason")]
            return " ".join((line, *causes))[:300]
    return lines[-1][:300] if lines else ""


def cut(profile: dict[str, Any]) -> dict[str, Any]:
    """A speedscope ``profile`` without what is not below the calls of the case (imports, set-up), and with
    files as seen from where Python finds them."""
    frames = [frame | {"file": _shortened(frame.get("file") or "")} for frame in profile["shared"]["frames"]]
    roots = {index for index, frame in enumerate(frames) if frame["name"].split(" ")[0] == CALLS}
    kept = []
    for thread in profile["profiles"]:
        pairs = zip(thread["samples"], thread["weights"], strict=True)
        inside = [(stack[_place(stack, roots) :], weight) for stack, weight in pairs if roots & set(stack)]
        if inside:
            samples, weights = map(list, zip(*inside, strict=True))
            kept.append({**thread, "samples": samples, "weights": weights, "startValue": 0.0})
            kept[-1]["endValue"] = sum(weights)
    return {**profile, "profiles": kept, "shared": {**profile["shared"], "frames": frames}}


def _place(stack: list[int], roots: set[int]) -> int:
    return next(place for place, frame in enumerate(stack) if frame in roots)


def functions(profile: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a line of code: the time of samples in it, and of those in it or in what it called."""
    frames = profile["shared"]["frames"]
    own: Counter[tuple[str, str, int]] = Counter()
    below: Counter[tuple[str, str, int]] = Counter()
    whole = 0.0
    for thread in profile["profiles"]:
        for stack, weight in zip(thread["samples"], thread["weights"], strict=True):
            names = [_line(frames[index]) for index in stack]
            own[names[-1]] += weight
            for name in set(names):
                below[name] += weight
            whole += weight
    rows = []
    for name, total in below.most_common():
        function, file, line = name
        row: dict[str, Any] = {"function": function, "file": file, "line": line}
        row |= {"self_s": round(own[name], 6), "total_s": round(total, 6)}
        rows.append(row | {"self_share": own[name] / whole, "total_share": total / whole})
    return sorted(rows, key=lambda row: -row["self_s"])


def _line(frame: dict[str, Any]) -> tuple[str, str, int]:
    return frame["name"].split(" (")[0], frame.get("file") or "", int(frame.get("line") or 0)


def _shortened(file: str) -> str:
    for folder in (ROOT, *map(Path, sys.path)):
        if folder.parts[1:] and Path(file).is_relative_to(folder):
            file = str(Path(file).relative_to(folder))
    return file
