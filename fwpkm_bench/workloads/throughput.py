"""How fast a layer reads, learns and goes on, and in how much memory: one class a mode.

Shapes: B sequences, T tokens, D model width.

What is timed is a call, and a call is one step or many: ``prefill`` and ``train`` take B sequences of T
tokens in one step, ``decode`` takes one more token of each of B sequences in a step. Latencies, model FLOPs
and least bytes are of a step.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fwpkm_bench import catalog
from fwpkm_bench.measure.ceilings import measure_ceilings
from fwpkm_bench.measure.environment import cache_bytes
from fwpkm_bench.measure.memory import PeakMemory, keep_freed_memory, vram_process_bytes
from fwpkm_bench.measure.timing import measure, sampler
from fwpkm_bench.measurement import DivergedError, Measurement, UnsupportedError
from fwpkm_bench.spec import Case
from fwpkm_bench.stats import timing_columns

BATCHED = True

WARMUP_TOKENS = 2048  # read once before anything is timed: compiles, allocates, starts the threads
MOST_INPUTS = 8
FINITE_PART = 2**18  # elements checked for NaN at a time, so that the check needs little memory
BACKWARD_COST = 3  # a forward and a backward pass, in forward passes

LEAST_DECODED, MOST_DECODED = 16, 512  # tokens a call
CALLS_HOPED_FOR = 12  # within the budget, warm-up and all
CALL_SHARE, GROWTH_SHARE = 32, 4  # of a context: what a call adds to it, and all calls together


@dataclass(frozen=True)
class Settings:
    """None: the sweep and the layers decide."""


class Prefill:
    """The forward pass of B sequences of T tokens from an empty state, without gradients."""

    steps = 1  # of a call

    def __init__(self, case: Case, layer: Any, dtype: torch.dtype) -> None:
        self.case, self.layer = case, layer
        self.step_tokens = case.batch * case.seq
        self.state_bytes = 0  # after the T tokens
        self.inputs = rotating_inputs(case, layer.settings.width, dtype)
        self.warm_up()

    def warm_up(self) -> None:
        """Once over fewer tokens, before the memory is looked at."""
        with torch.no_grad():
            self.layer(self.inputs[0][:, :WARMUP_TOKENS])

    def start(self) -> None:
        """What comes before the first call, and counts for the peak memory."""

    def prepare(self, index: int) -> None:
        """What comes before call ``index``, untimed."""

    def call(self, index: int) -> Any:
        """What is timed."""
        with torch.no_grad():
            return self.layer(self.inputs[index % len(self.inputs)])

    def inspect(self, result: Any) -> None:
        """Look at what the first call returned."""
        y, state = result
        self.state_bytes = state.nbytes()
        check_finite("the output", y)

    def columns(self) -> dict[str, Any]:
        """Model FLOPs and least bytes of a step, and what the mode adds."""
        cost = self.layer.cost(self.case.batch, self.case.seq)
        return {"model_flops": cost.flops, "least_bytes": cost.bytes}


class Train(Prefill):
    """Forward and backward, to the inputs and to all parameters, of B sequences of T tokens from an empty
    state; the loss is ``sum(y * cotangent)`` with a fixed random cotangent.

    The gradients are dropped before each call, so each call allocates them anew. Model FLOPs and least bytes
    are three times those of the forward pass, by the usual convention: the backward pass does all twice, once
    for the inputs and once for the weights. What a layer computes again to save memory does not count.
    """

    def __init__(self, case: Case, layer: Any, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(case.seed + 1)
        shape = (case.batch, case.seq, layer.settings.width)
        self.cotangent = torch.randn(shape, generator=generator).to(case.device, dtype)
        super().__init__(case, layer, dtype)

    def warm_up(self) -> None:
        for x in self.inputs:
            x.requires_grad_()
        y, _ = self.layer(self.inputs[0][:, :WARMUP_TOKENS])
        y.backward(self.cotangent[:, :WARMUP_TOKENS])
        self.prepare(0)

    def prepare(self, index: int) -> None:
        for tensor in (*self.inputs, *self.layer.parameters()):
            tensor.grad = None

    def call(self, index: int) -> Any:
        y, state = self.layer(self.inputs[index % len(self.inputs)])
        y.backward(self.cotangent)  # the gradients of sum(y * cotangent)
        return y.detach(), state

    def inspect(self, result: Any) -> None:
        super().inspect(result)
        trained = {"the input": self.inputs[0], **dict(self.layer.named_parameters())}
        for name, tensor in trained.items():
            if tensor.grad is not None:
                check_finite(f"the gradient of {name}", tensor.grad)
            elif tensor.requires_grad:
                raise UnsupportedError(f"no gradient reaches {name}: what was timed is no training")

    def columns(self) -> dict[str, Any]:
        return {name: BACKWARD_COST * value for name, value in super().columns().items()}


class Decode(Prefill):
    """One token after another of B sequences, on a context of T tokens that was read in before, without
    gradients; a step is one token of each.

    A call decodes ``decode_tokens`` tokens and goes on where the one before stopped; once the context has
    grown by a quarter, it is read in afresh, untimed. Peak memory is above that of the state after the
    context. Model FLOPs are the mean over a call; least bytes stay empty, because how much of its state a
    layer must read for one token is not among its formulas.
    """

    def warm_up(self) -> None:
        case, context = self.case, self.inputs[0]
        self.step_tokens = case.batch
        self.steps = LEAST_DECODED
        self.chunk = getattr(self.layer.settings, "chunk_size", 1)  # a layer that has one writes so often
        most = MOST_DECODED + self.chunk
        self.tokens = context.new_empty(case.batch, most, context.shape[-1])
        self.generator = torch.Generator(context.device).manual_seed(case.seed + 1)
        self.prepare(0)  # its memory is there before the first call
        self.read_context()
        self.state_bytes = self.state.nbytes()

    def read_context(self) -> None:
        """Start again from the T tokens."""
        self.state: Any = None
        with torch.no_grad():
            _, self.state = self.layer(self.inputs[0])
        self.grown = 0

    def start(self) -> None:
        """Decode twice as little as can be: to warm up, and to see how much a call can decode."""
        for _ in range(2):
            self.prepare(0)
            started = time.perf_counter()
            self.call(0)
            if self.case.device == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / self.steps
        self.steps = tokens_a_call(self.case.seq, self.chunk, seconds, self.case.budget_s)

    def prepare(self, index: int) -> None:
        # Not before the first call, whose peak memory is taken.
        if index and self.grown + self.steps > self.case.seq // GROWTH_SHARE:
            self.read_context()
        self.tokens.normal_(generator=self.generator)

    def call(self, index: int) -> Any:
        outputs = []
        with torch.no_grad():
            for token in self.tokens[:, : self.steps].split(1, dim=1):
                y, self.state = self.layer(token, self.state)
                outputs.append(y)
        self.grown += self.steps
        return outputs

    def inspect(self, result: Any) -> None:
        check_finite("the output", *result)

    def columns(self) -> dict[str, Any]:
        before, after = (self.layer.cost(self.case.batch, self.case.seq + n) for n in (0, self.steps))
        flops = (after.flops - before.flops) // self.steps
        return {"model_flops": flops, "least_bytes": None, "decode_tokens": self.steps}


MODES: dict[str, type[Prefill]] = {"prefill": Prefill, "train": Train, "decode": Decode}


def prepared(case: Case) -> Prefill:
    """The mode of ``case`` with its layer and inputs, warmed up and before its first call."""
    dtype = getattr(torch, case.dtype)
    layer = build_layer(case).to(device=case.device, dtype=dtype)
    return MODES[case.mode](case, layer, dtype)


def run(case: Case, look: Callable[[Prefill], None] = lambda mode: None) -> Measurement:
    """Measure one case in this process; ``look`` gets its mode once all is timed."""
    started = time.perf_counter()
    mode = prepared(case)
    layer = mode.layer
    sample = sampler(case.device)  # what it holds on a GPU is none of the layer's memory
    memory = PeakMemory(case.device)
    columns: dict[str, Any] = {}

    def inspect(result: Any) -> None:
        columns["peak_memory_bytes"] = memory.peak_bytes()
        columns["total_memory_bytes"] = memory.total_bytes()
        keep_freed_memory(case.device)
        mode.inspect(result)

    mode.start()
    columns["setup_s"] = time.perf_counter() - started
    timing = measure(
        mode.call,
        device=case.device,
        budget_s=case.budget_s,
        prepare=mode.prepare,
        inspect=inspect,
        sample=sample,
    )
    columns |= timing_columns([sample / mode.steps for sample in timing.samples_ms], mode.step_tokens)
    columns |= {
        "timer": timing.method,
        "vram_process_bytes": vram_process_bytes(case.device),
        "state_bytes": mode.state_bytes,
        "parameters": sum(p.numel() for p in layer.parameters()),
    }
    columns |= (own := mode.columns())
    look(mode)
    ceilings = measure_ceilings(case.device, getattr(torch, case.dtype))
    columns |= ceilings.columns(
        flops=own["model_flops"], moved=own["least_bytes"], seconds=columns["latency_ms_p50"] / 1e3
    )
    return Measurement(columns, timing.samples_ms, timing.warmup_ms)


def tokens_a_call(context: int, chunk: int, seconds: float, budget_s: float) -> int:
    """How many tokens a call decodes where one takes ``seconds``: little against the context and the budget.

    A layer that writes once in ``chunk`` tokens gets whole chunks, so that each call has its share of writes.
    """
    count = min(MOST_DECODED, context // CALL_SHARE, int(budget_s / CALLS_HOPED_FOR / seconds))
    return math.ceil(max(LEAST_DECODED, count) / chunk) * chunk


def check_finite(what: str, *tensors: Tensor) -> None:
    """Raises `DivergedError` where ``tensors`` have NaN or infinity."""
    dense = (tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in tensors)
    parts = (part for tensor in dense for part in tensor.flatten().split(FINITE_PART))
    if not all(bool(part.isfinite().all()) for part in parts):
        raise DivergedError(f"{what} has NaN or infinity where the input has none")


def build_layer(case: Case) -> Any:
    """The layer of ``case``, its parameters drawn from the case's seed."""
    layer_class = catalog.load_layer(case.layer)
    if case.backend not in layer_class.backends:
        raise UnsupportedError(
            f"{case.layer} has no backend {case.backend!r}: {', '.join(layer_class.backends)}"
        )
    torch.manual_seed(case.seed + 2)  # of its own: not the numbers that the inputs are
    return layer_class(layer_class.Settings(**case.layer_settings), backend=case.backend)


def rotating_inputs(case: Case, width: int, dtype: torch.dtype) -> list[Tensor]:
    """As many inputs ``[B, T, D]`` as it takes for them not to stay in the cache from call to call."""
    generator = torch.Generator().manual_seed(case.seed)
    size = case.batch * case.seq * width * dtype.itemsize
    cache = 0 if case.device == "cuda" else cache_bytes()  # a GPU's is flushed instead
    count = min(MOST_INPUTS, 1 + cache // size)
    shape = (case.batch, case.seq, width)
    return [torch.randn(shape, generator=generator).to(case.device, dtype) for _ in range(count)]
