"""Every layer and backend of the catalog keeps the contract of ``layers/contract.py``."""

import dataclasses
import itertools

import pytest
import torch

from fwpkm_bench import catalog

SMALL = {"width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "key_dim": 8, "value_dim": 12} | {
    "n_subkeys": 8,
    "topk": 3,
    "chunk_size": 5,
}
GPU_ALONE = [("gdn", "fla"), ("linear", "fla"), ("softmax", "cudnn"), ("softmax", "efficient")]
# Both backends in float64 compute the same sums in another order.
EXACT = {"rtol": 0, "atol": 1e-10}


def small(name: str, backend: str):
    layer = catalog.load_layer(name)
    fields = {f.name for f in dataclasses.fields(layer.Settings)}
    torch.manual_seed(0)
    settings = layer.Settings(**{n: v for n, v in SMALL.items() if n in fields})
    return layer(settings, backend=backend).double()


def pairs() -> list[tuple[str, str]]:
    every = [(name, b) for name in catalog.layer_names() for b in catalog.load_layer(name).backends]
    return [pair for pair in every if pair not in GPU_ALONE]


def lengths(backend: str, *tokens: int) -> list[int]:
    """Interpreted kernels take a millisecond a block: they get a quarter of the tokens."""
    return [max(1, n // 4) if backend == "triton" else n for n in tokens]


each = pytest.mark.parametrize(("name", "backend"), pairs(), ids=lambda v: v)


@each
@torch.no_grad()
def test_parity_with_the_reference(name: str, backend: str) -> None:
    oracle, layer = small(name, "reference"), small(name, backend)
    layer.load_state_dict(oracle.state_dict())
    for batch, tokens in zip((1, 3, 2), lengths(backend, 1, 77, 130), strict=True):
        x = torch.randn(batch, tokens, 16, dtype=torch.float64)
        torch.testing.assert_close(layer(x)[0], oracle(x)[0], **EXACT)


@each
@torch.no_grad()
def test_pieces_are_the_whole(name: str, backend: str) -> None:
    layer = small(name, backend)
    (end,) = lengths(backend, 70)
    x = torch.randn(2, end, 16, dtype=torch.float64)
    whole, whole_state = layer(x)
    for cuts in ((1, 2, end // 2 - 2, end - 6), range(1, end), (5, 10)):
        state, pieces = layer.init_state(2), []
        for start, stop in itertools.pairwise((0, *cuts, end)):
            y, state = layer(x[:, start:stop], state)
            pieces.append(y)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
        assert state.nbytes() == whole_state.nbytes()


@each
@torch.no_grad()
def test_two_branches_of_a_state_do_not_meet(name: str, backend: str) -> None:
    """Either the second use of a state is right, or it is refused."""
    layer = small(name, backend)
    x, a, b, c = (torch.randn(1, n, 16, dtype=torch.float64) for n in (9, 2, 3, 4))
    expected = layer(torch.cat((x, a, c), 1))[0][:, -4:]
    _, state = layer(x)
    _, state = layer(a[:, :1], state)
    _, first = layer(a[:, 1:], state)
    try:
        layer(b, state)
    except ValueError as error:
        assert "used up" in str(error)  # noqa: PT017
    torch.testing.assert_close(layer(c, first)[0], expected, **EXACT)


@each
@torch.no_grad()
def test_causal(name: str, backend: str) -> None:
    layer = small(name, backend)
    end, now = lengths(backend, 60, 41)
    x = torch.randn(1, end, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, now:] = torch.randn(1, end - now, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(changed)[0][:, :now], layer(x)[0][:, :now], **EXACT)
    assert (layer(changed)[0][:, now:] - layer(x)[0][:, now:]).abs().max() > 1e-3


@each
@torch.no_grad()
def test_sequences_of_a_batch_do_not_meet(name: str, backend: str) -> None:
    layer = small(name, backend)
    x = torch.randn(3, *lengths(backend, 40), 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x[1:2])[0], layer(x)[0][1:2], **EXACT)


@each
def test_bad_shapes_are_refused(name: str, backend: str) -> None:
    layer = small(name, backend)
    for x in (torch.zeros(3, 16), torch.zeros(1, 4, 15), torch.zeros(1, 0, 16), torch.zeros(1, 4, 16).long()):
        with pytest.raises(ValueError, match=r"x is .*; it must be \[B, T, 16\]"):
            layer(x)
    with pytest.raises(ValueError, match="backend is 'cuda9'"):
        type(layer)(layer.settings, backend="cuda9")
    with torch.no_grad(), pytest.raises(ValueError, match=r"\b[23]\b"):
        layer(torch.zeros(2, 4, 16, dtype=torch.float64), layer.init_state(3))


@pytest.mark.parametrize(("name", "backend"), GPU_ALONE, ids=lambda v: v)
def test_what_needs_a_gpu_says_so(name: str, backend: str) -> None:
    layer = small(name, backend)
    for seq in (1, 9):
        with pytest.raises(
            NotImplementedError, match=f"backend '{backend}' runs on a CUDA device, not on cpu"
        ):
            layer(torch.zeros(1, seq, 16, dtype=torch.float64))


@each
def test_cost_grows_with_the_tokens(name: str, backend: str) -> None:
    layer = small(name, backend)
    one, two, four = (layer.cost(batch, 64) for batch in (1, 2, 4))
    assert one.flops > 0
    assert four.flops - two.flops == 2 * (two.flops - one.flops) > 0
    assert four.bytes > two.bytes > one.bytes > 0


@pytest.mark.parametrize("name", catalog.layer_names())
def test_sizes_have_the_same_width(name: str) -> None:
    sizes = catalog.load_layer(name).sizes
    assert set(sizes) == {"laptop", "paper"}
    assert (sizes["laptop"].width, sizes["paper"].width) == (256, 512)
