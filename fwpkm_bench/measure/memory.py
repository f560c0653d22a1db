"""Peak memory of the case's own process."""

import contextlib
import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak above what was there when it was made.

    On a CPU the resident size of this process, whose high-water mark is reset where the system allows
    (Linux); on a GPU the peak of torch's allocator, which counts what torch asked for, to the byte.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            gc.collect()
            _give_back_free_memory()
            with contextlib.suppress(OSError):  # the mark then covers the process's life: an upper bound
                _CLEAR.write_text("5")
            self.before = psutil.Process().memory_info().rss

    def peak_bytes(self) -> int:
        """The highest since then, above what was there."""
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, _resident_peak() - self.before)

    def total_bytes(self) -> int:
        """The highest since then, with what was there (weights, inputs and, on a CPU, the interpreter)."""
        return self.before + self.peak_bytes()


def keep_freed_memory(device: str) -> None:
    """Let the allocator (glibc's) keep freed memory for the next call, as a GPU's does.

    Otherwise every call pays the system again for zeroing the same pages, which on a virtual machine can
    double its time at random. From then on, freed blocks may lie scattered: take the peak before.
    """
    if device == "cpu":
        with contextlib.suppress(AttributeError, OSError):
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _give_back_free_memory() -> None:
    """Return what the allocator holds free to the system (glibc), so that reusing it counts as memory."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_peak() -> int:
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def vram_process_bytes(device: str) -> int | None:
    """What the driver says that this process holds on the GPU, or None where it does not say."""
    if device != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    # By its name: the driver counts all GPUs of the machine, torch those that CUDA_VISIBLE_DEVICES leaves.
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    for kind in ("GPU", "MIG"):  # a whole one, or a part of one
        with contextlib.suppress(pynvml.NVMLError):
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"{kind}-{uuid}")
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                if process.pid == os.getpid():
                    return process.usedGpuMemory
    return None
