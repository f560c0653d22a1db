"""The run folder: what a sweep leaves behind, however its cases and it itself end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from fwpkm_bench import run as runner
from fwpkm_bench.errors import UsageError
from fwpkm_bench.spec import Sweep, cases
from fwpkm_bench.store import JOURNAL, RECORD_KEYS, RUN, TORN, RunFolder, read_journal, write_atomically
from fwpkm_bench.tables import summary, table, write_tables
from tests.conftest import heed_interrupts

ROOT = Path(__file__).resolve().parents[1]
BROKEN = ROOT / "tests" / "broken_layers.py"
SMALL = Sweep(seq=(256, 512), budget_s=0.05, layers=("softmax", "linear", "gdn", "pkm", "fwpkm"))


def broken(*names: str) -> tuple[str, ...]:
    return tuple(f"{BROKEN}:{name}" for name in names)


def run(sweep: Sweep, out: Path) -> list[dict]:
    """Run ``sweep``; the outcomes in the order in which they were shown."""
    shown: list[dict] = []
    runner.run(sweep, out, "test", lambda p: shown.append(p.outcome) if p.outcome else None)
    return shown


@pytest.fixture(scope="module")
def small_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("small") / "run"
    run(SMALL, out)
    return out


def test_a_row_for_every_case(small_run: Path) -> None:
    rows = pd.read_csv(small_run / "table.csv")
    assert len(rows) == 2 * 2 * 5  # lengths, workloads, layers
    assert rows["case_id"].is_unique
    assert set(rows["status"]) == {"ok"}
    speed = rows[rows["workload"] == "throughput"]
    assert (speed["tokens_per_s"] > 0).all()
    assert (speed["latency_ms_p20"] <= speed["latency_ms_p80"]).all()
    assert (speed["seq"] / speed["tokens_per_s"] * 1e3).to_numpy() == pytest.approx(speed["latency_ms_p50"])
    assert speed["recall"].isna().all()  # what does not apply is empty, never 0
    assert (speed["flop_ceiling_share"].between(0, 1)).all()
    assert rows["fwpkm.topk"].notna().sum() == 4
    assert rows["seq"].dtype.kind == "i"


def test_raw_samples_are_kept(small_run: Path) -> None:
    for record in read_journal(small_run):
        if record["case"]["workload"] == "throughput":
            assert len(record["samples_ms"]) == record["columns"]["samples"]
            assert min(record["samples_ms"]) > 0


def test_summary_puts_speed_and_recall_side_by_side(small_run: Path) -> None:
    short = pd.read_csv(small_run / "summary.csv").set_index(["layer", "seq"])
    assert len(short) == 10
    assert (short["status"] == "ok").all()
    for name in ("tokens_per_s", "peak_memory_bytes", "state_bytes", "recall", "recall_lo", "recall_hi"):
        assert short[name].notna().all(), name
    assert short.loc[("softmax", 512), "recall"] == 1.0
    assert short.loc[("fwpkm", 512), "recall"] == 1.0
    assert short.loc[("pkm", 512), "recall"] < 0.02
    assert short.loc[("gdn", 256), "recall"] > short.loc[("gdn", 512), "recall"] > 0.2
    assert short.loc[("softmax", 512), "state_bytes"] == 512 * 2 * 256 * 4
    assert short.loc[("pkm", 512), "state_bytes"] == 0


def test_seeds_are_pooled(tmp_path: Path) -> None:
    run(Sweep(seq=(256,), budget_s=0.02, seeds=(0, 1), layers=("gdn",)), tmp_path / "run")
    rows = table(tmp_path / "run").set_index("workload")
    assert len(rows) == 4
    (short,) = summary(table(tmp_path / "run")).to_dict("records")
    assert short["recall"] == pytest.approx(rows.loc["recall", "recall"].mean())
    assert short["tokens_per_s"] == pytest.approx(rows.loc["throughput", "tokens_per_s"].median())


def test_run_json_says_what_and_where(small_run: Path) -> None:
    run_record = json.loads((small_run / RUN).read_text())
    assert run_record["sweep"]["seq"] == [256, 512]
    assert run_record["environment"]["versions"]["torch"]


def test_running_again_runs_nothing(small_run: Path) -> None:
    before = (small_run / JOURNAL).read_bytes()
    assert run(SMALL, small_run) == []
    assert (small_run / JOURNAL).read_bytes() == before


def test_pictures_and_reports_are_drawn_from_rows(small_run: Path, tmp_path: Path) -> None:
    from fwpkm_bench import plot, report

    frame, short = write_tables(small_run)
    drawn = {path.stem: path for path in plot.draw_all(frame, short, small_run / "plots")}
    assert set(drawn) == {
        "tokens_per_s",
        "memory",
        "state",
        "recall",
        "overview",
        "tradeoff",
        "recall_by_age",
    }
    for path in drawn.values():
        assert path.stat().st_size > 20_000
        svg = path.with_suffix(".svg").read_text()
        assert "fwpkm" in svg or "DejaVu" in svg
    report.write(small_run, frame, short)
    page = (small_run / "report.html").read_text()
    assert 'src="plots/overview.png"' in page
    assert page.count("<tr>") == 1 + len(short)
    assert "| fwpkm | 512 |" in (small_run / "report.md").read_text()


@pytest.fixture(scope="module")
def modes_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("modes") / "run"
    settings = {"fwpkm.n_subkeys": (16, 32)}
    modes = ("train", "decode")
    run(Sweep(seq=(128,), budget_s=0.02, layers=("linear", "fwpkm"), modes=modes, settings=settings), out)
    return out


def test_each_mode_has_its_rows(modes_run: Path) -> None:
    rows = pd.read_csv(modes_run / "table.csv")
    assert set(rows["status"]) == {"ok"}
    assert len(rows) == 3 * (2 + 1)  # layers with settings, modes and recall
    decode = rows[rows["mode"] == "decode"]
    assert (decode["decode_tokens"] >= 16).all()
    assert rows[rows["mode"] != "decode"]["decode_tokens"].isna().all()
    assert (1e3 / decode["tokens_per_s"]).to_numpy() == pytest.approx(decode["latency_ms_p50"])
    assert decode["state_bytes"].gt(0).all()

    short = pd.read_csv(modes_run / "summary.csv")
    assert list(short["mode"]) == ["train"] * 3 + ["decode"] * 3  # as the sweep has them
    assert short["tokens_per_s"].notna().all()
    same = short.pivot_table(index=["layer", "fwpkm.n_subkeys", "seq"], columns="mode", values="recall")
    assert len(same) == 2
    assert (same["train"] == same["decode"]).all()  # recall has no mode: it stands with each


def test_each_mode_has_its_pictures(modes_run: Path) -> None:
    from fwpkm_bench import plot, report

    frame, short = write_tables(modes_run)
    drawn = [path.stem for path in plot.draw_all(frame, short, modes_run / "plots")]
    each = ("tokens_per_s", "memory", "state", "overview", "tradeoff")
    assert sorted(drawn) == sorted(
        [f"{name}_{mode}" for name in each for mode in ("train", "decode")] + ["recall", "recall_by_age"]
    )
    assert len(set(drawn)) == len(drawn)
    report.write(modes_run, frame, short)
    page = (modes_run / "report.html").read_text()
    for name in ("overview_train", "overview_decode", "recall_by_age"):
        assert f'src="plots/{name}.png"' in page
    text = (modes_run / "report.md").read_text()
    for label in ("linear (train)", "fwpkm, n_subkeys 16 (decode)", "fwpkm, n_subkeys 32 (decode)"):
        assert f"| {label} | 128 |" in text


def test_settings_of_a_layer_are_told_apart(modes_run: Path) -> None:
    from fwpkm_bench.palette import STYLE, colour_of, styled

    _, short = write_tables(modes_run)
    looks = styled(short).groupby("label")[list(STYLE)].agg(lambda c: c.map(str).unique().tolist())
    assert list(looks.index) == ["fwpkm, n_subkeys 16", "fwpkm, n_subkeys 32", "linear"]
    assert all(len(look) == 1 for column in STYLE for look in looks[column])  # the same in every mode
    assert looks["colour"].str[0].is_unique
    assert looks.loc["linear", "colour"] == [str(colour_of("linear"))]


def test_rows_without_numbers_are_drawn_as_nothing(tmp_path: Path) -> None:
    """Also of modes that all failed: no picture, no error."""
    from fwpkm_bench import plot

    sweep = Sweep(
        seq=(32,),
        layers=broken("Raises"),
        workloads=("throughput",),
        modes=("train", "decode"),
        budget_s=0.01,
    )
    run(sweep, tmp_path / "run")
    frame, short = write_tables(tmp_path / "run")
    assert list(short["status"]) == ["crashed"] * 2
    assert plot.draw_all(frame, short, tmp_path / "plots") == []


def test_every_way_to_fail_is_a_row(tmp_path: Path) -> None:
    names = ("Fine", "Raises", "Segfaults", "Exits", "Greedy", "Diverges", "ReferenceOnly")
    sweep = Sweep(
        seq=(32, 64, 128),
        layers=broken(*names),
        workloads=("throughput",),
        backend=("eager",),
        budget_s=0.01,
    )
    run(sweep, tmp_path / "run")
    rows = table(tmp_path / "run")
    rows["name"] = rows["layer"].str.rpartition(":")[2]
    found = {name: list(group["status"]) for name, group in rows.groupby("name")}
    assert found == {
        "Fine": ["ok"] * 3,
        "Raises": ["crashed"] * 3,
        "Segfaults": ["crashed"] * 3,
        "Exits": ["crashed"] * 3,
        "Greedy": ["ok", "oom", "skipped"],
        "Diverges": ["diverged"] * 3,
        "ReferenceOnly": ["unsupported"] * 3,
    }
    reason = {name: group["reason"].iloc[-1] for name, group in rows.groupby("name")}
    assert reason["Raises"] == "RuntimeError: the layer broke"
    assert "ended by SIGSEGV" in reason["Segfaults"]
    assert "exit code 7" in reason["Exits"]
    assert reason["Greedy"] == "oom at the shorter length 64 already"
    assert "NaN or infinity" in reason["Diverges"]
    assert "no backend 'eager'" in reason["ReferenceOnly"]
    short = summary(rows)
    assert len(short) == len(rows)
    assert (short["status"] == rows["status"]).sum() == len(rows)


def test_a_case_that_hangs_is_a_row(tmp_path: Path) -> None:
    """Alone, for a limit that a slow machine can reach with any other case too."""
    sweep = Sweep(
        seq=(32, 64), layers=broken("Sleeps"), workloads=("throughput",), budget_s=0.01, timeout_s=3.0
    )
    run(sweep, tmp_path / "run")
    rows = table(tmp_path / "run")
    assert list(rows["status"]) == ["timeout", "skipped"]
    assert list(rows["reason"]) == [
        "no result after 3 s; raise --timeout and add --retry",
        "timeout at the shorter length 32 already",
    ]


def test_a_run_without_any_interval_is_reported(tmp_path: Path) -> None:
    from fwpkm_bench.commands.sweep import report_run

    sweep = Sweep(seq=(32, 64), layers=broken("SlowThenGreedy"), workloads=("throughput",), budget_s=0.01)
    run(sweep, tmp_path / "run")
    frame = report_run(tmp_path / "run")
    assert list(frame["status"]) == ["ok", "oom"]
    assert list(frame["samples"].dropna()) == [1]
    assert "measured once" in (tmp_path / "run" / "report.md").read_text()


def test_an_unfinished_run_is_joined_too(small_run: Path, tmp_path: Path) -> None:
    """Half of the rows are there: what is there of a layer and length still stands in one row."""
    lines = (small_run / JOURNAL).read_text().splitlines(keepends=True)
    half = [s for s in lines if "softmax" in s or json.loads(s)["case"]["workload"] == "recall"]
    (tmp_path / JOURNAL).write_text("".join(half))
    (tmp_path / RUN).write_text((small_run / RUN).read_text())
    short = summary(table(tmp_path))
    assert len(short) == 10
    assert short.set_index("layer").loc["softmax", ["tokens_per_s", "recall"]].notna().all().all()


def test_failed_cases_run_again_when_asked(tmp_path: Path) -> None:
    sweep = Sweep(
        seq=(32, 64, 128), layers=broken("Greedy", "Fine"), workloads=("throughput",), budget_s=0.01
    )
    out = tmp_path / "run"
    run(sweep, out)
    assert run(sweep, out) == []
    again: list[dict] = []
    runner.run(sweep, out, "test", lambda p: again.append(p.outcome) if p.outcome else None, retry=True)
    assert [r["status"] for r in again] == ["oom", "skipped"]
    assert sorted(table(out)["status"]) == ["ok"] * 4 + ["oom", "skipped"]


def write_sweep(tmp_path: Path) -> list[str]:
    (tmp_path / "kill.toml").write_text(
        "seq = '64..512'\nlayers = ['linear', 'fwpkm']\nbudget_s = 0.2\nsettings.'fwpkm.n_subkeys' = 32\n"
    )
    return [sys.executable, "bench.py", "sweep", str(tmp_path / "kill.toml"), "--out", str(tmp_path / "run")]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_rows(tmp_path: Path) -> None:
    command = write_sweep(tmp_path)
    from fwpkm_bench.spec import from_toml

    expected = sorted(case.case_id for case in cases(Sweep(**from_toml(tmp_path / "kill.toml"))))
    delays = random.Random(0)
    for _ in range(8):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        time.sleep(delays.uniform(0.2, 4.0))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line)["case_id"] for line in (tmp_path / "run" / JOURNAL).read_text().splitlines()]
    assert sorted(lines) == expected
    rows = pd.read_csv(tmp_path / "run" / "table.csv")
    assert sorted(rows["case_id"]) == expected
    assert set(rows["status"]) == {"ok"}


def test_interrupted_it_says_how_to_go_on(tmp_path: Path) -> None:
    command = write_sweep(tmp_path)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[1]
    assert process.returncode == 130, rest
    assert first.startswith("[  1/16]")
    assert "To finish it: fwpkm-bench sweep" in rest
    assert "Traceback" not in rest
    assert len(table(tmp_path / "run")) >= 1
    assert (tmp_path / "run" / "table.csv").exists()


def test_a_torn_last_line_is_set_aside(tmp_path: Path) -> None:
    sweep = Sweep(seq=(32,), layers=broken("Fine"), workloads=("throughput",), budget_s=0.01)
    out = tmp_path / "run"
    run(sweep, out)
    whole = (out / JOURNAL).read_bytes()
    (out / JOURNAL).write_bytes(whole[: len(whole) // 2])
    assert read_journal(out) == []
    assert len(run(sweep, out)) == 1
    assert (out / TORN).read_bytes() == whole[: len(whole) // 2] + b"\n"
    assert [r["case_id"] for r in read_journal(out)] == [c.case_id for c in cases(sweep)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    whole = json.dumps(dict.fromkeys(RECORD_KEYS, 0))
    for damaged in ("nonsense", "{}", "3", '{"case_id": "a"}'):
        (tmp_path / JOURNAL).write_text(f"{whole}\n{damaged}\n{whole}\n")
        with pytest.raises(UsageError, match=r"line 2 of .* is damaged"):
            read_journal(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"digest": 1}'])
def test_a_damaged_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / RUN).write_text(text)
    with pytest.raises(UsageError, match="cannot read"):
        table(tmp_path)


def test_a_folder_is_one_sweep_and_one_process(tmp_path: Path) -> None:
    first = Sweep(seq=(32,), layers=broken("Fine"), workloads=("throughput",), budget_s=0.01)
    second = Sweep(seq=(64,), layers=broken("Fine"), workloads=("throughput",), budget_s=0.01)
    out = tmp_path / "run"
    run(first, out)
    with pytest.raises(UsageError, match="holds another sweep"):
        run(second, out)
    with RunFolder(out, first.digest), pytest.raises(UsageError, match="in use by another process"):
        run(first, out)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UsageError, match="not empty and holds no run"):
        run(first, tmp_path / "mine")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        run(Sweep(seq=(32,)), tmp_path / "run")


def test_an_atomic_write_leaves_the_old_text_when_it_fails(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(_descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_layers_take_turns_at_each_length() -> None:
    planned = runner.plan(Sweep(seq=(64, 128, 256)))
    lengths = [case.seq for case in planned]
    assert lengths == sorted(lengths)
    orders = {tuple(c.label.rpartition(" ")[0] for c in planned if c.seq == seq) for seq in (64, 128, 256)}
    assert len(orders) == 3  # a drift of the machine meets another order at each length
    assert planned == runner.plan(Sweep(seq=(64, 128, 256)))


def test_backends_of_a_layer_run_side_by_side() -> None:
    """``best`` resolves, each once; a layer that has only some runs those, one that has none says so."""

    def planned(**fields) -> list[tuple[str, str]]:
        return [(c.layer, c.backend) for c in cases(Sweep(seq=(64,), workloads=("throughput",), **fields))]

    peer = "peer:fla-gdn"
    assert planned(layers=("gdn", peer), backend=("best", "eager", "reference")) == [
        ("gdn", "eager"),
        ("gdn", "reference"),
        (peer, "theirs"),
    ]
    assert planned(layers=("gdn", peer), backend=("reference",)) == [
        ("gdn", "reference"),
        (peer, "reference"),
    ]
