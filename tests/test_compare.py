"""Comparisons: verdicts on turns whose truth is known, and whole runs over a repository of their own."""

import itertools
import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from fwpkm_bench import run as runner
from fwpkm_bench.cli import main
from fwpkm_bench.compare import Plan, phases_of, requests
from fwpkm_bench.comparing import verdicts
from fwpkm_bench.comparing.duel import Rules, starting_orders
from fwpkm_bench.comparing.remote import Remote
from fwpkm_bench.comparing.sides import Side, export
from fwpkm_bench.comparing.verdicts import AGAIN, Turn, speed
from fwpkm_bench.spec import Sweep
from fwpkm_bench.store import JOURNAL
from tests.conftest import heed_interrupts

ROOT = Path(__file__).resolve().parents[1]
LAYER = "mine.py:Mean"
THRESHOLD = 0.05


def turns(slowdown: float, luck: float = 0.01, seed: int = 0, invocations: int = 8) -> list[Turn]:
    """Turns of a machine that drifts by a half from round to round, with jitter of 3%, and where each process
    is faster or slower for life by ``luck``."""
    chance = np.random.default_rng(seed)
    found = []
    for invocation in range(invocations):
        own = {name: np.exp(chance.normal(0, luck)) for name in ("A", "B", AGAIN)}
        own["B"] *= slowdown
        for number in range(6):
            weather = np.exp(chance.normal(0, 0.4))
            for name in ("A", "B", AGAIN, AGAIN, "B", "A"):
                jitter = np.exp(abs(chance.normal(0, 0.03)))
                found.append(Turn(name, invocation, number, float(weather * own[name] * jitter)))
    return found


@pytest.mark.parametrize(
    ("slowdown", "verdict"), [(1.0, "same"), (1.01, "same"), (1.15, "slower"), (1 / 1.15, "faster")]
)
def test_a_verdict_is_right_on_nearly_every_draw(slowdown: float, verdict: str) -> None:
    said = [speed(turns(slowdown, seed=seed), THRESHOLD).verdict for seed in range(40)]
    assert said.count(verdict) >= 38
    assert set(said) <= {verdict, "ambiguous"}  # never the wrong one


def test_a_small_change_is_never_called_by_its_opposite() -> None:
    said = {speed(turns(1.05, luck=0.03, seed=seed), THRESHOLD).verdict for seed in range(40)}
    assert "faster" not in said


def test_luck_of_a_process_is_no_change() -> None:
    """Processes that differ by 5% for life: rounds alone would call that significant."""
    found = [speed(turns(1.0, luck=0.05, seed=seed), THRESHOLD) for seed in range(100)]
    assert sum(said.verdict in ("slower", "faster") for said in found) <= 1
    assert sum(said.p_value < 0.05 for said in found) <= 10


@pytest.mark.parametrize("invocations", [4, 6, 12])
def test_the_interval_covers_the_truth(invocations: int) -> None:
    found = [
        speed(turns(1.1, luck=0.02, seed=seed, invocations=invocations), THRESHOLD).time
        for seed in range(100)
    ]
    assert sum(ratio.lo <= 1.1 <= ratio.hi for ratio in found if ratio.lo and ratio.hi) >= 93


def test_few_invocations_make_no_verdict() -> None:
    said = speed(turns(2.0, invocations=3), THRESHOLD)
    assert said.verdict == "ambiguous"
    assert "3 of the 4 invocations" in said.reason
    assert said.time.ratio == pytest.approx(2.0, rel=0.1)
    assert said.time.lo is None


def test_noise_above_the_threshold_keeps_a_slowdown_open() -> None:
    noisy = [
        Turn(t.side, t.invocation, t.round, t.ms * (1.3 if t.side == AGAIN and t.invocation % 2 else 1.0))
        for t in turns(1.15)
    ]
    said = speed(noisy, THRESHOLD)
    assert said.noise.hi > 1.15
    assert said.verdict == "ambiguous"


def test_samples_of_two_runs() -> None:
    chance = np.random.default_rng(0)
    a, b = (list(scale * np.exp(chance.normal(0, 0.02, 20))) for scale in (1.0, 1.2))
    assert verdicts.apart(a, b, THRESHOLD).verdict == "slower"
    assert verdicts.apart(b, a, THRESHOLD).verdict == "faster"
    assert verdicts.apart(a, a, THRESHOLD).verdict == "same"
    assert verdicts.apart(a[:3], b, THRESHOLD).verdict == "ambiguous"


