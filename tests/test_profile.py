"""A profile says where the time and the memory of a case went, and delivers what it can."""

import json
import stat
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from fwpkm_bench.cli import main
from fwpkm_bench.kernels import phases as ranges
from fwpkm_bench.kernels.phases import in_phase, listening, phase
from fwpkm_bench.layers.fwpkm import FwPKM, addressing
from fwpkm_bench.layers.fwpkm import Settings as FwPKMSettings
from fwpkm_bench.layers.pkm import ProductKeyMemory
from fwpkm_bench.layers.pkm import Settings as PKMSettings
from fwpkm_bench.layers.softmax import Settings as SoftmaxSettings
from fwpkm_bench.layers.softmax import SoftmaxAttention
from fwpkm_bench.measure import phase_clock
from fwpkm_bench.measure.ceilings import Ceilings
from fwpkm_bench.measure.counting import Counts, OperatorCounter
from fwpkm_bench.measure.phase_clock import PhaseClock
from fwpkm_bench.profiling import host
from fwpkm_bench.profiling.memory import LiveTensors, merged
from fwpkm_bench.profiling.phases import against_roofline, measure_with_phases
from fwpkm_bench.profiling.spec import Profile, case_of
from fwpkm_bench.profiling.words import ms_name
from fwpkm_bench.tables import phase_table
from fwpkm_bench.workloads import throughput

ROOT = Path(__file__).resolve().parents[1]
TINY = FwPKMSettings(width=16, key_dim=16, value_dim=16, n_subkeys=16, topk=2, chunk_size=32)
SETTINGS = {f"fwpkm.{n}": (getattr(TINY, n),) for n in ("width", "key_dim", "value_dim", "n_subkeys", "topk")}
SETTINGS |= {"fwpkm.chunk_size": (TINY.chunk_size,)}
FLAGS = [word for name, (value,) in SETTINGS.items() for word in ("--set", f"{name}={value}")]


