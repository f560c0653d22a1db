"""How fast a layer reads, and in how much memory.

Mode ``prefill``: the forward pass of B sequences of T tokens from an empty state, without gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwpkm_bench import catalog
from fwpkm_bench.measure.ceilings import measure_ceilings
from fwpkm_bench.measure.environment import cache_bytes
from fwpkm_bench.measure.memory import PeakMemory, vram_process_bytes
from fwpkm_bench.measure.timing import measure
from fwpkm_bench.measurement import DivergedError, Measurement, UnsupportedError
from fwpkm_bench.spec import Case
from fwpkm_bench.stats import timing_columns

MODES = ("prefill",)
BATCHED = True

WARMUP_TOKENS = 2048  # read once before anything is timed: compiles, allocates, starts the threads
MOST_INPUTS = 8
FINITE_TOKENS = 1024  # checked for NaN at a time, so that the check adds nothing to the peak memory


@dataclass(frozen=True)
class Settings:
    """None: the sweep and the layers decide."""


def run(case: Case) -> Measurement:
    """Measure one case in this process."""
    dtype = getattr(torch, case.dtype)
    layer = build_layer(case).to(device=case.device, dtype=dtype)
    inputs = rotating_inputs(case, layer.settings.width, dtype)
    state_bytes = 0

    def inspect(result: tuple[Tensor, Any]) -> None:
        nonlocal state_bytes
        y, state = result
        state_bytes = state.nbytes()
        if not all(bool(part.isfinite().all()) for part in y.split(FINITE_TOKENS, dim=1)):
            raise DivergedError("the output has NaN or infinity where the input has none")

    with torch.no_grad():
        layer(inputs[0][:, :WARMUP_TOKENS])
        memory = PeakMemory(case.device)
        timing = measure(
            lambda i: layer(inputs[i % len(inputs)]),
            device=case.device,
            budget_s=case.budget_s,
            inspect=inspect,
        )
        peak, total = memory.peak_bytes(), memory.total_bytes()
        vram = vram_process_bytes(case.device)
        ceilings = measure_ceilings(case.device, dtype)
    tokens = case.batch * case.seq
    cost = layer.cost(case.batch, case.seq)
    columns: dict[str, Any] = timing_columns(timing.samples_ms, tokens)
    seconds = columns["latency_ms_p50"] / 1e3
    columns |= {
        "timer": timing.method,
        "peak_memory_bytes": peak,
        "total_memory_bytes": total,
        "vram_process_bytes": vram,
        "state_bytes": state_bytes,
        "parameters": sum(p.numel() for p in layer.parameters()),
        "model_flops": cost.flops,
        "least_bytes": cost.bytes,
        "tflop_per_s": cost.flops / seconds / 1e12,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "flop_ceiling_share": cost.flops / seconds / ceilings.flops,
        "byte_ceiling_share": cost.bytes / seconds / ceilings.bytes,
        "ceiling_tflop_per_s": ceilings.flops / 1e12,
        "ceiling_gb_per_s": ceilings.bytes / 1e9,
    }
    return Measurement(columns, timing.samples_ms, timing.warmup_ms)


def build_layer(case: Case) -> Any:
    """The layer of ``case``, its parameters drawn from the case's seed."""
    layer_class = catalog.load_layer(case.layer)
    if case.backend not in layer_class.backends:
        raise UnsupportedError(
            f"{case.layer} has no backend {case.backend!r}: {', '.join(layer_class.backends)}"
        )
    torch.manual_seed(case.seed)
    return layer_class(layer_class.Settings(**case.layer_settings), backend=case.backend)


def rotating_inputs(case: Case, width: int, dtype: torch.dtype) -> list[Tensor]:
    """As many inputs ``[B, T, D]`` as it takes for them not to stay in the cache from call to call."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.batch * case.seq * width * dtype.itemsize
    cache = 0 if case.device == "cuda" else cache_bytes()  # a GPU's is flushed instead
    count = min(MOST_INPUTS, 1 + cache // size)
    shape = (case.batch, case.seq, width)
    return [torch.randn(shape, generator=generator).to(case.device, dtype) for _ in range(count)]