def test_memory_and_recall_verdicts() -> None:
    mib = 2**20
    assert verdicts.memory([100 * mib] * 6, [120 * mib] * 3, 0.05, resident=True) == "more"
    assert verdicts.memory([100 * mib] * 6, [80 * mib] * 3, 0.05, resident=True) == "less"
    assert (
        verdicts.memory([100 * mib] * 2, [120 * mib], 0.05, resident=True) == "ambiguous"
    )  # one odd process
    assert (
        verdicts.memory([100 * mib, 130 * mib] * 3, [120 * mib] * 3, 0.05, resident=True) == "same"
    )  # within A's own
    assert verdicts.memory([10 * mib] * 6, [12 * mib] * 3, 0.05, resident=True) == "same"  # pages
    assert verdicts.memory([10 * mib], [12 * mib], 0.05, resident=False) == "more"
    assert verdicts.recall((1000, 1024), (1002, 1024), 0.05) == "same"
    assert verdicts.recall((1000, 1024), (900, 1024), 0.05) == "lower"
    assert verdicts.recall((1000, 1024), (970, 1024), 0.05) == "same"  # significant, and within the threshold
    assert verdicts.recall((900, 1024), (1000, 1024), 0.05) == "higher"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch) -> Path:
    """Somebody's repository, with one layer and one commit, and the user in it."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / "mine.py").write_text((ROOT / "tests" / "small_layer.py").read_text())
    git(root, "init", "--quiet", "--initial-branch=main")
    commit(root, "first")
    monkeypatch.chdir(root)
    return root


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def commit(root: Path, message: str) -> None:
    git(root, "add", "--all")
    git(root, "-c", "user.name=T", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", message)


def edit(root: Path, before: str, after: str) -> None:
    text = (root / "mine.py").read_text()
    assert before in text
    (root / "mine.py").write_text(text.replace(before, after))


def compare(*arguments: str, layers: str = LAYER, budget: str = "0.5s") -> Result:
    """In a folder of its own beside the repository."""
    words = ["compare", "--seq", "64", *arguments, "--budget", budget, "--out", "../out"]
    return CliRunner().invoke(main, [*words, "--layers", layers] if layers else words)


def table() -> pd.DataFrame:
    return pd.read_csv("../out/compare.csv")


def test_a_broken_result_is_no_speed(repository: Path) -> None:
    edit(repository, "OFF = 1.0", "OFF = 1.01")
    commit(repository, "break it by a hundredth")
    result = compare("main~1", "main")
    assert result.exit_code == 3, result.output
    (row,) = table().to_dict("records")
    assert row["results"] == "wrong"
    assert 5e-3 < row["worst_error"] < 2e-2
    assert pd.isna(row["verdict"])
    assert pd.isna(row["time_ratio"])
    assert "side B: output is off by" in row["reason"]
    assert "1 case: 1 wrong" in result.output.splitlines()[-1]
    checks = pd.read_csv("../out/checks.csv")
    assert set(checks["side"]) == {"A", "B"}
    assert (checks["error"] <= checks["allowed"])[checks["side"] == "A"].all()
    assert {"output", "gradient: x", "gradient: out.weight", "state: total"} <= set(checks["what"])
    assert set(checks["draw"][checks["side"] == "B"]) == {2}  # it missed with other inputs too


def test_the_working_tree_is_side_b_and_stays_as_it_is(repository: Path) -> None:
    edit(repository, "mean = sums / steps", "mean = 1.0 * sums / steps")
    (repository / "new.txt").write_text("new")
    before = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    result = compare("HEAD")
    assert result.exit_code in (0, 1), result.output
    about = json.loads(Path("../out/comparison.json").read_text())
    assert about["b"]["label"].startswith("working tree (")
    assert about["b"]["dirty"]
    assert not about["a"]["dirty"]
    (row,) = table().to_dict("records")
    assert row["results"] == "right"
    assert row["verdict"] in ("slower", "faster", "same", "ambiguous")
    assert row["invocations"] >= 1
    turns_of = pd.read_csv("../out/turns.csv")
    assert set(turns_of["side"]) == {"A", "B", AGAIN}
    assert (turns_of.groupby(["invocation", "round"])["side"].value_counts() == 2).all()
    assert (turns_of["ms"] > 0).all()
    assert "output, as timed" in set(pd.read_csv("../out/checks.csv")["what"])
    assert Path("../out/compare.png").stat().st_size > 5000
    after = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout
    assert after == before
    worktrees = subprocess.run(["git", "worktree", "list"], capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1


def test_more_state_is_a_regression(repository: Path) -> None:
    edit(repository, "keep: int = 0", "keep: int = 1000")
    result = compare("HEAD")
    assert result.exit_code == 1, result.output
    (row,) = table().to_dict("records")
    assert row["memory"] == "more"
    assert row["state_bytes_b"] == row["state_bytes_a"] + 4000
    assert "1 with more memory" in result.output.splitlines()[-1]


def test_settings_of_one_layer_against_each_other(repository: Path) -> None:
    """Each side is held to the reference with its own settings."""
    name = f"{repository}/{LAYER}"
    result = compare(
        "--a", f"{name}.keep=500", "--b", f"{name}.keep=0", "--b", "backend=reference", layers=""
    )
    assert result.exit_code == 0, result.output
    (row,) = table().to_dict("records")
    assert (row["backend_a"], row["backend_b"]) == ("eager", "reference")
    assert row["memory"] == "less"
    assert row["results"] == "right"


def test_settings_of_a_file_against_a_ref(repository: Path) -> None:
    """The file is called otherwise in each copy."""
    result = compare("HEAD", "--a", f"{LAYER}.keep=100", "--b", f"./{LAYER}.keep=900")
    assert result.exit_code == 1, result.output
    (row,) = table().to_dict("records")
    assert row["state_bytes_b"] - row["state_bytes_a"] == 4 * 800


def test_what_a_layer_imports_is_the_sides_own(repository: Path) -> None:
    (repository / "factor.py").write_text("OFF = 1.0\n")
    edit(repository, "OFF = 1.0  #", "from factor import OFF  #")
    commit(repository, "apart")
    (repository / "factor.py").write_text("OFF = 1.01\n")
    words = ["compare", "HEAD", "--layers", LAYER, "--seq", "64", "--budget", "0.5s", "--out", "../out"]
    ended = subprocess.run([sys.executable, "-m", "fwpkm_bench", *words], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    assert "side B: output is off by" in ended.stdout


def test_a_parameter_of_another_name_is_named(repository: Path) -> None:
    edit(repository, "self.out", "self.project")
    result = compare("HEAD")
    assert result.exit_code == 4, result.output
    assert "its parameters are not those of side A" in result.output
    assert "out.bias, out.weight, project.bias, project.weight" in result.output


def test_a_wrong_tail_is_found_at_the_size_that_is_timed(repository: Path) -> None:
    """What is right for the short inputs of the first check."""
    wrong = "        mean = mean * (1 + (steps > 200).float().view(1, -1, 1))\n        return self.out(mean)"
    edit(repository, "        return self.out(mean)", wrong)
    result = compare("HEAD", "--seq", "256")
    assert result.exit_code == 3, result.output
    assert "output, as timed is off by" in result.output


def test_half_precision(repository: Path) -> None:
    edit(repository, "mean = sums / steps", "mean = 1.0 * sums / steps")
    result = compare("HEAD", "--dtype", "bfloat16")
    assert result.exit_code in (0, 1), result.output
    assert table()["results"].tolist() == ["right"]


def test_links_out_of_the_repository_are_left_out(repository: Path) -> None:
    (repository / "link").symlink_to("/etc/passwd")
    commit(repository, "a link")
    assert compare("HEAD").exit_code in (0, 1)


FAILURES = [
    ("import torch\n", "import torhc\n", "No module named 'torhc'"),
    ("class Mean(", "class Meen(", "has no class 'Mean'"),
    (
        "            sums = ",
        "            raise RuntimeError('broke')\n            sums = ",
        "RuntimeError: broke",
    ),
    (
        "            sums = ",
        "            import os; os.kill(os.getpid(), 11)\n            sums = ",
        "ended by SIGSEGV",
    ),
]


@pytest.mark.parametrize(("before", "after", "said"), FAILURES)
def test_a_side_that_fails_is_named(repository: Path, before: str, after: str, said: str) -> None:
    edit(repository, before, after)
    commit(repository, "break it")
    edit(repository, after, before)
    result = compare("main")
    assert result.exit_code == 4, result.output
    (row,) = table().to_dict("records")
    assert row["status"] != "ok"
    assert row["reason"].startswith("side A, main (")
    assert said in row["reason"]
    assert "Traceback" not in result.output
    assert result.output.splitlines()[-1] == "1 case: 1 not measured"


def test_each_side_is_started_first_second_and_third_alike() -> None:
    """The third process to start is some percent faster, whichever side's it is."""
    names = ["A", "B", AGAIN]
    for seed in range(20):
        orders = list(itertools.islice(starting_orders(names, random.Random(seed)), 12))
        for three in (orders[:3], orders[3:6]):
            assert all(sorted(place) == sorted(names) for place in zip(*three, strict=True))
        assert len({tuple(order) for order in orders[:6]}) == 6
        assert orders[6:] == orders[:6]


