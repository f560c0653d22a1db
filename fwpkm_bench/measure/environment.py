"""The machine and the software that a run was measured on."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "triton", "numpy", "pandas", "fla-core", "nvidia-ml-py")


def describe() -> dict[str, Any]:
    """CPU, memory, GPU, versions and the state of the code, for ``run.json``; imports no torch."""
    memory = psutil.virtual_memory().total
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None,
        "memory_bytes": memory,
        "gpus": gpus(),
        "versions": versions(),
        "git": git_state(),
    }


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on."""
    from fwpkm_bench import __version__

    found = {"fwpkm-bench": __version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cache_bytes() -> int:
    """The size of the CPU's last-level cache; 32 MiB where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) * 1024)
    return max(sizes, default=32 * 2**20)


def gpus() -> list[dict[str, Any]]:
    """Name, memory, driver and clocks of each NVIDIA GPU; empty where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    found = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = _answer(pynvml.nvmlDeviceGetMemoryInfo, handle)
        found.append(
            {
                "name": _answer(pynvml.nvmlDeviceGetName, handle),
                "memory_bytes": getattr(memory, "total", None),
                "driver": _answer(pynvml.nvmlSystemGetDriverVersion),
                "sm_clock_mhz": _answer(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
                "max_sm_clock_mhz": _answer(pynvml.nvmlDeviceGetMaxClockInfo, handle, pynvml.NVML_CLOCK_SM),
            }
        )
    return found


def _answer(ask: Callable[..., Any], *arguments: Any) -> Any:
    """What the driver answers, or None: a part of a shared GPU does not tell everything."""
    import pynvml

    try:
        return ask(*arguments)
    except pynvml.NVMLError:
        return None


def git_state() -> dict[str, Any] | None:
    """Commit of the code, and whether the working tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        dirty = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": dirty}


def _git(root: Path, *arguments: str) -> str:
    if not (root / ".git").exists():
        raise FileNotFoundError(root / ".git")
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
