"""Each mode of the throughput workload times what it says it does."""

import dataclasses
import statistics
import time

import pytest
import torch

from fwpkm_bench.measure.ceilings import Ceilings
from fwpkm_bench.measurement import DivergedError, UnsupportedError
from fwpkm_bench.spec import Case, Sweep, cases
from fwpkm_bench.workloads import throughput
from tests.broken_layers import Fine, NoState
from tests.broken_layers import Settings as FineSettings

SMALL = {"fwpkm.n_subkeys": (16,), "fwpkm.chunk_size": (24,), "fwpkm.topk": (2,), "pkm.n_subkeys": (16,)} | {
    "pkm.topk": (4,)
}
LAYERS = ("softmax", "linear", "gdn", "pkm", "fwpkm")


def case_of(layer: str, mode: str, seq: int = 96, **more) -> Case:
    settings = {name: values for name, values in SMALL.items() if name.startswith(f"{layer}.")}
    fields = {"budget_s": 0.02, "settings": settings} | more
    (case,) = cases(Sweep(seq=(seq,), layers=(layer,), workloads=("throughput",), modes=(mode,), **fields))
    return case


@pytest.fixture(autouse=True)
def no_ceilings(monkeypatch) -> None:
    """They take seconds and have a test of their own."""
    monkeypatch.setattr(throughput, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e11))


class Watch:
    """Keeps the layer that a case is measured with, and copies of what it was called with and returned."""

    def __init__(self, monkeypatch, layer=None) -> None:
        self.layer = layer
        self.calls: list[tuple[torch.Tensor, bool, torch.Tensor]] = []  # x, whether from the start, y
        build = throughput.build_layer

        def watched(case: Case):
            self.layer = self.layer or build(case)
            self.layer.register_forward_hook(self.see)
            return self.layer

        monkeypatch.setattr(throughput, "build_layer", watched)

    def see(self, layer, arguments, result) -> None:
        first = len(arguments) == 1
        self.calls.append((arguments[0].detach().clone(), first, result[0].detach().clone()))


def test_the_modes_are_offered_and_prefill_is_the_usual_one() -> None:
    assert list(throughput.MODES) == ["prefill", "train", "decode"]
    assert Sweep().modes == ("prefill",)


