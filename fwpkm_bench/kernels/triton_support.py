"""Where Triton kernels can run, and the numbers that all launches need."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"  # Triton reads it as it decorates a kernel
GPU_BLOCKS_VARIABLE = "FWPKM_BENCH_GPU_BLOCKS"  # for what is compiled for a GPU without one
# Whether blocks are chosen for a GPU: interpreted, a program takes a while, so fewer and larger are better.
GPU_BLOCKS = not INTERPRETED or os.environ.get(GPU_BLOCKS_VARIABLE) == "1"


def require_triton(device: torch.device) -> None:
    """Refuse a device that no kernel can run on.

    Raises:
        ValueError: Triton is missing, or the device is no GPU and the kernels are not interpreted.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        raise ValueError(
            "backend 'triton' needs triton, which is not installed: pip install triton"
        ) from None
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"backend 'triton' runs on a CUDA device, not on {device.type}; "
            "TRITON_INTERPRET=1 in the environment runs its kernels on a CPU, slowly, for tests"
        )


def power_of_two(size: int, least: int = 1) -> int:
    """The least power of two that holds ``size``, and at least ``least``."""
    return max(least, 1 << (size - 1).bit_length())
