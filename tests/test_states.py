"""States of every layer: cut anywhere, saved, moved, detached."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fwpkm_bench.layers.contract import load_state, save_state
from tests.test_layers import EXACT, each, pairs, small

TOKENS = 37


# Interpreted kernels take a millisecond a block: fewer tokens and examples, and in .ci/run alone.
compiled = pytest.mark.parametrize(("name", "backend"), [pair for pair in pairs() if pair[1] != "triton"])
interpreted = pytest.mark.parametrize(("name", "backend"), [pair for pair in pairs() if pair[1] == "triton"])


@compiled
@settings(max_examples=15, deadline=None)
@given(cuts=st.sets(st.integers(1, TOKENS - 1)), seed=st.integers(0, 2**16))
def test_any_cutting_gives_outputs_state_and_gradients_of_the_whole(name, backend, cuts, seed) -> None:
    cut_anywhere(name, backend, cuts, seed, TOKENS)


@pytest.mark.slow
@interpreted
@settings(max_examples=3, deadline=None)
@given(cuts=st.sets(st.integers(1, 10), max_size=3), seed=st.integers(0, 2**16))
def test_any_cutting_of_interpreted_kernels(name, backend, cuts, seed) -> None:
    cut_anywhere(name, backend, cuts, seed, 11)


def cut_anywhere(name: str, backend: str, cuts: set[int], seed: int, tokens: int) -> None:
    """Outputs, state and gradients in pieces are those of the whole."""
    layer = small(name, backend)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 16, dtype=torch.float64, generator=generator).requires_grad_()
    cotangent = torch.randn(2, tokens, 16, dtype=torch.float64, generator=generator)
    found = []
    for where in ((), sorted(cuts)):
        state, pieces = None, []
        for start, stop in itertools.pairwise((0, *where, tokens)):
            y, state = layer(x[:, start:stop], state)
            pieces.append(y)
        y = torch.cat(pieces, 1)
        gradients = torch.autograd.grad((y * cotangent).sum(), [x, *layer.parameters()], allow_unused=True)
        found.append((y, state, gradients))
    (whole, whole_state, whole_gradients), (y, state, gradients) = found
    torch.testing.assert_close(y, whole, **EXACT)
    assert state.nbytes() == whole_state.nbytes()
    for key, tensor in whole_state.tensors().items():
        torch.testing.assert_close(state.tensors()[key], tensor, **EXACT)
    for mine, expected in zip(gradients, whole_gradients, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


@each
@torch.no_grad()
def test_saved_and_loaded_it_goes_on(name: str, backend: str, tmp_path) -> None:
    layer = small(name, backend)
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    whole, whole_state = layer(x)
    _, state = layer(x[:, :13])
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(layer, tmp_path / "state.safetensors")
    assert loaded.nbytes() == state.nbytes()
    y, after = layer(x[:, 13:], loaded)
    torch.testing.assert_close(y, whole[:, 13:], **EXACT)
    assert after.nbytes() == whole_state.nbytes()


@each
def test_a_state_of_something_else_is_refused(name: str, backend: str, tmp_path) -> None:
    save_file({"something": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no state of"):
        load_state(small(name, backend), tmp_path / "other.safetensors")


@each
def test_gradients_stop_at_a_detached_state(name: str, backend: str) -> None:
    layer = small(name, backend)
    first, second = (torch.randn(1, 8, 16, dtype=torch.float64).requires_grad_() for _ in range(2))
    _, state = layer(first)
    y, _ = layer(second, state.detach())
    y.sum().backward()
    assert first.grad is None
    assert second.grad is not None
    assert second.grad.abs().max() > 0