@pytest.mark.parametrize("layer", LAYERS)
def test_train_reaches_the_inputs_and_every_parameter(layer: str, monkeypatch) -> None:
    """And leaves the gradients of one call alone, those of ``sum(y * cotangent)``."""
    watch = Watch(monkeypatch)
    made: list[throughput.Train] = []

    class Kept(throughput.Train):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setitem(throughput.MODES, "train", Kept)
    measurement = throughput.run(case_of(layer, "train", batch=(2,)))
    (mode,) = made
    calls = len(measurement.warmup_ms) + len(measurement.samples_ms)
    last = mode.inputs[(calls - 1) % len(mode.inputs)]
    found = {"x": last.grad, **{name: p.grad for name, p in watch.layer.named_parameters()}}
    assert all(grad is not None and grad.abs().max() > 0 for grad in found.values()), found

    x = last.detach().clone().requires_grad_()
    parameters = dict(watch.layer.named_parameters())
    loss = (watch.layer(x)[0] * mode.cotangent).sum()
    expected = torch.autograd.grad(loss, [x, *parameters.values()])
    for (name, grad), once in zip(found.items(), expected, strict=True):
        scale = float(once.abs().max())
        torch.testing.assert_close(grad, once, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")


class Weighted(Fine):
    """``y = w x``; notes what its gradients are when a forward pass begins."""

    def __init__(self, settings: FineSettings, *, backend: str = "eager") -> None:
        super().__init__(settings, backend=backend)
        self.weight = torch.nn.Parameter(torch.ones(settings.width))
        self.before: list[bool] = []

    def forward(self, x, state=None):
        self.before.append(self.weight.grad is not None or (x.is_leaf and x.grad is not None))
        return x * self.weight, NoState()


def test_gradients_are_cleared_before_every_call(monkeypatch) -> None:
    layer = Weighted(FineSettings())
    Watch(monkeypatch, layer)
    measurement = throughput.run(case_of("linear", "train"))
    assert len(layer.before) == 1 + len(measurement.warmup_ms) + len(measurement.samples_ms)
    assert len(measurement.samples_ms) > 2
    assert not any(layer.before)


class Frozen(Weighted):
    def forward(self, x, state=None):
        return x + 0 * self.weight.detach(), NoState()


class Overflows(Weighted):
    """A finite output whose gradient is not."""

    def forward(self, x, state=None):
        return x * self.weight.clamp(min=0) + (self.weight - 1).abs().sqrt(), NoState()


def test_a_parameter_without_a_gradient_is_not_trained(monkeypatch) -> None:
    Watch(monkeypatch, Frozen(FineSettings()))
    with pytest.raises(UnsupportedError, match="no gradient reaches weight"):
        throughput.run(case_of("linear", "train"))


def test_a_gradient_that_is_not_finite_has_diverged(monkeypatch) -> None:
    Watch(monkeypatch, Overflows(FineSettings()))
    with pytest.raises(DivergedError, match="the gradient of weight has NaN"):
        throughput.run(case_of("linear", "train"))


@pytest.mark.parametrize("layer", LAYERS)
def test_training_costs_three_forward_passes(layer: str) -> None:
    columns = {mode: throughput.run(case_of(layer, mode)).columns for mode in ("prefill", "train")}
    for name in ("model_flops", "least_bytes"):
        assert columns["train"][name] == 3 * columns["prefill"][name]
    assert columns["train"]["state_bytes"] == columns["prefill"]["state_bytes"]
    assert "decode_tokens" not in columns["train"]


def test_sparse_gradients_are_checked_too(monkeypatch) -> None:
    watch = Watch(monkeypatch)
    (case,) = cases(
        Sweep(
            seq=(64,),
            layers=("pkm",),
            workloads=("throughput",),
            modes=("train",),
            budget_s=0.02,
            settings={"pkm.n_subkeys": (16,), "pkm.topk": (4,), "pkm.sparse_grad": (True,)},
        )
    )
    assert throughput.run(case).columns["tokens_per_s"] > 0
    assert watch.layer.values.grad.is_sparse
    broken = torch.tensor([[0.0], [float("inf")]]).to_sparse()
    with pytest.raises(DivergedError, match="it has NaN"):
        throughput.check_finite("it", torch.ones(3), broken)


def test_peak_memory_of_training_has_the_gradients(monkeypatch) -> None:
    layer = Weighted(FineSettings(width=4 * 2**20))
    Watch(monkeypatch, layer)
    peak = throughput.run(case_of("linear", "train", seq=1)).columns["peak_memory_bytes"]
    assert peak >= 0.9 * 3 * 16 * 2**20  # y, and the gradients of x and of the weight


@pytest.mark.parametrize("layer", LAYERS)
def test_decode_goes_on_from_call_to_call(layer: str, monkeypatch) -> None:
    """One token at a time; what it returns is what the whole sequence gives at once."""
    watch = Watch(monkeypatch)
    columns = throughput.run(case_of(layer, "decode", seq=200, batch=(2,))).columns
    starts = [i for i, (_, first, _) in enumerate(watch.calls) if first]
    assert starts[0] == 0
    longest = 0
    for start, stop in zip(starts, [*starts[1:], len(watch.calls)], strict=True):
        xs, _, ys = zip(*watch.calls[start:stop], strict=True)
        assert [x.shape[1] for x in xs] == [200] + [1] * (len(xs) - 1)
        with torch.no_grad():
            whole, _ = watch.layer(torch.cat(xs, 1))
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=0, atol=2e-4 * float(whole.abs().max()))
        assert len(torch.unique(torch.cat(xs, 1)[0, :, 0])) > 0.99 * (200 + len(xs) - 1)  # new tokens
        longest = max(longest, len(xs) - 1)
    assert longest > 2 * columns["decode_tokens"]  # several calls on one state
    assert longest <= 2 * 16 + max(columns["decode_tokens"], 200 // throughput.GROWTH_SHARE)
    context = watch.calls[0][0]
    assert columns["state_bytes"] == watch.layer(context)[1].nbytes()


@pytest.mark.parametrize(("layer", "least"), [("linear", 16), ("fwpkm", 24)])
def test_decode_latencies_are_of_a_token(layer: str, least: int) -> None:
    measurement = throughput.run(case_of(layer, "decode", seq=300, batch=(3,)))
    columns, count = measurement.columns, measurement.columns["decode_tokens"]
    assert count >= least
    assert count % least == 0 or layer == "linear"
    assert len(measurement.samples_ms) == columns["samples"]
    ordered = sorted(ms / count for ms in measurement.samples_ms)
    assert ordered[0] <= columns["latency_ms_p20"] <= columns["latency_ms_p80"] <= ordered[-1]
    median = statistics.median(ordered)
    assert columns["latency_ms_p50"] == pytest.approx(median)
    assert columns["tokens_per_s"] == pytest.approx(3 * 1e3 / median)
    assert columns["tflop_per_s"] == pytest.approx(columns["model_flops"] / median / 1e9)
    assert columns["least_bytes"] is columns["gb_per_s"] is columns["byte_ceiling_share"] is None


def test_decoding_costs_more_on_a_longer_context_only_for_softmax() -> None:
    for layer in LAYERS:
        short, long = (
            throughput.run(case_of(layer, "decode", seq=seq)).columns["model_flops"] for seq in (64, 640)
        )
        assert (long > short) == (layer == "softmax"), layer


@pytest.mark.parametrize(
    ("context", "chunk", "seconds", "tokens"),
    [
        (2**20, 1, 1e-4, 512),  # the most
        (4096, 1, 1e-4, 128),  # little against the context
        (2**20, 1, 0.01, 83),  # within the budget
        (2**20, 1, 10.0, 16),  # the least
        (64, 1, 1e-4, 16),
        (2**20, 512, 1e-4, 512),  # whole chunks, always
        (2**20, 512, 10.0, 512),
        (64, 1024, 1e-4, 1024),
        (2**20, 96, 1e-4, 576),
    ],
)
def test_how_many_tokens_a_call_decodes(context: int, chunk: int, seconds: float, tokens: int) -> None:
    assert throughput.tokens_a_call(context, chunk, seconds, budget_s=10.0) == tokens


class Costly(Fine):
    """Reading a context takes long and much; a token takes a little."""

    def forward(self, x, state=None):
        if x.shape[1] > 1:
            torch.ones(64 * 2**20 // 4)
            time.sleep(0.1)
        return x.clone(), NoState()


def test_reading_the_context_counts_neither_as_time_nor_as_memory(monkeypatch) -> None:
    watch = Watch(monkeypatch, Costly(FineSettings(), backend="eager"))
    measurement = throughput.run(case_of("linear", "decode", seq=256))
    assert sum(first for _, first, _ in watch.calls) > 2  # read afresh as it grew
    assert statistics.median(measurement.samples_ms) < 50
    assert measurement.columns["peak_memory_bytes"] < 32 * 2**20


def test_decode_diverges_by_name(monkeypatch) -> None:
    class Breaks(Fine):
        def forward(self, x, state=None):
            return (x if x.shape[1] > 1 else x / 0), NoState()

    Watch(monkeypatch, Breaks(FineSettings(), backend="eager"))
    with pytest.raises(DivergedError, match="the output has NaN or infinity"):
        throughput.run(case_of("linear", "decode"))


def test_cases_of_two_modes_differ() -> None:
    first, second = (case_of("linear", mode) for mode in ("train", "decode"))
    assert first.series != second.series
    assert dataclasses.replace(first, mode="decode") == second
