"""Linear attention: golden vectors, parity of its backends, pieces, and its memory alone."""

import pytest
import torch

from fwpkm_bench.layers.linear import LAYER, LinearState, Settings, linear_attention
from fwpkm_bench.layers.linear.eager import SEGMENT

BACKENDS = ("reference", "eager")
SMALL = Settings(width=24, heads=2, head_dim=8)


def draw(batch, seq, heads=2, key_dim=8, value_dim=12, dtype=torch.float64):
    """Positive q and k, v, and both tensors of a state, all asking for gradients."""
    generator = torch.Generator().manual_seed(batch * 1000 + seq)
    q, k, v, memory = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in (
            (batch, seq, heads, key_dim),
            (batch, seq, heads, key_dim),
            (batch, seq, heads, value_dim),
            (batch, heads, key_dim, value_dim),
        )
    )
    normaliser = torch.rand(batch, heads, key_dim, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (q.exp(), k.exp(), v, memory, normaliser)]


def outcome(backend, inputs):
    """Output, final state and the gradients of every input."""
    q, k, v, memory, normaliser = inputs
    output, state = linear_attention(q, k, v, state=LinearState(memory, normaliser), backend=backend)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = (output * weights).sum() + 0.3 * state.memory.sum() + 0.2 * state.normaliser.sum()
    return [output, state.memory, state.normaliser, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    data = golden("linear_attention")
    inputs = [data[key].requires_grad_() for key in ("q", "k", "v")]
    output, state = linear_attention(*inputs, backend=backend)
    gradients = torch.autograd.grad((output * data["cotangent"]).sum(), inputs)
    # The file is float32 and good to 3e-6; 1e-5 leaves room for another order of summation.
    torch.testing.assert_close(output, data["output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.memory, data["state1"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.normaliser, data["k"].sum(1), rtol=1e-5, atol=1e-5)
    for key, gradient in zip(("q", "k", "v"), gradients, strict=True):
        torch.testing.assert_close(gradient, data[f"grad_{key}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 200, SEGMENT + 70])
def test_eager_equals_reference(seq):
    inputs = draw(2 if seq < 500 else 1, seq)
    # Float64 rounds at 1e-16; sums of a few thousand terms, relative to their size, stay far below 1e-10.
    for eager, reference in zip(outcome("eager", inputs), outcome("reference", inputs), strict=True):
        torch.testing.assert_close(eager, reference, rtol=1e-10, atol=1e-10 * reference.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_pieces_equal_the_whole(backend, grad):
    torch.manual_seed(1)
    layer = LAYER(SMALL, backend).double()
    x = torch.randn(2, 200, SMALL.width, dtype=torch.float64)
    whole, final = layer(x)
    pieces, state = [], layer.init_state(2)
    with torch.set_grad_enabled(grad):
        for piece in x.split([1, 63, 65, 1, 7, 63], dim=1):
            y, state = layer(piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, final.memory, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.normaliser, final.normaliser, rtol=1e-10, atol=1e-10)


def test_a_long_prefill_without_gradients_equals_one_with():
    torch.manual_seed(2)
    layer = LAYER(SMALL).double()
    x = torch.randn(3, SEGMENT, SMALL.width, dtype=torch.float64)  # four segments of each sequence
    whole, final = layer(x)
    with torch.no_grad():
        y, state = layer(x)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, final.memory, rtol=1e-10, atol=1e-10)


def test_half_precision_keeps_a_float32_state():
    layer = LAYER(SMALL).bfloat16()
    y, state = layer(torch.randn(1, 70, SMALL.width, dtype=torch.bfloat16))
    assert (y.dtype, state.memory.dtype, state.normaliser.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_memory_alone(backend):
    outcomes = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            output, state = linear_attention(*(tensor.float() for tensor in draw(2, 70)[:3]), backend=backend)
        outcomes.append([output, state.memory, state.normaliser])
    for plain, autocast in zip(*outcomes, strict=True):
        assert torch.equal(plain, autocast)


def test_detach_cuts_the_graph_and_keeps_the_bytes():
    _, state = LAYER(SMALL)(torch.randn(2, 3, SMALL.width))
    assert state.memory.requires_grad
    detached = state.detach()
    assert not detached.memory.requires_grad
    assert not detached.normaliser.requires_grad
    assert detached.nbytes() == state.nbytes() == 2 * 2 * 8 * (8 + 1) * 4


def test_cost_counts_the_state_it_leaves():
    layer = LAYER(SMALL)
    x = torch.randn(2, 9, SMALL.width)
    _, state = layer(x)
    weights = sum(p.numel() for p in layer.parameters())
    assert layer.cost(2, 9).bytes == 4 * weights + 2 * x.nbytes + state.nbytes()
    assert layer.cost(2, 9).flops == 18 * (2 * weights + 2 * (4 * 8 * 8 + 3 * 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_reads_the_weighted_mean_of_all_values(backend):
    core = LAYER.memory_core(SMALL, key_dim=16, value_dim=5, backend=backend)
    keys, values, queries = torch.randn(30, 16), torch.randn(30, 5), torch.randn(7, 16)
    state = core.init_state()
    assert not core.read(state, queries).any()
    state = core.write(core.write(state, keys[:11], values[:11]), keys[11:], values[11:])

    def phi(x):
        return torch.where(x > 0, x + 1, x.exp())

    weights = phi(queries) @ phi(keys).T
    # 30 terms of the same sign in another order: a few float32 steps of 6e-8.
    expected = (weights / weights.sum(-1, keepdim=True)) @ values
    torch.testing.assert_close(core.read(state, queries), expected, rtol=1e-5, atol=1e-6)
    assert core.slot_writes(state) is None


def test_bad_inputs_are_refused_by_name():
    q, k, v, memory, normaliser = draw(2, 5)
    with pytest.raises(ValueError, match=r"k is \[2, 4, 2, 8\].*must be \[2, 5, 2, 8\]"):
        linear_attention(q, k[:, 1:], v)
    with pytest.raises(ValueError, match=r"state.normaliser is \[1, 2, 8\].*must be \[2, 2, 8\]"):
        linear_attention(q, k, v, state=LinearState(memory, normaliser[:1]))
    with pytest.raises(ValueError, match="backend is 'cuda'; linear_attention has reference, eager"):
        linear_attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match=r"head_dim must be a whole number of at least 1, got 2\.5"):
        Settings(head_dim=2.5)
    layer = LAYER(SMALL)
    with pytest.raises(ValueError, match="state is of 3 sequences, x of 2"):
        layer(torch.randn(2, 4, SMALL.width), layer.init_state(3))
