"""FwPKM's closed-form gradients: the authors' vectors, gradcheck, and the reference under plain autograd.

In float64 both compute the same sums in another order: 1e-10 of the largest gradient leaves four digits.
"""

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from fwpkm_bench.kernels.product_key import product_topk
from fwpkm_bench.layers.fwpkm import FwPKM, Settings, fwpkm
from fwpkm_bench.layers.fwpkm.health import health
from tests.test_fwpkm import AXES, GOLDEN, grid_id, random_inputs, run_golden

INPUTS = ("query", "target", "gate", "keys", "values")
PER_TOKEN = ("query", "target", "gate")


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_gradients(golden, name: str) -> None:
    vectors = golden(name)
    inputs = [n for n in ("q", "v", "gate", "keys0", "values0") if n in vectors]
    for n in inputs:
        vectors[n].requires_grad_()
    out = run_golden(vectors, "eager")
    (out.retrieved * vectors["cotangent"]).sum().backward()
    keys, values = out.state.materialize()
    torch.testing.assert_close(keys[0], vectors["keys1"], rtol=0, atol=1e-5)
    torch.testing.assert_close(values[0], vectors["values1"], rtol=0, atol=1e-5)
    for n in inputs:
        torch.testing.assert_close(
            vectors[n].grad, vectors[f"grad_{n}"], rtol=0, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}"
        )


def draw(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def everything(inputs: dict[str, Tensor], cuts: tuple[int, ...], mask: Tensor | None, **kw) -> Tensor:
    """A scalar that depends on all that a memory gives out, read in pieces."""
    tables = {n: inputs[n] for n in ("keys", "values")}
    state, total = None, torch.zeros((), dtype=torch.float64)
    tokens = inputs["query"].shape[1]
    for start, stop in itertools.pairwise((0, *cuts, tokens)):
        piece = {n: inputs[n][:, start:stop] for n in PER_TOKEN}
        own_mask = None if mask is None else mask[:, start:stop]
        out = fwpkm(**piece, **tables, **kw, mask=own_mask, state=state)
        state = out.state
        total = total + (out.retrieved * draw(out.retrieved.shape, stop)).sum()
        total = total + (out.weights * draw(out.weights.shape, stop + 1)).sum()
        total = total + (out.losses * draw(out.losses.shape, stop + 2)).sum() + 0.7 * out.addressing_loss
    assert state is not None
    state = state.flush() if kw["boundary"] == "carry" else state
    for seed, table in enumerate(state.materialize()):
        total = total + (table * draw(table.shape, seed)).sum()
    return total


def gradients(inputs: dict[str, Tensor], cuts: tuple[int, ...], mask: Tensor | None, **kw) -> list[Tensor]:
    leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
    found = torch.autograd.grad(
        everything(leaves, cuts, mask, **kw), list(leaves.values()), allow_unused=True
    )
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves.values(), strict=True)]


ALL = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]
SOME = random.Random(0).sample(ALL, 60)


