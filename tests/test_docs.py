"""What the documents say is so."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fwpkm_bench.cli import main
from tests.readme import commands

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "results/README.md", "profiles/README.md")


def documented() -> list[str]:
    """Every ``fwpkm-bench ...`` command of the documents."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        found += re.findall(r"`(fwpkm-bench [^`]+)`", text)
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += re.findall(r"^(fwpkm-bench .*?)(?:\s+#.*)?$", block, re.MULTILINE)
    return found


@pytest.mark.parametrize("command", sorted(set(documented())))
def test_documented_commands_are_understood(command: str, tmp_path: Path, monkeypatch) -> None:
    """Sweeps are planned, not run; the run folders that are shown are the committed ones."""
    words = command.replace("path/to/file.py:YourClass", f"{ROOT}/tests/broken_layers.py:Fine").split()[1:]
    words = ["softmax" if word == "yours" else word.replace("yours,", "") for word in words]
    if words[0] == "plot":
        words[0] = "show"
    if words[0] == "verify":
        words = ["verify", "--device", "cpu", "--layers", "linear"]
    if words[0] == "compare" and "results/cpu-2core" not in words:  # takes minutes: tests/test_compare.py
        words.append("--help")
    elif words[0] == "compare":
        words += ["--out", str(tmp_path)]
    if words[0] == "kernels":  # takes a minute: tests/test_triton.py
        words.append("--help")
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, [*words, "--dry-run"] if words[0] in ("sweep", "profile") else words)
    assert result.exit_code == 0, result.output


def test_the_readme_has_its_two_commands() -> None:
    both = commands()
    assert set(both) == {"run", "test"}
    for command in both.values():
        assert "python3 -m venv" in command
        assert "-c constraints.txt" in command
        assert len(command.splitlines()) == 1
    assert both["run"].endswith("fwpkm-bench sweep --seq 4k..128k")
    assert both["test"].endswith("pytest")


def test_the_readme_code_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_links_and_pictures_are_there() -> None:
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert target.startswith("http") or (ROOT / name).parent.joinpath(target).exists(), target