def test_a_side_settles_after_a_slow_first_call() -> None:
    """How many calls a turn has hangs on how long the last one took, and that is not the first."""
    layer = f"{ROOT / 'tests' / 'broken_layers.py'}:SlowFirst"
    (request,) = requests(
        (layer,), ("prefill",), (64,), (1,), ("float32",), device="cpu", size="", seeds=(0,)
    )
    with Remote(Side("A", "this"), request, timeout_s=60.0) as remote:
        said = remote.call("start", into="")
    assert 1 <= said["call_ms"] < 250


@pytest.mark.slow  # the limit leaves the other side time enough on a slow machine
def test_a_side_that_hangs_is_named(repository: Path) -> None:
    edit(repository, "            sums = ", "            import time; time.sleep(600)\n            sums = ")
    result = compare("HEAD", "--timeout", "30s")
    assert result.exit_code == 4, result.output
    assert "side B, working tree" in result.output
    assert "no answer in 30 s" in result.output


def test_a_layer_that_a_ref_lacks(repository: Path) -> None:
    (repository / "other.py").write_text((repository / "mine.py").read_text())
    result = compare("HEAD", layers="other.py:Mean")
    assert result.exit_code == 4
    assert "side A, HEAD" in result.output
    assert "is not a Python file" in result.output