@pytest.mark.parametrize("kw", SOME, ids=grid_id)
def test_gradients_are_the_reference(kw: dict) -> None:
    """With a mask and two heads; in pieces, across which gradients flow; and a single token."""
    whole = kw["boundary"] == "drop"  # pieces would be chunks there
    for batch, tokens, heads, cuts in (
        (3, 23, 2, ()),
        (5, 15, 3, () if whole else (4, 5, 11)),
        (1, 1, 4, ()),
    ):
        inputs = random_inputs(batch, tokens, heads, n=6)
        mask = torch.arange(tokens) >= torch.tensor([[4], [0], [9]]) if heads == 2 else None
        expected = gradients(inputs, cuts, mask, **kw, backend="reference")
        mine = gradients(inputs, cuts, mask, **kw, backend="eager")
        for name, a, b in zip(INPUTS, mine, expected, strict=True):
            slack = 1e-10 * (1 + float(b.abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=slack, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("score", ["idw", "dot"])
@pytest.mark.parametrize("rule", ["authors", "projected"])
def test_gradcheck(rule: str, score: str) -> None:
    inputs = random_inputs(1, 7, 1, n=3)
    kw = {"topk": 2, "chunk_size": 3, "write_rule": rule, "score": score, "boundary": "carry"}

    def total(*tensors: Tensor) -> Tensor:
        return everything(dict(zip(INPUTS, tensors, strict=True)), (4,), None, **kw)

    leaves = [inputs[n].requires_grad_() for n in INPUTS]
    assert torch.autograd.gradcheck(total, leaves, eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", INPUTS)
def test_only_what_is_asked_for_is_computed(name: str) -> None:
    inputs = random_inputs(2, 20, 1, n=6)
    kw = {"topk": 2, "chunk_size": 5, "boundary": "carry"}
    expected = dict(zip(INPUTS, gradients(inputs, (), None, **kw), strict=True))[name]
    inputs[name].requires_grad_()
    everything(inputs, (), None, **kw).backward()
    torch.testing.assert_close(inputs[name].grad, expected, rtol=0, atol=1e-10)
    assert all(inputs[other].grad is None for other in INPUTS if other != name)


def test_no_gradients_beyond_a_detached_state() -> None:
    inputs = random_inputs(1, 12, 1, n=6)
    tables = {n: inputs[n] for n in ("keys", "values")}
    halves = [
        {n: inputs[n][:, part].requires_grad_() for n in PER_TOKEN} for part in (slice(6), slice(6, 12))
    ]
    kw = {"topk": 2, "chunk_size": 3}
    state = fwpkm(**halves[0], **tables, **kw).state
    fwpkm(**halves[1], **tables, **kw, state=state.clone()).retrieved.sum().backward()
    assert all(half[n].grad is not None for half in halves for n in PER_TOKEN[:1])
    for half in halves:
        half["query"].grad = None
    fwpkm(**halves[1], **tables, **kw, state=state.detach()).retrieved.sum().backward()
    assert halves[0]["query"].grad is None
    assert halves[1]["query"].grad is not None


def test_recording_changes_no_value() -> None:
    """What a call gives out with and without gradients is the same to the last bit."""
    inputs = random_inputs(2, 25, 2, n=6)
    kw = {"topk": 3, "chunk_size": 7}
    with torch.no_grad():
        plain = fwpkm(**inputs, **kw)
    inputs["query"].requires_grad_()
    recorded = fwpkm(**inputs, **kw)
    for name in ("retrieved", "weights", "losses", "indices", "addressing_loss"):
        assert torch.equal(getattr(plain, name), getattr(recorded, name)), name
    for a, b in zip(plain.state.materialize(), recorded.state.materialize(), strict=True):
        assert torch.equal(a, b)
    assert plain.state.nbytes() == recorded.state.nbytes()


def test_a_recorded_state_can_go_on_without_recording() -> None:
    """Reading on under no_grad must not touch what an earlier call's backward still needs."""
    inputs = random_inputs(1, 24, 1, n=6)
    tables = {n: inputs[n] for n in ("keys", "values")}
    kw = {"topk": 2, "chunk_size": 5}
    leaves = {n: inputs[n][:, :13].clone().requires_grad_() for n in PER_TOKEN}
    out = fwpkm(**leaves, **tables, **kw)
    rest = {n: inputs[n][:, 13:] for n in PER_TOKEN}
    with torch.no_grad():
        went_on = fwpkm(**rest, **tables, **kw, state=out.state.detach()).retrieved
        whole = fwpkm(**inputs, **kw).retrieved
    torch.testing.assert_close(went_on, whole[:, 13:], rtol=0, atol=1e-11)
    (mine,) = torch.autograd.grad(out.retrieved.sum(), leaves["query"])
    again = fwpkm(**leaves, **tables, **kw)
    (expected,) = torch.autograd.grad(again.retrieved.sum(), leaves["query"])
    assert torch.equal(mine, expected)


def small_model() -> FwPKM:
    torch.manual_seed(0)
    return FwPKM(Settings(width=16, key_dim=8, value_dim=12, n_subkeys=8, topk=3, chunk_size=16))


def test_module_gradients_are_the_reference() -> None:
    mine, oracle = small_model().double(), small_model().double()
    oracle.backend = "reference"
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    for layer in (mine, oracle):
        y, _ = layer(x)
        y.square().sum().backward()
    for (name, a), (_, b) in zip(mine.named_parameters(), oracle.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("how", ["autocast", "module"])
def test_fast_weights_stay_float32_under_bfloat16(how: str) -> None:
    layer, x = small_model(), torch.randn(2, 50, 16)
    exact, _ = layer(x)
    if how == "module":
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        y, state = layer(x)
    keys, values = state.materialize()
    assert (keys.dtype, values.dtype) == (torch.float32, torch.float32)
    assert y.dtype == torch.bfloat16
    # Not element by element: a rounded query may choose other slots. bf16 keeps 8 bits.
    assert float((y.detach().float() - exact.detach()).norm() / exact.detach().norm()) < 0.2
    y.float().square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_a_compiled_model_is_the_model() -> None:
    layer, x = small_model(), torch.randn(2, 50, 16)
    compiled = torch.compile(layer, backend="aot_eager")
    expected, _ = layer(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    y, _ = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], expected)


def test_health_is_of_this_call() -> None:
    layer = small_model()
    y, out = layer.forward_detailed(torch.randn(2, 50, 16))
    found = health(out, slots=64, gate=torch.full((2, 50), 0.25))
    assert found["coverage"] == pytest.approx(len(out.indices.unique()) / 64)
    assert found["collision_ratio"] == pytest.approx(1 - len(out.indices.unique()) / (2 * 50 * 3))
    assert found["memory_loss"] == pytest.approx(float(out.losses.detach().mean()))
    assert found["addressing_loss"] < 0  # the negative of an entropy
    assert found["mean_gate"] == pytest.approx(0.25)
    assert 0 < found["slot_kl"] < math.log(64)
    assert y.shape == (2, 50, 16)


def test_slot_numbers_do_not_overflow() -> None:
    """At 65,536 sub-keys a half the last slot is 2^32 - 1, beyond int32."""
    n = 65_536
    scores = torch.tensor([[[3.0, 2.0], [5.0, 1.0]]])
    subkeys = torch.tensor([[[n - 1, 7], [n - 1, 0]]])
    best, slots, _ = product_topk(scores, subkeys, n)
    assert slots.tolist() == [[n * n - 1, 7 * n + n - 1]]
    assert best.tolist() == [[8.0, 7.0]]


@pytest.mark.slow
def test_the_copy_task_is_learned() -> None:
    from examples.copy_task import train

    assert train(60) > 0.9
