"""Measuring instruments against things of known size."""

import os
import time
from types import SimpleNamespace

import pynvml
import pytest
import torch

from fwpkm_bench.measure import timing
from fwpkm_bench.measure.ceilings import Ceilings, measure_ceilings
from fwpkm_bench.measure.memory import PeakMemory, vram_process_bytes

MIB = 2**20


class Clock:
    """A call whose durations are given, on a clock that only it moves."""

    def __init__(self, monkeypatch, durations_s) -> None:
        self.durations, self.now, self.calls = durations_s, 0.0, []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter_ns", lambda: round(self.now * 1e9))

    def __call__(self, index: int) -> int:
        self.calls.append(index)
        self.now += self.durations(index)
        return index


def test_a_fast_call_is_warmed_up_and_sampled_often(monkeypatch) -> None:
    call = Clock(monkeypatch, lambda i: 1.0 if i == 0 else 0.01)
    result = timing.measure(call, device="cpu", budget_s=10.0)
    assert len(result.samples_ms) == timing.MAX_SAMPLES
    assert result.samples_ms == pytest.approx([10.0] * timing.MAX_SAMPLES)
    assert result.warmup_ms[0] == pytest.approx(1000.0)  # the slow first call is kept, and not counted
    assert call.calls == list(range(len(call.calls)))


def test_warm_up_waits_for_a_trend_to_end(monkeypatch) -> None:
    call = Clock(monkeypatch, lambda i: 0.05 * 0.8**i + 0.001)
    result = timing.measure(call, device="cpu", budget_s=10.0)
    assert len(result.warmup_ms) > 10
    assert max(result.samples_ms) < 1.1 * min(result.samples_ms)


@pytest.mark.parametrize(("seconds", "samples"), [(30.0, 1), (6.0, 1), (4.0, 1), (2.4, 2), (1.5, 4)])
def test_a_slow_call_is_sampled_within_the_budget(monkeypatch, seconds: float, samples: int) -> None:
    call = Clock(monkeypatch, lambda i: seconds)
    result = timing.measure(call, device="cpu", budget_s=10.0)
    assert len(result.samples_ms) == samples
    assert call.now <= max(10.0, seconds)


def test_the_first_result_is_inspected_outside_the_timing(monkeypatch) -> None:
    seen = []
    call = Clock(monkeypatch, lambda i: 0.01)

    def inspect(result: int) -> None:
        seen.append(result)
        call.now += 5.0

    result = timing.measure(call, device="cpu", budget_s=1.0, inspect=inspect)
    assert seen == [0]
    assert max(result.warmup_ms + result.samples_ms) == pytest.approx(10.0)


def test_every_call_is_prepared_outside_the_timing(monkeypatch) -> None:
    prepared = []
    call = Clock(monkeypatch, lambda i: 0.01)

    def prepare(index: int) -> None:
        assert call.calls == prepared  # each before its own call
        prepared.append(index)
        call.now += 5.0

    result = timing.measure(call, device="cpu", budget_s=1.0, prepare=prepare)
    assert prepared == call.calls == list(range(len(result.warmup_ms) + len(result.samples_ms)))
    assert len(result.samples_ms) == timing.MAX_SAMPLES
    assert max(result.warmup_ms + result.samples_ms) == pytest.approx(10.0)


def test_peak_memory_of_a_known_allocation() -> None:
    memory = PeakMemory("cpu")
    block = torch.ones(64 * MIB // 4)
    del block
    first = memory.peak_bytes()
    assert 60 * MIB < first < 90 * MIB
    small = PeakMemory("cpu")
    torch.ones(MIB // 4)
    assert small.peak_bytes() < 16 * MIB  # the earlier peak is forgotten


def test_shares_of_the_ceilings() -> None:
    columns = Ceilings(flops=2e9, bytes=4e9).columns(flops=10**8, moved=10**9, seconds=0.5)
    assert columns["flop_ceiling_share"] == pytest.approx(0.1)
    assert columns["byte_ceiling_share"] == pytest.approx(0.5)
    assert (columns["tflop_per_s"], columns["gb_per_s"]) == pytest.approx((2e-4, 2.0))
    unknown = Ceilings(flops=2e9, bytes=4e9).columns(flops=10**8, moved=None, seconds=0.5)
    assert unknown["gb_per_s"] is unknown["byte_ceiling_share"] is None


def test_ceilings_are_of_this_machine() -> None:
    found = measure_ceilings("cpu", torch.float32)
    assert 1e9 < found.flops < 1e14
    assert 1e8 < found.bytes < 1e13


@pytest.mark.parametrize("kind", ["GPU", "MIG"])
def test_the_drivers_device_is_torchs(monkeypatch, kind: str) -> None:
    """The driver has two GPUs, torch sees the second alone and calls it 0."""
    held = {f"{kind}-first": 11, f"{kind}-second": 22}

    def handle(uuid: str) -> str:
        if uuid not in held:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return uuid

    def processes(uuid: str) -> list[SimpleNamespace]:
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=held[uuid])
        return [SimpleNamespace(pid=-1, usedGpuMemory=99), mine]

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: list(held)[index])
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="second"))
    assert vram_process_bytes("cuda") == 22
    held.pop(f"{kind}-second")
    assert vram_process_bytes("cuda") is None
