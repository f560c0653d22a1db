"""What the device can do at best: a matrix product and a copy, timed in the same process as the case."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fwpkm_bench.measure.timing import Sampler, cpu_sample, cuda_sampler

SAMPLES = 5
MATRIX = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


@dataclass(frozen=True)
class Ceilings:
    """``flops`` of a square matrix product a second, ``bytes`` read and written by a copy a second.

    On a GPU ``tf32_flops`` too: what float32 products come to where their operands may be rounded.
    """

    flops: float
    bytes: float
    tf32_flops: float | None = None

    def columns(self, *, flops: int, moved: int | None, seconds: float) -> dict[str, float | None]:
        """Operations and bytes a second of what took ``seconds``, and what share of the ceilings that is;
        of bytes nothing where it is not known how many were ``moved``."""
        return {
            "tflop_per_s": flops / seconds / 1e12,
            "gb_per_s": None if moved is None else moved / seconds / 1e9,
            "flop_ceiling_share": flops / seconds / self.flops,
            "byte_ceiling_share": None if moved is None else moved / seconds / self.bytes,
            "ceiling_tflop_per_s": self.flops / 1e12,
            "ceiling_tf32_tflop_per_s": None if self.tf32_flops is None else self.tf32_flops / 1e12,
            "ceiling_gb_per_s": self.bytes / 1e9,
        }


def measure_ceilings(device: str, dtype: torch.dtype) -> Ceilings:
    """Time both on ``device``; random operands, because products of zeros run faster."""
    sample = cuda_sampler() if device == "cuda" else cpu_sample
    flops = _product(sample, device, dtype)
    tf32 = None
    if device == "cuda":
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            tf32 = _product(sample, device, torch.float32)
        finally:
            torch.set_float32_matmul_precision(precision)
    size = COPY_BYTES[device]
    if device == "cuda":
        size = min(size, torch.cuda.mem_get_info()[0] // 4)
    source = torch.empty(size // 4, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.zeros_like(source)
    copy = _best(sample, lambda: target.copy_(source))
    return Ceilings(flops, bytes=2 * source.nbytes / copy, tf32_flops=tf32)


def _product(sample: Sampler, device: str, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product."""
    size = MATRIX[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best(sample, lambda: torch.mm(a, b, out=out))


def _best(sample: Sampler, call: Callable[[], Any]) -> float:
    """Seconds: the median after one warm-up."""
    sample(call)
    return statistics.median(sample(call)[0] for _ in range(SAMPLES)) / 1e3
