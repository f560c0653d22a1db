"""Softmax attention: parity of its backends, its cache, pieces, and its memory alone."""

from itertools import pairwise

import pytest
import torch

from fwpkm_bench.layers.softmax import LAYER, Settings, softmax_attention
from fwpkm_bench.layers.softmax.eager import BLOCK

BACKENDS = ("reference", "eager")
SMALL = Settings(width=24, heads=4, kv_heads=2, head_dim=8)


def outcome(backend, inputs):
    """Output and the gradients of every input."""
    output = softmax_attention(*inputs, backend=backend)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("value_dim", [8, 12])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    ("past", "seq"), [(0, 1), (0, 65), (0, 200), (63, 1), (64, 2), (7, BLOCK + 44)], ids=lambda n: str(n)
)
def test_eager_equals_reference(past, seq, kv_heads, value_dim):
    generator = torch.Generator().manual_seed(seq)
    q, k, v = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((seq, 4, 8), (past + seq, kv_heads, 8), (past + seq, kv_heads, value_dim))
    )
    # Float64 rounds at 1e-16; means over a few hundred terms near 1 stay far below 1e-10.
    for eager, reference in zip(outcome("eager", (q, k, v)), outcome("reference", (q, k, v)), strict=True):
        torch.testing.assert_close(eager, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_alone_reads_its_own_value(backend):
    q, k, v = (torch.randn(2, 5, 3, 8) for _ in range(3))
    output = softmax_attention(q, k, v, backend=backend)
    torch.testing.assert_close(output[:, 0], v[:, 0], rtol=0, atol=0)


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
            for buffer in (state.key_buffer, state.value_buffer):
                assert grad or not buffer.requires_grad
                buffer.detach()[:, :, state.length :] = torch.nan  # what lies behind must not be read
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.keys, final.keys, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.values, final.values, rtol=1e-10, atol=1e-10)


def test_gradients_flow_through_the_state():
    torch.manual_seed(3)
    layer = LAYER(SMALL).double()
    x = torch.randn(1, 50, SMALL.width, dtype=torch.float64, requires_grad=True)
    (whole,) = torch.autograd.grad(layer(x)[0].square().sum(), x)
    first, state = layer(x[:, :20])
    second, _ = layer(x[:, 20:], state)
    (pieces,) = torch.autograd.grad(first.square().sum() + second.square().sum(), x)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)


def test_decoding_rarely_copies_the_cache():
    layer = LAYER(SMALL)
    x = torch.randn(1, 1, SMALL.width)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 400, SMALL.width))
        places = []
        for _ in range(400):
            _, state = layer(x, state)
            places.append(state.key_buffer.data_ptr())
    copies = sum(a != b for a, b in pairwise(places))
    assert copies <= 3  # 400 -> 500 -> 625 -> 781 -> 976 tokens of room, the first before the first step
    assert state.nbytes() == 2 * 800 * 2 * 8 * 4  # without the room


def test_a_graph_or_inference_mode_never_shares_a_buffer_with_what_follows():
    layer = LAYER(SMALL)
    x = torch.randn(1, 30, SMALL.width)
    y, state = layer(x)
    with torch.no_grad():
        _, state = layer(x, state)
    y.sum().backward()  # would refuse if the state of its graph had been written to
    with torch.inference_mode():
        _, state = layer(x, state)
    with torch.no_grad():
        _, state = layer(x, state)
    assert state.length == 120


def test_detach_cuts_the_graph():
    _, state = LAYER(SMALL)(torch.randn(2, 3, SMALL.width))
    assert state.keys.requires_grad
    assert not state.detach().keys.requires_grad
    assert state.detach().nbytes() == state.nbytes() == 2 * 2 * 3 * 2 * 8 * 4


def test_cost_counts_the_cache_it_leaves_and_the_causal_half():
    layer = LAYER(SMALL)
    x = torch.randn(2, 9, SMALL.width)
    _, state = layer(x)
    weights = sum(p.numel() for p in layer.parameters())
    assert layer.cost(2, 9).bytes == 4 * weights + 2 * x.nbytes + state.nbytes()
    assert layer.cost(2, 9).flops == 18 * 2 * weights + 2 * 4 * 45 * 4 * 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_weighs_every_pair(backend, monkeypatch):
    monkeypatch.setattr(
        "fwpkm_bench.layers.softmax.core.SCORES", 100
    )  # eager: 3 queries of 30 pairs at a time
    core = LAYER.memory_core(SMALL, key_dim=16, value_dim=5, backend=backend)
    keys, values, queries = torch.randn(30, 16), torch.randn(30, 5), torch.randn(7, 16)
    state = core.init_state()
    assert not core.read(state, queries).any()
    with torch.no_grad():
        state = core.write(core.write(state, keys[:11], values[:11]), keys[11:], values[11:])
    expected = (queries @ keys.T / 4).softmax(-1) @ values
    # Means of 30 values near 1 in another order: a few float32 steps of 6e-8.
    torch.testing.assert_close(core.read(state, queries), expected, rtol=1e-5, atol=1e-6)
    assert core.slot_writes(state) is None
    assert state.nbytes() == 30 * (16 + 5) * 4


def test_bad_inputs_are_refused_by_name():
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    with pytest.raises(ValueError, match=r"k is \[2, 4, 4, 8\].*S at least 5"):
        softmax_attention(q, k[:, 1:], v[:, 1:])
    with pytest.raises(ValueError, match="G a divisor of 4"):
        softmax_attention(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="backend is 'cuda'; softmax_attention has reference, eager"):
        softmax_attention(q, k, v, backend="cuda")
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 4 and 3"):
        Settings(kv_heads=3)
    layer = LAYER(SMALL)
    with pytest.raises(ValueError, match="state is of 3 sequences, x of 2"):
        layer(torch.randn(2, 4, SMALL.width), layer.init_state(3))