class Noted:
    """A listener that writes down what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def push(self, name: str) -> None:
        self.heard.append(f"+{name}")

    def pop(self) -> None:
        self.heard.append("-")


def test_ranges_are_heard_only_by_those_who_listen() -> None:
    @in_phase("whole")
    def work() -> int:
        with phase("part"):
            return 3

    noted = Noted()
    assert phase("a") is phase("b") is ranges._UNHEARD  # nothing is made where nobody listens
    with listening(noted):
        assert work() == 3
        with pytest.raises(ZeroDivisionError), phase("fails"):
            _ = 1 / 0
    assert work() == 3
    assert noted.heard == ["+whole", "+part", "-", "-", "+fails", "-"]
    assert ranges._listener is None


class Ticking(nn.Module):
    """Work that takes exactly known times of the clock ``now``, in ranges."""

    def __init__(self, now: list[int]) -> None:
        super().__init__()
        self.now = now
        self.project = nn.Linear(4, 4)

    def work(self, microseconds: int) -> None:
        self.now[0] += 1000 * microseconds

    def forward(self, x):
        self.work(1)
        with phase("read"):
            self.work(10)
            with phase("keys"):
                self.work(100)
            self.work(1000)
        with phase("read"):
            self.work(10_000)
        return self.project(x)


def test_times_are_exclusive_and_add_up(monkeypatch) -> None:
    now = [0]
    monkeypatch.setattr(phase_clock.time, "perf_counter_ns", lambda: now[0])
    layer, clock = Ticking(now), PhaseClock("cpu")
    with torch.no_grad():
        clock.run(layer, lambda: layer(torch.ones(2, 4)))
    taken = clock.milliseconds()
    assert taken == pytest.approx({"other": 0.001, "read": 11.010, "keys": 0.1, "projections": 0})
    assert sum(taken.values()) == pytest.approx(now[0] / 1e6)
    assert clock.entered() == {"read": 2, "keys": 1, "projections": 1}
    with torch.no_grad():
        layer(torch.ones(2, 4))  # no hook is left
    assert clock.milliseconds() == taken


def test_a_gpu_is_timed_by_its_events(monkeypatch) -> None:
    """As far as that can be seen without one: events where phases begin, balanced NVTX ranges."""
    now, nvtx = [0], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = now[0]

        def elapsed_time(self, end: "Event") -> float:
            return (end.at - self.at) / 1e6

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", lambda name: nvtx.append(f"+{name}"))
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: nvtx.append("-"))
    layer, clock = Ticking(now), PhaseClock("cuda")
    with torch.no_grad():
        clock.run(layer, lambda: layer(torch.ones(2, 4)))
    assert clock.milliseconds() == pytest.approx(
        {"other": 0.001, "read": 11.010, "keys": 0.1, "projections": 0}
    )
    assert nvtx == ["+read", "+keys", "-", "-", "+read", "-", "+projections", "-"]


def test_a_slowed_phase_is_the_one_that_grows(monkeypatch) -> None:
    now = [0]
    monkeypatch.setattr(phase_clock.time, "perf_counter_ns", lambda: now[0])
    layer, clock, original = FwPKM(TINY), PhaseClock("cpu"), addressing.pull

    def slow(*arguments):
        now[0] += 20_000_000  # nothing else takes time on this clock
        return original(*arguments)

    monkeypatch.setattr(addressing, "pull", slow)
    with torch.no_grad():
        clock.run(layer, lambda: layer(torch.randn(1, 4 * TINY.chunk_size, 16)))
    names = ("projections", "address", "group", "read", "write", "keys", "other")
    assert clock.milliseconds() == {name: 80.0 * (name == "keys") for name in names}
    assert clock.entered()["keys"] == 4


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_backward_of_its_own_names_its_phases(backend: str) -> None:
    layer, x = FwPKM(TINY, backend=backend), torch.randn(1, 70, 16)
    clock = PhaseClock("cpu")
    clock.run(layer, lambda: layer(x)[0].sum().backward())
    forward = {"projections", "address", "read", "write", "keys"}
    taken = clock.milliseconds()
    assert forward | {f"backward: {name}" for name in forward - {"keys"}} <= set(taken)
    assert all(ms >= 0 for ms in taken.values())


def test_what_autograd_does_backwards_is_told_apart() -> None:
    """A backward pass without names of its own: by the range in which its nodes were made."""
    layer = SoftmaxAttention(SoftmaxSettings(width=16, heads=2, kv_heads=2, head_dim=8))
    clock = PhaseClock("cpu")
    seen: list[tuple[str, str]] = []

    class Watched(OperatorCounter):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append((clock.current, func._overloadpacket.__name__))
            return super().__torch_dispatch__(func, types, args, kwargs)

    def call() -> None:
        with Watched(lambda: clock.current):
            layer(torch.randn(1, 20, 16))[0].sum().backward()

    clock.run(layer, call)
    attention = [where for where, name in seen if name.startswith("_scaled_dot_product")]
    assert attention == ["attention", "backward: attention"]
    products = [where for where, name in seen if name in ("mm", "addmm", "bmm")]
    assert products.count("projections") == 4
    assert products.count("backward: projections") == 4 + 1  # to the weights, and to what was read


def counted(call) -> Counts:
    call()  # what is imported or made once
    with OperatorCounter(lambda: "all") as counter:
        call()
    return counter.phases["all"]


TABLE = torch.randn(1000, 8)
OTHER = torch.randn(1000, 8)
MORE = torch.randn(3, 8)
FEW = torch.tensor([3, 999, 3])
KNOWN = {  # what operators compute, and the bytes that they read and write
    "mm": (lambda: torch.ones(3, 4).mm(torch.ones(4, 5)), 2 * 60, 4 * (12 + 20) + 4 * (12 + 20 + 15)),
    "add": (lambda: TABLE + TABLE, 8000, 4 * 2 * 8000),
    "add_": (lambda: TABLE.add_(0), 8000, 4 * 2 * 8000),
    "copy_": (lambda: TABLE.copy_(OTHER), 0, 4 * 2 * 8000),
    "view": (lambda: TABLE.view(8, 1000).transpose(0, 1)[3:], 0, 0),
    "zeros_like": (lambda: torch.zeros_like(TABLE), 0, 4 * 8000),
    "expand": (lambda: torch.ones(1, 8).expand(1000, 8).sum(), 8000, 4 * 8 + 4 * 8 + 4),
    "index_select": (lambda: TABLE.index_select(0, FEW), 0, 2 * 4 * 24 + 3 * 8),
    "index": (lambda: TABLE[FEW], 0, 2 * 4 * 24 + 3 * 8),
    "index_add_": (lambda: TABLE.index_add_(0, FEW, MORE), 24, 3 * 8 + 3 * 4 * 24),
    "index_put_": (lambda: TABLE.__setitem__(FEW, MORE), 0, 3 * 8 + 2 * 4 * 24),
    "scatter_add_": (
        lambda: TABLE.scatter_add_(0, FEW.unsqueeze(1).expand(3, 8), MORE),
        24,
        3 * 8 + 3 * 4 * 24,
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_operators_are_counted_as_by_hand(name: str) -> None:
    call, flops, moved = KNOWN[name]
    found = counted(call)
    assert (found.flops, found.bytes) == (flops, moved)


def test_a_bag_counts_the_rows_that_it_reads() -> None:
    table, bags, weights = torch.randn(100_000, 8), torch.tensor([[1, 2], [3, 99_999]]), torch.ones(2, 2)
    found = counted(lambda: F.embedding_bag(bags, table, mode="sum", per_sample_weights=weights))
    assert found.flops == 2 * 4 * 8
    rows, indices = 4 * 8 * 4, 4 * 8
    least = rows + indices + weights.nbytes + 2 * 8 * 4
    assert least <= found.bytes <= least + 3 * indices + 64  # torch's own bookkeeping of the bags


def test_attention_counts_the_causal_half() -> None:
    q = torch.randn(1, 2, 64, 8)
    full = counted(lambda: F.scaled_dot_product_attention(q, q, q)).flops
    assert full == 4 * 2 * 64 * 64 * 8
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True)).flops == full // 2


def test_triton_kernels_are_counted_and_their_bytes_are_not_made_up() -> None:
    settings = PKMSettings(width=16, heads=1, n_subkeys=16, topk=2, key_dim=16, value_dim=16)
    layer, clock = ProductKeyMemory(settings, backend="triton"), PhaseClock("cpu")
    with torch.no_grad(), OperatorCounter(lambda: clock.current) as counter:
        clock.run(layer, lambda: layer(torch.randn(1, 5, 16)))
    assert counter.phases["read"].launches == 1
    assert counter.phases["projections"].launches == 0
    ceilings = Ceilings(1e12, 1e11)
    hidden = against_roofline(1.0, counter.phases["read"], 1, ceilings, 0.001)
    assert {hidden[n] for n in ("flops", "bytes", "gb_per_s", "roofline_ms", "distance")} == {None}
    assert hidden["bound"] == "unknown"
    assert against_roofline(1.0, counter.phases["projections"], 1, ceilings, 1.0)["flops"] > 0


@pytest.mark.parametrize(
    ("counts", "bound", "distance"),
    [
        (Counts(operators=10, flops=5 * 10**8, bytes=10**6), "compute", 2.0),
        (Counts(operators=10, flops=10**6, bytes=5 * 10**7), "memory", 2.0),
        (Counts(operators=500, flops=10**6, bytes=10**6), "overhead", 100.0),
        (Counts(operators=2, flops=10**6, bytes=10**6), "neither", 100.0),
    ],
)
def test_what_bounds_a_phase(counts: Counts, bound: str, distance: float) -> None:
    """Of a millisecond, at 1 TFLOP/s, 100 GB/s and 1 us an operator."""
    found = against_roofline(1.0, counts, 1, Ceilings(1e12, 1e11), 1.0)
    assert found["bound"] == bound
    assert found["distance"] == pytest.approx(distance)


def test_tensors_are_followed_until_they_are_freed() -> None:
    weight, kept = torch.ones(2**18), []
    live = LiveTensors({"weights": [weight]})
    with live:
        passing = weight + 1
        kept.append(weight.view(2, -1) * 2)
        del passing
        live.name("state", kept)
    bytes_of = live.split()
    assert bytes_of["weights"] == dict.fromkeys(("highest_bytes", "bytes_at_peak", "bytes_at_end"), 2**20)
    assert bytes_of["activations"]["highest_bytes"] == 2**20
    assert bytes_of["activations"]["bytes_at_end"] == 0
    assert bytes_of["state"]["bytes_at_end"] == 2**20
    assert live.peak() == 3 * 2**20


def test_a_sample_has_the_highest_moment_before_it() -> None:
    kinds = dict.fromkeys(("weights", "inputs", "state", "gradients", "activations"), 0)
    history = [(t, kinds | {"activations": n}) for t, n in ((5, 1), (12, 50), (14, 2), (25, 3))]
    samples = [(t, {"resident_bytes": t}) for t in (9, 20, 30)]
    rows = merged(samples, history, [(10, "read"), (13, "write")], 10, 28)
    assert [row["activations_bytes"] for row in rows] == [1, 50, 3]
    assert [row["phase"] for row in rows] == ["read", "read", "write"]


@pytest.fixture
def quick(monkeypatch) -> None:
    """Ceilings take seconds and have a test of their own."""
    monkeypatch.setattr(throughput, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e11))


@pytest.mark.parametrize("mode", ["prefill", "train", "decode"])
def test_a_sweep_can_keep_the_phases_of_a_case(mode: str, quick, tmp_path) -> None:
    case = case_of(Profile(mode=mode, seq=(96,), settings=SETTINGS, budget_s=0.02))
    measured = measure_with_phases(case)
    assert measured.columns["tokens_per_s"] > 0
    assert sum(row["share"] for row in measured.phases) == pytest.approx(1)
    names = {row["phase"] for row in measured.phases}
    assert {"address", "read", "projections"} <= names
    assert ("backward: write" in names) == (mode == "train")
    record = {"case_id": case.case_id, "case": vars(case), "status": "ok", "reason": "", "columns": {}}
    record |= {"elapsed_s": 1.0, "phases": measured.phases}
    (tmp_path / "journal.jsonl").write_text(json.dumps(record) + "\n")
    table = phase_table(tmp_path)
    assert list(table["case_id"].unique()) == [case.case_id]
    assert list(table["phase"]) == [row["phase"] for row in measured.phases]


FORBIDDEN = """#!/bin/sh
echo "Sampling process 200 times a second."
echo "Error: Permission Denied: Try running again with elevated permissions" >&2
echo "Reason: Operation not permitted (os error 1)" >&2
exit 1
"""


def fake_tool(folder: Path, text: str) -> str:
    tool = folder / "py-spy"
    tool.write_text(text)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    return str(tool)


@pytest.fixture(scope="module")
def profiled(tmp_path_factory):
    """One profile with a py-spy that the system forbids: the folder, and what was said."""
    folder = tmp_path_factory.mktemp("profile")
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "find", lambda name: fake_tool(folder, FORBIDDEN))
        words = ["profile", "fwpkm", "--mode", "train", "--seq", "96", "--budget", "0.2", "--out", str(out)]
        result = CliRunner().invoke(main, [*words, *FLAGS])
    assert result.exit_code == 0, result.output
    return out, result


def test_a_profile_delivers_tables_pictures_and_a_page(profiled) -> None:
    out, result = profiled
    tables = {"phases.csv", "case.csv", "parts.csv", "operators.csv", "memory.csv", "memory_split.csv"}
    pictures = {f"{n}.{kind}" for n in ("phases", "roofline", "memory") for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == {
        *tables,
        *pictures,
        *("profile.json", "profile.md", "trace.json.gz"),
    }
    for path in out.iterdir():
        assert path.stat().st_size > 0
        assert path.name in result.stdout
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []
    phases = pd.read_csv(out / "phases.csv")
    assert phases["share"].sum() == pytest.approx(1)
    assert {"address", "read", "write", "keys", "projections", "backward: read"} <= set(phases["phase"])
    memory = pd.read_csv(out / "memory.csv")
    assert memory["gradients_bytes"].max() > 0
    assert memory["optimizer_bytes"].isna().all()
    split = pd.read_csv(out / "memory_split.csv").set_index("what")
    parameters = sum(p.numel() for p in FwPKM(TINY).parameters())
    assert split.loc["weights", "bytes_at_end"] == 4 * parameters
    assert split.loc["gradients", "bytes_at_end"] >= 4 * parameters


def test_the_page_says_what_the_tables_say(profiled) -> None:
    out, _ = profiled
    page = (out / "profile.md").read_text()
    total = pd.read_csv(out / "case.csv").iloc[0]
    assert f"A call of 96 tokens takes {ms_name(total['off_ms_p50'])}" in page
    assert f"takes {total['overhead_ratio']:.3f} times what it takes without" in page
    phases = pd.read_csv(out / "phases.csv")
    for _, row in phases.iterrows():
        assert f"| {row['phase']} | {row['ms_p50']:,.4g} |" in page
        if row["share"] >= 0.01:
            assert (
                f"**{row['phase']}**, {ms_name(row['ms_p50'])} ({row['share']:.1%}): {row['bound']}" in page
            )
    for name in ("phases", "roofline", "memory"):
        assert f"({name}.png)" in page


def test_what_the_system_forbids_is_one_line(profiled) -> None:
    out, result = profiled
    parts = pd.read_csv(out / "parts.csv").set_index("part")
    assert list(parts["status"]) == ["ok", "ok", "unsupported", "ok"]
    reason = (
        "py-spy: Error: Permission Denied: Try running again with elevated permissions "
        "Reason: Operation not permitted (os error 1)"
    )
    assert parts.loc["host", "reason"] == reason
    assert next(line for line in result.stderr.splitlines() if line.startswith("host")).endswith(reason)


def test_a_profile_replaces_a_profile_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(host, "find", lambda name: None)
    words = ["profile", "fwpkm", "--seq", "64", *FLAGS, "--parts", "host,memory", "--out"]
    result = CliRunner().invoke(main, [*words, str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert "py-spy is not installed: pip install py-spy" in result.stderr
    assert not (tmp_path / "new" / "phases.csv").exists()
    (tmp_path / f".new.{2**22 + 1}.unfinished").mkdir()  # of a process that was killed
    again = CliRunner().invoke(main, [*words, str(tmp_path / "new")])
    assert again.exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    refused = CliRunner().invoke(main, [*words, str(tmp_path / "mine")])
    assert (refused.exit_code, len(refused.stderr.splitlines())) == (2, 1)
    assert "holds no profile" in refused.stderr
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    nothing = CliRunner().invoke(main, [*words[:-2], "host", "--out", str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert not (tmp_path / "nothing").exists()


def test_a_case_that_dies_under_one_part_keeps_the_others(tmp_path) -> None:
    layer = f"{ROOT}/tests/broken_layers.py:ShyOfProfilers"
    words = ["profile", layer, "--seq", "64", "--parts", "trace,memory", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    parts = pd.read_csv(tmp_path / "out" / "parts.csv").set_index("part")
    assert list(parts["status"]) == ["oom", "ok"]
    assert parts.loc["trace", "reason"] == "no memory left for being looked at"
    assert (tmp_path / "out" / "memory.png").exists()


BAD = [
    ("fwkpm", "did you mean 'fwpkm'?"),
    ("fwpkm-trian", "did you mean 'fwpkm-train'?"),
    ("fwpkm --mode trian", "did you mean 'train'?"),
    ("fwpkm --backend eagre", "did you mean 'eager'?"),
    ("fwpkm --backend triton", "backend triton needs --device cuda"),
    ("fwpkm --parts phases,hots", "did you mean 'host'?"),
    ("fwpkm --seq 4k..8k", "a profile is of one length, got 4k, 8k"),
    ("fwpkm --set fwpkm.topk=4,8", "give fwpkm.topk one value, not 2"),
    ("fwpkm --set fwpkm.topkk=4", "did you mean 'topk'?"),
    ("fwpkm --batch 0", "batch must be at least 1"),
    ("fwpkm --out .", "--out must name a folder"),
    ("fwpkm --out /proc/nowhere", "choose another --out"),
    ("missing.toml", "cannot read missing.toml"),
    ("missing.py:Layer", "is not a Python file"),
    ("fwpkm --nonsense", "No such option"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(command: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET")
    result = CliRunner().invoke(main, ["profile", *command.split()])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_profiles_are_data(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in sorted((ROOT / "profiles").glob("*.toml")):
        result = CliRunner().invoke(main, ["profile", path.stem, "--dry-run"])
        assert result.exit_code == 0, result.output
        assert f"to results/profile-{path.stem}; nothing was run" in result.output
    (tmp_path / "mine.toml").write_text("layer = 'gdn'\nseq = '2k'\nparts = ['phases']\n")
    said = CliRunner().invoke(main, ["profile", "mine.toml", "--mode", "decode", "--dry-run"]).output
    assert said.startswith("gdn-eager-decode-2k-")
    assert ": phases, to results/profile-mine" in said
    (tmp_path / "bad.toml").write_text("sek = '2k'\n")
    bad = CliRunner().invoke(main, ["profile", "bad.toml"])
    assert (bad.exit_code, "did you mean 'seq'?" in bad.output) == (2, True)


def test_what_py_spy_saw_is_cut_to_the_calls() -> None:
    frames = [{"name": n, "file": "/x.py", "line": i} for i, n in enumerate(("main", host.CALLS, "f", "g"))]
    thread = {"type": "sampled", "unit": "seconds", "samples": [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]}
    thread |= {"weights": [9.0, 1.0, 2.0, 5.0], "startValue": 0.0, "endValue": 17.0}
    profile = host.cut({"shared": {"frames": frames}, "profiles": [thread]})
    assert profile["profiles"][0]["samples"] == [[1], [1, 2], [1, 2, 3]]
    rows = {row["function"]: row for row in host.functions(profile)}
    assert (rows["g"]["self_s"], rows["f"]["self_s"], rows["f"]["total_s"]) == (5.0, 2.0, 7.0)
    assert rows["f"]["total_share"] == pytest.approx(7 / 8)


@pytest.mark.slow
def test_py_spy_watches_a_child(tmp_path) -> None:
    command = [sys.executable, ROOT / "bench.py", "profile", "fwpkm", "--seq", "96", *FLAGS]
    command += ["--parts", "host,kernels", "--out", tmp_path / "out"]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    parts = pd.read_csv(tmp_path / "out" / "parts.csv").set_index("part")
    assert parts.loc["kernels", "status"] == "ok"
    if parts.loc["host", "status"] != "ok":
        pytest.skip(str(parts.loc["host", "reason"]))
    rows = pd.read_csv(tmp_path / "out" / "host.csv")
    assert any("layers/fwpkm/" in str(file) for file in rows["file"])
    assert rows["self_share"].sum() == pytest.approx(1)
    assert "<svg" in (tmp_path / "out" / "host.svg").read_text()
