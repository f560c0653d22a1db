"""Static product key memory: golden vectors, parity of its backends, and its table alone."""

import pytest
import torch

from fwpkm_bench.layers.pkm import LAYER, SEGMENT, Settings, pkm
from fwpkm_bench.layers.pkm.eager import BLOCK

BACKENDS = ("reference", "eager")
SMALL = Settings(width=24, heads=2, n_subkeys=19, topk=5, key_dim=12, value_dim=20)


def draw(tokens, heads=3, n=21, half=6, value_dim=10):
    """Query, keys and values in float64, all asking for gradients."""
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((tokens, heads, 2 * half), (heads, 2, n, half), (n * n, value_dim))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, backend):
    data = golden("pkm")
    inputs = [data[key].requires_grad_() for key in ("q", "keys", "values")]
    output, indices, weights = pkm(*inputs, topk=data["config"]["topk"], backend=backend)
    gradients = torch.autograd.grad((output * data["cotangent"]).sum(), inputs)
    assert torch.equal(indices, data["indices"])
    # The file is float32 and good to 3e-6; 1e-5 leaves room for another order of summation.
    torch.testing.assert_close(weights, data["weights"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output, data["output"], rtol=1e-5, atol=1e-5)
    for key, gradient in zip(("q", "keys", "values"), gradients, strict=True):
        torch.testing.assert_close(gradient, data[f"grad_{key}"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("topk", [1, 7, 21])
@pytest.mark.parametrize("tokens", [1, 63, BLOCK + 5])
def test_eager_equals_reference(tokens, topk):
    query, keys, values = inputs = draw(tokens)
    outcomes = []
    for backend in BACKENDS:
        output, indices, weights = pkm(query, keys, values, topk=topk, backend=backend)
        shaped = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        loss = (output * shaped).sum() + weights.square().sum()
        outcomes.append([output, indices, weights, *torch.autograd.grad(loss, inputs)])
    # Float64 rounds at 1e-16; sums of a few hundred terms near 1 stay far below 1e-10.
    for reference, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(eager, reference, rtol=1e-10, atol=1e-10)


def test_the_best_of_all_slots_are_found():
    query, keys, values = draw(40)
    _, indices, _ = pkm(query, keys, values, topk=6)
    first, second = torch.einsum("nHch,Hcsh->cnHs", query.unflatten(-1, (2, -1)), keys)
    every = (first[..., :, None] + second[..., None, :]).flatten(-2)  # [N, H, n * n]
    assert torch.equal(indices, every.topk(6).indices)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_pieces_equal_the_whole(backend, grad):
    torch.manual_seed(1)
    layer = LAYER(SMALL, backend).double()
    x = torch.randn(2, 200, SMALL.width, dtype=torch.float64)
    whole, _ = layer(x)
    pieces, state = [], layer.init_state(2)
    with torch.set_grad_enabled(grad):
        for piece in x.split([1, 63, 65, 1, 7, 63], dim=1):
            y, state = layer(piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-10, atol=1e-10)
    assert state.nbytes() == state.detach().nbytes() == 0


def test_a_long_prefill_without_gradients_equals_one_with():
    torch.manual_seed(2)
    layer = LAYER(SMALL).double()
    x = torch.randn(3, SEGMENT["cpu"] // 2, SMALL.width, dtype=torch.float64)  # a segment and a half
    whole, _ = layer(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], whole, rtol=1e-10, atol=1e-10)


def test_cost_counts_no_more_values_than_there_are():
    layer = LAYER(SMALL)
    table = 4 * layer.values.numel()
    others = sum(4 * p.numel() for p in layer.parameters()) - table
    assert layer.cost(1, 3).bytes == others + 4 * (2 * 3 * 24 + 3 * 2 * 5 * 20)
    assert layer.cost(1, 500).bytes == others + 4 * 2 * 500 * 24 + table
    projections = 2 * (24 * 24 + 24 * 20 + 20 * 24)
    memory = 2 * (2 * 19 * 12 + 25 + 2 * 5 * 20)
    assert layer.cost(2, 7).flops == 14 * (projections + memory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_is_a_fixed_table_for_its_seed(backend):
    def core():
        generator = torch.Generator().manual_seed(7)
        return LAYER.memory_core(SMALL, key_dim=16, value_dim=5, backend=backend, generator=generator)

    memory, queries = core(), torch.randn(9, 16)
    before = memory.read(memory.init_state(), queries)
    state = memory.write(memory.init_state(), queries, torch.randn(9, 5))
    assert torch.equal(memory.read(state, queries), before)
    assert torch.equal(core().read(state, queries), before)
    expected, _, _ = pkm(
        queries[:, None].repeat(1, 2, 1), memory.keys, memory.values, topk=5, backend=backend
    )
    assert torch.equal(before, expected)
    assert torch.equal(memory.slot_writes(state), torch.zeros(19 * 19, dtype=torch.int64))


def test_bad_inputs_are_refused_by_name():
    query, keys, values = draw(4)
    with pytest.raises(ValueError, match=r"query is \[4, 2, 12\].*must be \[N, 3, 12\]"):
        pkm(query[:, 1:], keys, values, topk=2)
    with pytest.raises(ValueError, match=r"for 21 sub-keys it must be \[441, value_dim\]"):
        pkm(query, keys, values[1:], topk=2)
    with pytest.raises(ValueError, match=r"topk must be at least 1 and at most .* got 22 and 21"):
        pkm(query, keys, values, topk=22)
    with pytest.raises(ValueError, match="topk must be at most n_subkeys, got 33 and 32"):
        Settings(n_subkeys=32, topk=33)
    with pytest.raises(ValueError, match="key_dim must be even, two halves, got 15; 16 would do"):
        Settings(key_dim=15)
    with pytest.raises(ValueError, match="key_dim must be even, two halves, got 15; 16 would do"):
        LAYER.memory_core(SMALL, key_dim=15, value_dim=5)
    layer = LAYER(SMALL)
    with pytest.raises(ValueError, match="state is of 3 sequences, x of 2"):
        layer(torch.randn(2, 4, SMALL.width), layer.init_state(3))


def test_sparse_gradients_are_the_dense_ones():
    torch.manual_seed(0)
    query, keys = torch.randn(20, 2, 8), torch.randn(2, 2, 12, 4)
    tables = [torch.randn(144, 5, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"]
    for table, sparse in zip(tables, (False, True), strict=True):
        pkm(query, keys, table, topk=3, sparse_grad=sparse)[0].square().sum().backward()
    assert tables[1].grad.is_sparse
    assert not tables[0].grad.is_sparse
    torch.testing.assert_close(tables[1].grad.to_dense(), tables[0].grad)
    assert tables[1].grad.coalesce().values().shape[0] < 144
    before = tables[1].detach().clone()
    torch.optim.SparseAdam([tables[1]], lr=0.1).step()
    touched = tables[0].grad.abs().sum(1) > 0
    assert ((tables[1].detach() - before).abs().sum(1) > 0).equal(touched)
    with pytest.raises(ValueError, match="sparse_grad is of backend 'eager'"):
        pkm(query, keys, tables[0], topk=3, backend="reference", sparse_grad=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["autocast", "inputs"])
def test_half_precision_reads_the_slots_of_float32(backend, how):
    """Sub-keys whose scores tie in eight bits are told apart."""
    query, keys, values = (tensor.detach().bfloat16() for tensor in draw(50, n=64))
    exact = (query.float(), keys.float(), values.float())
    output, indices, weights = pkm(*exact, topk=8, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        given = (query, *exact[1:]) if how == "autocast" else (query, keys, values)
        rounded, found, shares = pkm(*given, topk=8, backend=backend)
    assert torch.equal(found, indices)
    assert (rounded.dtype, shares.dtype) == (given[2].dtype, torch.bfloat16)
    # Eight bits of each of eight weights and values, and of their sum.
    assert float((rounded.float() - output).norm() / output.norm()) < 2**-7
    torch.testing.assert_close(shares.float(), weights, rtol=2**-8, atol=0)