def test_only_what_differs_is_compared(monkeypatch, tmp_path: Path) -> None:
    """In a checkout of this project, without --layers."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    monkeypatch.chdir(root)
    result = compare("HEAD", layers="")
    assert result.exit_code == 0
    assert "no file of a layer differs" in result.output
    assert not Path("../out").exists()
    text = (root / "layers/linear/eager.py").read_text()
    (root / "layers/linear/eager.py").write_text(text + "\n# as it was\n")
    result = compare("HEAD", layers="")
    assert result.exit_code in (0, 1), result.output
    (row,) = table().to_dict("records")
    assert (row["layer"], row["results"]) == ("linear", "right")
    assert row["recall"] == "same"


def test_the_other_checkout_is_what_runs(monkeypatch, tmp_path: Path) -> None:
    """Not the layers of the tool that measures: a fault in the shared kernels of one side shows."""
    root = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(root)], check=True)
    monkeypatch.chdir(root)
    file = root / "fwpkm_bench/kernels/product_key.py"
    file.write_text(file.read_text() + "\nraise RuntimeError('a kernel of side B')\n")
    result = compare("HEAD", layers="pkm")
    assert result.exit_code == 4
    assert "side B, working tree" in result.output
    assert "a kernel of side B" in result.output


def test_the_phase_that_lost_time_is_named(repository: Path, tmp_path: Path) -> None:
    edit(repository, "            mean = sums", "            import time; time.sleep(0.1); mean = sums")
    sides = (export(repository, ref, name, tmp_path) for ref, name in (("main", "A"), (None, "B")))
    (request,) = requests(
        (LAYER,), ("prefill",), (64,), (1,), ("float32",), device="cpu", size="", seeds=(0,)
    )
    rows = phases_of(Plan(*sides, [request], Rules()), request)
    assert rows[0]["phase"] == "mean"
    assert rows[0]["ms_more"] > 50
    assert rows[0]["share_b"] > 0.5
    assert {row["phase"] for row in rows} == {"sum", "mean", "projections", "other"}


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[Path, Path]:
    """A run, and a copy of it with every sample a quarter longer and recall gone for one layer."""
    root = tmp_path_factory.mktemp("runs")
    a, b = root / "a", root / "b"
    runner.run(Sweep(seq=(256,), budget_s=0.5, layers=("linear", "fwpkm")), a, "test", lambda _: None)
    b.mkdir()
    for file in a.glob("*.json*"):
        (b / file.name).write_text(file.read_text())
    lines = []
    for line in (b / JOURNAL).read_text().splitlines():
        record = json.loads(line)
        record["samples_ms"] = [1.25 * ms for ms in record["samples_ms"]]
        if record["case"]["workload"] == "recall" and record["case"]["layer"] == "fwpkm":
            record["columns"] |= {"right": 0, "recall": 0.0}
        lines.append(json.dumps(record))
    (b / JOURNAL).write_text("\n".join(lines) + "\n")
    return a, b


def test_two_run_folders(two_runs: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = map(str, two_runs)
    result = CliRunner().invoke(main, ["compare", a, b, "--out", "out"])
    assert result.exit_code == 1, result.output
    rows = pd.read_csv("out/compare.csv").set_index("layer")
    assert rows["time_ratio"].to_numpy() == pytest.approx(1.25)
    assert rows["recall"].to_dict() == {"linear": "same", "fwpkm": "lower"}
    assert "Measured apart" in result.output
    assert CliRunner().invoke(main, ["compare", a, a, "--out", "same"]).exit_code == 0
    refused = CliRunner().invoke(main, ["compare", a, "HEAD"])
    assert refused.exit_code == 2
    assert "a run folder is compared with another one" in refused.output


BAD = [
    (("nothere",), "no git ref or run folder is called 'nothere'; there is main, HEAD"),
    (("mian",), "did you mean 'main'?"),
    (("--evil",), "No such option"),
    ((), "name what to compare: a git ref"),
    (("HEAD", "--threshold", "0"), "threshold"),
    (("HEAD", "--budget", "soon"), "--budget takes a time such as 90s or 5m"),
    (("HEAD", "--modes", "prefil"), "did you mean 'prefill'?"),
    (("HEAD", "--device", "cuda"), "device cuda is not there"),
    (("HEAD", "--set", f"{LAYER}.kep=1"), "did you mean 'keep'?"),
    (("HEAD", "--a", f"{LAYER}.keep=1,2"), "has 2 values; a side has one"),
    (("HEAD", "--a", "backend=fast"), "no backend is called 'fast'"),
    (("HEAD", "--backend", "eager,reference"), "a side has one backend"),
    (("--a", "backend=eager", "--b", "backend=reference", "--seq", "0"), "must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD, ids=[" ".join(a) or "nothing" for a, _ in BAD])
def test_bad_input(repository: Path, arguments: tuple[str, ...], said: str) -> None:
    result = CliRunner().invoke(main, ["compare", *arguments, "--layers", LAYER, "--out", "../out"])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not Path("../out").exists()


def test_a_folder_of_something_else_is_left_alone(repository: Path) -> None:
    Path("../out").mkdir()
    Path("../out/mine.txt").write_text("mine")
    result = compare("HEAD")
    assert result.exit_code == 2
    assert "is not empty and holds no comparison" in result.output
    assert [p.name for p in Path("../out").iterdir()] == ["mine.txt"]


def test_outside_a_repository(tmp_path: Path, monkeypatch) -> None:
    """The checkout that the tool runs from is compared, wherever the user stands."""
    monkeypatch.chdir(tmp_path)
    result = compare("nothere", layers="linear")
    assert result.exit_code == 2
    assert "no git ref or run folder is called 'nothere'" in result.output


def test_interrupted(repository: Path) -> None:
    """What was found is kept, and the next one is not begun."""
    edit(repository, "keep: int = 0", "keep: int = 1000")
    words = ["compare", "HEAD", "--layers", LAYER, "--seq", "64,128", "--budget", "1h", "--out", "../out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fwpkm_bench", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    for line in process.stderr:
        if "2 x 3 processes" in line:
            break
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in output + errors
    (row,) = table().to_dict("records")
    assert row["status"] == "interrupted"
    assert row["results"] == "right"
