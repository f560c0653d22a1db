"""Whether ``fwpkm-bench compare`` can be trusted here: ``python examples/injected_slowdown.py``.

In a clone of this checkout one layer's copy is made 15% slower (it waits, after each call, for 15% of the
time that the call took), and another copy wrong by 1%. Then each comparison runs many times, as a user would
run it: the slower copy against the layer as it is must be called ``slower`` with exit code 1, the layer with
itself ``same`` with exit code 0, and the wrong copy must end with exit code 3. The table that it writes has a
row a comparison; the figures are of the machine that it runs on, in the state that it is in.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
SLOW = """

def slower(forward):
    import time

    def wrapped(*arguments, **named):
        started = time.perf_counter()
        result = forward(*arguments, **named)
        until = time.perf_counter() + {share} * (time.perf_counter() - started)
        while time.perf_counter() < until:
            pass
        return result

    return wrapped


LAYER.forward = slower(LAYER.forward)
"""
WRONG = """

def wrong(forward):
    def wrapped(*arguments, **named):
        y, state = forward(*arguments, **named)
        return 1.01 * y, state

    return wrapped


LAYER.forward = wrong(LAYER.forward)
"""
EXPECTED = {"slow": (1, "slower"), "same": (0, "same"), "wrong": (3, None)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", default="linear")
    parser.add_argument("--seq", default="4k")
    parser.add_argument(
        "--mode", default="prefill", choices=("prefill", "decode")
    )  # the waiting is forward's
    parser.add_argument("--slowdown", type=float, default=0.15)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--budget", default="45s")
    parser.add_argument("--out", type=Path, default=Path("results/injected_slowdown.csv"))
    asked = parser.parse_args()
    args = ("--layers", asked.layer, "--seq", asked.seq, "--modes", asked.mode, "--budget", asked.budget)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        clone = Path(temporary) / "clone"
        make_branches(clone, asked.layer, asked.slowdown)
        for repetition in range(asked.repetitions):
            for head in ("slow", "same") if repetition else EXPECTED:
                row = once(clone, head, args, Path(temporary) / "out")
                rows.append({"repetition": repetition, "head": head, **row})
                print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
                asked.out.parent.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(asked.out, index=False)
    table = pd.DataFrame(rows)
    for head, group in table.groupby("head", sort=False):
        print(f"{head}: {group['as_expected'].sum()} of {len(group)} as expected")
    return 0 if table["as_expected"].all() else 1


def make_branches(clone: Path, layer: str, share: float) -> None:
    """``slow``, ``same`` and ``wrong``, each a commit beside the checkout's own."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    file = clone / "layers" / layer / "__init__.py"
    text = file.read_text()
    git(clone, "switch", "--quiet", "--create", "base")
    for name, added in (("slow", SLOW.format(share=share)), ("same", "\n# as it was\n"), ("wrong", WRONG)):
        git(clone, "switch", "--quiet", "--create", name, "base")
        file.write_text(text + added)
        git(clone, "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "--quiet", "-am", name)


def git(clone: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(clone), *arguments], check=True)


def once(clone: Path, head: str, arguments: tuple[str, ...], out: Path) -> dict[str, object]:
    """One comparison, by the tool of this checkout."""
    command = [sys.executable, str(ROOT / "bench.py"), "compare", "base", head]
    started = time.monotonic()
    ended = subprocess.run(
        [*command, *arguments, "--out", str(out)], cwd=clone, capture_output=True, text=True
    )
    if not (out / "compare.csv").exists():
        sys.exit(ended.stderr)
    (row,) = pd.read_csv(out / "compare.csv").to_dict("records")
    verdict = row["verdict"] if isinstance(row["verdict"], str) else None
    return {
        "exit_code": ended.returncode,
        "verdict": verdict,
        "time_ratio": row["time_ratio"],
        "time_ratio_lo": row["time_ratio_lo"],
        "time_ratio_hi": row["time_ratio_hi"],
        "noise_lo": row["noise_lo"],
        "noise_hi": row["noise_hi"],
        "memory": row["memory"],
        "invocations": row["invocations"],
        "seconds": round(time.monotonic() - started, 1),
        "as_expected": (ended.returncode, verdict) == EXPECTED[head],
    }


if __name__ == "__main__":
    sys.exit(main())
