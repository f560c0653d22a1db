"""The package as people get it: from a checkout, editable, as a wheel and as an sdist."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SEE = (
    "import fwpkm_bench, fwpkm_bench.layers.fwpkm as f, fwpkm_bench.layers.gdn\n"
    "from fwpkm_bench import catalog\n"
    "print(f.__file__); print(catalog.layer_names()); print(sorted(catalog.sweep_files()))"
)
LAYERS = "['fwpkm', 'gdn', 'linear', 'pkm', 'softmax']"


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def fresh_environment(folder: Path) -> Path:
    """A virtual environment that sees the installed dependencies, and not this project."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    )
    # As a plain path: the .pth files of the other environment, an editable install's, are not followed.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, what: Path, *flags: str) -> None:
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps")
    run(*pip, "--no-build-isolation", *flags, what, cwd=ROOT)


def check(python: Path, folder: Path, where: Path) -> None:
    file, layers, sweeps = run(python, "-c", SEE, cwd=folder).splitlines()
    assert Path(file).is_relative_to(where.resolve()), file
    assert layers == LAYERS
    assert "'quick'" in sweeps
    command = (
        python,
        "-m",
        "fwpkm_bench",
        "sweep",
        "--seq",
        "64",
        "--layers",
        "fwpkm",
        "--workloads",
        "recall",
    )
    assert "1.000" in run(*command, "--out", folder / "run", cwd=folder)
    assert (folder / "run" / "plots" / "overview.png").exists()


def test_an_uninstalled_checkout_runs(tmp_path: Path) -> None:
    out = run(sys.executable, ROOT / "bench.py", "list", cwd=tmp_path)
    assert out.startswith("layers     fwpkm gdn linear pkm softmax")


@pytest.mark.slow
def test_editable(tmp_path: Path) -> None:
    python = fresh_environment(tmp_path / "env")
    install(python, ROOT, "--editable")
    check(python, tmp_path, ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_built(tmp_path: Path, kind: str) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", tmp_path / "dist", cwd=ROOT)
    (built,) = (tmp_path / "dist").iterdir()
    python = fresh_environment(tmp_path / "env")
    install(python, built)
    check(python, tmp_path, tmp_path / "env")
    top = {p.name for p in (tmp_path / "env").glob("lib/python*/site-packages/*")}
    assert not top & {"layers", "sweeps", "profiles", "tests", "results"}
