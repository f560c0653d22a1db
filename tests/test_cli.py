"""The command line: what it refuses, in one line, and what it says."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fwpkm_bench.cli import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def invoke(tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return run


BAD = [
    ("sweep --seq 0", "must be at least 1"),
    ("sweep --seq 128k..4k", "runs backwards; write 4k..128k"),
    ("sweep --seq 4x", "'4x' is not a sequence length"),
    ("sweep --layers fwkpm", "did you mean 'fwpkm'?"),
    ("sweep --layers nothing-like-it", "there is fwpkm, gdn, linear, pkm, softmax"),
    ("sweep --workloads recal", "did you mean 'recall'?"),
    ("sweep --modes prefil", "did you mean 'prefill'?"),
    ("sweep --dtype float31", "did you mean 'float32'?"),
    ("sweep --device cdua", "did you mean 'cuda'?"),
    ("sweep --backend eagre", "did you mean 'eager'?"),
    ("sweep --size papper", "did you mean 'paper'?"),
    ("sweep --batch 0", "batch must be at least 1"),
    ("sweep --batch two", "--batch takes whole numbers such as 1,8; 'two' is none"),
    ("sweep --budget 0", "budget_s must be above 0"),
    ("sweep --budget nan", "budget_s must be above 0 and at most"),
    ("sweep --timeout inf", "timeout_s must be above 0 and at most"),
    ("sweep --seeds ²", "'²' is none"),
    ("sweep --seeds 99999999999999999999", "is none"),
    ("sweep --name ../x", "name must be the name of a folder under results/"),
    ("sweep --out .", "--out must name a folder"),
    ("sweep --timeout x", "'x' is not a valid float"),
    ("sweep --set fwpkm.topk=-1", "fwpkm.topk must be a whole number of at least 1, got -1"),
    ("sweep --set fwpkm.topk=513", "fwpkm.topk must be at most n_subkeys (512), got 513"),
    ("sweep --set fwpkm.topk=x", "fwpkm.topk must be of type int, got 'x'"),
    ("sweep --set fwpkm.key_dim=7", "fwpkm.key_dim must be even"),
    ("sweep --set fwpkm.topkk=4", "did you mean 'topk'?"),
    ("sweep --set fwpkn.topk=4", "did you mean 'fwpkm'?"),
    ("sweep --set pkm.topk=600", "512"),
    ("sweep --set recall.key_dim=7", "recall.key_dim must be even"),
    ("sweep --set topk=4", "write layer.setting=value"),
    ("sweep --out /proc/nowhere", "choose another --out"),
    ("sweep missing.toml", "cannot read missing.toml"),
    ("sweep quik", "did you mean 'quick'?"),
    ("sweep --layers missing.py:Layer", "is not a Python file"),
    ("sweep --nonsense", "No such option"),
    ("swep", "No such command"),
    ("show nowhere", "is no run folder"),
    ("plot nowhere", "is no run folder"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_line_and_writes_nothing(invoke, tmp_path, command: str, message: str) -> None:
    result = invoke(*command.split())
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_device_that_is_not_there(invoke, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    result = invoke("sweep", "--device", "cuda", "--size", "laptop")
    assert result.exit_code == 2
    assert "device cuda is not there" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sek = '4k'", "did you mean 'seq'?"),
        ("seq = ", "is not valid TOML"),
        ("layers = 3", "layers must be a string or a list, got 3"),
        ("budget_s = 'long'", "budget_s must be a number, got 'long'"),
        ("settings = 4", "settings must be a table"),
        ("[settings]\n'fwpkm.topk' = []", "fwpkm.topk must be a number, a string"),
        ("[settings]\n'fwpkm.topk' = 2020-01-01", "fwpkm.topk must be a number, a string"),
        ("seq = '0'", "must be at least 1"),
    ],
)
def test_bad_toml_is_named(invoke, tmp_path, text: str, message: str) -> None:
    (tmp_path / "mine.toml").write_text(text)
    result = invoke("sweep", "mine.toml")
    assert (result.exit_code, message in result.output) == (2, True), result.output


def test_flags_win_over_the_file(invoke, tmp_path) -> None:
    (tmp_path / "mine.toml").write_text(
        "seq = ['1k', 2048]\nlayers = ['fwpkm', 'pkm']\nworkloads = 'recall'\n"
        "[settings.fwpkm]\ntopk = [2, 4]\n"
    )
    result = invoke("sweep", "mine.toml", "--dry-run")
    assert result.exit_code == 0
    assert "6 cases, to results/mine; nothing was run" in result.output  # 2 lengths x (2 of fwpkm + pkm)
    result = invoke(
        "sweep", "mine.toml", "--dry-run", "--seq", "4k", "--set", "fwpkm.topk=8", "--name", "other"
    )
    assert "2 cases, to results/other" in result.output


def test_values_for_one_setting_add_up(invoke) -> None:
    settings = ("--set", "fwpkm.topk=4", "--set", "fwpkm.topk=8")
    result = invoke(
        "sweep", "--layers", "fwpkm", "--seq", "4k", *settings, "--workloads", "recall", "--dry-run"
    )
    assert "2 cases" in result.output


def test_without_a_command_it_helps(invoke) -> None:
    assert invoke().output.startswith("Usage:")


def test_every_named_sweep_can_be_planned(invoke) -> None:
    for path in sorted((ROOT / "sweeps").glob("*.toml")):
        result = invoke("sweep", path.stem, "--dry-run")
        assert result.exit_code == 0, result.output


def test_list_and_doctor(invoke) -> None:
    listed = invoke("list").output
    assert "layers     fwpkm gdn linear pkm softmax" in listed
    assert "recall throughput" in listed
    said = invoke("doctor").output
    assert "device cpu: yes" in said
    assert "layer fwpkm      reference, eager" in said


def test_help_imports_nothing_heavy() -> None:
    """What makes help slow is imports: the time itself is no test."""
    code = (
        "import sys; sys.argv=['fwpkm-bench','--help']\n"
        "from fwpkm_bench.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch','pandas','numpy','matplotlib','rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sweep" in done.stdout


def test_internal_errors_are_one_line(invoke, monkeypatch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("a fault of ours\nwith details")

    monkeypatch.delenv("FWPKM_BENCH_TRACEBACK", raising=False)
    monkeypatch.setattr("fwpkm_bench.catalog.layer_names", fail)
    result = invoke("list")
    assert result.exit_code == 70
    assert "internal error, please report it: RuntimeError: a fault of ours" in result.output
    assert len(result.output.strip().splitlines()) == 1
