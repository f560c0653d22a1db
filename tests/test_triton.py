"""The Triton kernels, interpreted on the CPU: against the references, the golden files, and poisoned memory.

In float64 the kernels compute the same sums in another order: 1e-10 of the largest value leaves four digits.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")

from triton.runtime.interpreter import InterpretedFunction

from fwpkm_bench.kernels import triton_support
from fwpkm_bench.kernels.product_key_triton import nearest_subkeys
from fwpkm_bench.kernels.rows_triton import group_reads, grouped_sum, row_dots, weighted_rows
from fwpkm_bench.layers.fwpkm import FwPKM, Settings, fwpkm
from fwpkm_bench.layers.pkm import pkm
from fwpkm_bench.measure.compiled import note_calls
from tests.test_fwpkm import GOLDEN, random_inputs, run_golden
from tests.test_fwpkm_training import INPUTS, gradients
from tests.test_pkm import draw

ROOT = Path(__file__).resolve().parents[1]
OUTPUTS = ("retrieved", "indices", "weights", "losses", "addressing_loss")


def assert_near(mine: Tensor, expected: Tensor, slack: float = 1e-10) -> None:
    room = slack * (1 + float(expected.detach().abs().max())) if expected.numel() else 0.0
    torch.testing.assert_close(mine, expected, rtol=0, atol=room)


@pytest.fixture
def poison(monkeypatch) -> None:
    """Memory that nobody wrote holds NaN, or an index far outside."""

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(2**30)

    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k)))


PKM_SIZES = [  # tokens, heads, n, half, value_dim, topk
    (1, 1, 16, 8, 20, 1),
    (77, 3, 21, 6, 20, 5),
    (513, 1, 16, 4, 64, 8),
    (19, 4, 64, 16, 512, 8),
    (9, 2, 520, 5, 17, 32),
    (5, 1, 512, 8, 16, 8),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("size", PKM_SIZES, ids="T{0[0]}-H{0[1]}-n{0[2]}-h{0[3]}-d{0[4]}-k{0[5]}".format)
def test_pkm_is_the_reference(size) -> None:
    tokens, heads, n, half, value_dim, topk = size
    inputs = draw(tokens, heads, n, half, value_dim)
    outcomes = []
    for backend in ("triton", "reference"):
        output, indices, weights = pkm(*inputs, topk=topk, backend=backend)
        shaped = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        loss = (output * shaped).sum() + weights.square().sum()
        outcomes.append([output, indices, weights, *torch.autograd.grad(loss, inputs)])
    for mine, expected in zip(*outcomes, strict=True):
        assert_near(mine, expected)


def test_pkm_golden(golden) -> None:
    data = golden("pkm")
    inputs = [data[key].requires_grad_() for key in ("q", "keys", "values")]
    output, indices, weights = pkm(*inputs, topk=data["config"]["topk"], backend="triton")
    assert torch.equal(indices, data["indices"])
    found = torch.autograd.grad((output * data["cotangent"]).sum(), inputs)
    expected = (data["weights"], data["output"], *(data[f"grad_{key}"] for key in ("q", "keys", "values")))
    for mine, theirs in zip((weights, output, *found), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


LONG = ("large_keys", "batch_shared", "many_chunks", "left_padding", "two_heads")


def slow(*values):
    """A case for .ci/run alone."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [slow(name) if name in LONG else name for name in GOLDEN])
def test_fwpkm_golden(golden, name: str) -> None:
    vectors = golden(name)
    inputs = [n for n in ("q", "v", "gate", "keys0", "values0") if n in vectors]
    for n in inputs:
        vectors[n].requires_grad_()
    out = run_golden(vectors, "triton")
    (out.retrieved * vectors["cotangent"]).sum().backward()
    keys, values = out.state.materialize()
    assert torch.equal(out.indices, vectors["indices"])
    pairs = [(out.retrieved, "retrieved"), (out.weights, "weights"), (out.losses, "losses")]
    pairs += [(out.addressing_loss, "addr_loss"), (keys[0], "keys1"), (values[0], "values1")]
    pairs += [(vectors[n].grad, f"grad_{n}") for n in inputs]
    for mine, theirs in pairs:
        torch.testing.assert_close(
            mine, vectors[theirs], rtol=0, atol=1e-5, msg=lambda m, t=theirs: f"{t}: {m}"
        )


def settings(*values) -> dict:
    names = ("topk", "chunk_size", "lookahead", "write_rule", "boundary", "scope", "score")
    return dict(zip(names, values, strict=True))


POINTS = [  # each value of each setting meets most others
    settings(3, 7, 1, "authors", "carry", "per_sequence", "idw"),
    settings(3, 7, 0, "paper", "drop", "shared", "idw"),
    settings(6, 100, 3, "projected", "drop", "per_sequence", "dot"),
    slow(settings(1, 7, 3, "projected", "carry", "shared", "idw")),
    slow(settings(6, 7, 1, "paper", "carry", "shared", "dot")),
]


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("kw", POINTS, ids=lambda kw: "-".join(str(v) for v in kw.values()))
def test_fwpkm_is_the_reference(kw: dict) -> None:
    """Outputs, state and gradients, with masks, several heads, in pieces, and of a single token."""
    whole = kw["boundary"] == "drop"  # pieces would be chunks there
    kw = kw | {"learning_rate": 0.3, "addressing_weight": 0.7}  # no float32 holds these
    for batch, tokens, heads, cuts in ((2, 17, 2, () if whole else (4, 11)), (1, 1, 3, ())):
        inputs = random_inputs(batch, tokens, heads, n=6)
        mask = torch.arange(tokens) >= torch.tensor([[4], [0]]) if batch == 2 else None
        with torch.no_grad():
            mine, expected = (fwpkm(**inputs, **kw, mask=mask, backend=b) for b in ("triton", "reference"))
        for name in OUTPUTS:
            assert_near(getattr(mine, name), getattr(expected, name))
        for a, b in zip(mine.state.materialize(), expected.state.materialize(), strict=True):
            assert_near(a, b)
        found, wanted = (gradients(inputs, cuts, mask, **kw, backend=b) for b in ("triton", "reference"))
        for name, a, b in zip(INPUTS, found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10 * (1 + float(b.abs().max())), msg=name)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("tokens", "n", "half", "value_dim", "topk", "chunk"),
    [(77, 64, 16, 20, 8, 32), slow(513, 16, 4, 64, 1, 128), slow(40, 40, 8, 512, 32, 16)],
)
def test_fwpkm_of_odd_sizes(tokens: int, n: int, half: int, value_dim: int, topk: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "query": normal(1, tokens, 2 * half),
        "target": normal(1, tokens, value_dim),
        "gate": normal(1, tokens).sigmoid(),
        "keys": normal(1, 2, n, half),
        "values": normal(n * n, value_dim),
    }
    results = []
    for backend in ("triton", "eager"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        out = fwpkm(**leaves, topk=topk, chunk_size=chunk, backend=backend)
        keys, values = out.state.materialize()
        loss = (out.retrieved * torch.linspace(-1, 1, value_dim)).sum() + values.square().sum() + keys.sum()
        found = torch.autograd.grad(loss + out.losses.sum(), list(leaves.values()))
        results.append([*(getattr(out, name) for name in OUTPUTS), keys, values, *found])
    for mine, expected in zip(*results, strict=True):
        assert_near(mine, expected)


@torch.no_grad()
def test_backends_take_turns_on_one_state() -> None:
    inputs = random_inputs(2, 40, 2, n=6)
    kw = {"topk": 3, "chunk_size": 7}
    whole = fwpkm(**inputs, **kw, backend="reference")
    tables = {n: inputs.pop(n) for n in ("keys", "values")}
    state, pieces = None, []
    for index, (start, stop) in enumerate(((0, 1), (1, 9), (9, 24), (24, 25), (25, 40))):
        piece = {n: t[:, start:stop] for n, t in inputs.items()}
        out = fwpkm(**piece, **tables, **kw, state=state, backend=("triton", "eager")[index % 2])
        state = out.state
        pieces.append(out.retrieved)
    assert_near(torch.cat(pieces, 1), whole.retrieved)
    for a, b in zip(state.flush().materialize(), whole.state.flush().materialize(), strict=True):
        assert_near(a, b)


@torch.no_grad()
def test_a_decoded_token_copies_none_before_it() -> None:
    inputs = random_inputs(2, 9, 2, n=6)
    tables = {n: inputs.pop(n) for n in ("keys", "values")}
    state, places = None, []
    for token in range(9):
        piece = {n: t[:, token : token + 1] for n, t in inputs.items()}
        state = fwpkm(**piece, **tables, topk=3, chunk_size=7, state=state, backend="triton").state
        places.append([pending.data_ptr() for pending in state.pending()])
    assert places[0] == places[5]  # the chunk is full with the next
    assert state.pending_tokens == 2


@torch.no_grad()
def test_operators_of_a_decoded_token(monkeypatch) -> None:
    """KERNELS.md has these numbers; what the interpreter does inside a kernel is not counted."""
    inputs = random_inputs(1, 2, 1, n=6)
    launched, counted = [], []
    interpret = InterpretedFunction.run

    def launch(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        with _disable_current_modes():
            return interpret(kernel, *args, **kwargs)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            counted.append(operator)
            return operator(*args, **kwargs or {})

    tables = {n: inputs.pop(n) for n in ("keys", "values")}
    first, second = ({n: t[:, i : i + 1] for n, t in inputs.items()} for i in range(2))
    kw = {"topk": 3, "chunk_size": 7, "backend": "triton"}
    state = fwpkm(**first, **tables, **kw).state
    monkeypatch.setattr(InterpretedFunction, "run", launch)
    with Count():
        fwpkm(**second, **tables, **kw, state=state)
    assert launched == ["nearest_subkeys_kernel", "product_kernel", "read_kernel"]
    assert len(counted) <= 25
    assert not [o for o in counted if o in (torch.ops.aten.cat.default, torch.ops.aten.clone.default)]


def test_the_layer_trains_in_bfloat16() -> None:
    """Half-precision inputs, float32 fast weights: the same as `eager` from the same bfloat16 numbers."""
    small = Settings(width=32, key_dim=32, value_dim=32, n_subkeys=16, topk=4, chunk_size=8)
    results = []
    for backend in ("triton", "eager"):
        torch.manual_seed(0)
        layer = FwPKM(small, backend=backend).bfloat16()
        x = torch.randn(2, 21, 32).bfloat16().requires_grad_()
        y, state = layer(x)
        assert state.rows.dtype == torch.float32
        y.float().square().sum().backward()
        results.append([y, x.grad, layer.query.weight.grad, layer.values.grad, layer.keys.grad])
    for mine, expected in zip(*results, strict=True):
        # Both round the same float32 numbers to bfloat16: at most one unit in the last place apart, 2^-8.
        torch.testing.assert_close(
            mine, expected, rtol=2**-7, atol=2**-10 * float(expected.detach().abs().max())
        )


def test_rows_beyond_int32() -> None:
    """A table of 2^32 elements, of which only a few pages are ever touched."""
    features = 1024
    rows = 2**32 // features
    table = torch.empty(rows, features, dtype=torch.float16)
    far = torch.tensor([[0, rows - 1], [rows // 2 + 1, rows - 1]])
    table[far.flatten()] = torch.randn(4, features).half()
    weights = torch.randn(2, 2)
    expected = (weights.unsqueeze(-1) * table[far].float()).sum(1)
    torch.testing.assert_close(weighted_rows(table, far, weights), expected)
    vectors = torch.randn(2, features)
    dots = (table[far].double() * vectors.double().unsqueeze(1)).sum(-1)
    # 1,024 terms near 1 sum to about 32; each addition rounds at 32 * 2^-24.
    torch.testing.assert_close(row_dots(table, far, vectors).double(), dots, rtol=0, atol=1e-4)
    before = table[far].float()
    distinct, starts, order = group_reads(far)
    grouped_sum(table, distinct, starts, order, weights.flatten(), vectors, reads=2)
    last = before[0, 1] + weights[0, 1] * vectors[0] + weights[1, 1] * vectors[1]
    torch.testing.assert_close(table[rows - 1].float(), last, rtol=2e-3, atol=2e-3)  # float16 once


def test_near_keys_lose_no_digits() -> None:
    """``|q - K|^2`` of 1e-6 beside keys of length 1000: the product that finds them cannot tell it."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 1, 2, 16, 8, generator=generator) * 1000
    query = (keys[0, 0, :, 5] + 1e-3).reshape(1, 1, 16)
    subkeys = torch.empty(1, 1, 1, 2, 1, dtype=torch.int32)
    scores = torch.empty(1, 1, 1, 2, 1)
    nearest_subkeys(query, keys, subkeys, scores, inverse_distance=True)
    exact = (query.view(2, 8).double() - keys[0, 0, :, 5].double()).square().sum(-1)
    assert subkeys.flatten().tolist() == [5, 5]
    torch.testing.assert_close(scores.flatten().double(), -torch.log(1e-3 + exact), rtol=1e-5, atol=1e-5)


def test_not_a_number_stays_in_bounds() -> None:
    inputs = random_inputs(1, 9, 1, n=6)
    inputs["query"][0, 3] = float("nan")
    with torch.no_grad():
        out = fwpkm(**inputs, topk=3, chunk_size=4, backend="triton")
    assert int(out.indices.min()) >= 0
    assert int(out.indices.max()) < 36
    assert out.retrieved[0, 3].isnan().all()


def test_a_learning_rate_compiles_nothing_again() -> None:
    """Nor does a chunk's place: what Triton compiles for hangs on the shapes and the other settings alone."""
    inputs = random_inputs(1, 9, 1, n=6)
    noted = []
    for rate in (0.3, 0.6):
        kw = POINTS[0] | {"learning_rate": rate, "addressing_weight": rate}
        noted.append(note_calls(lambda kw=kw: gradients(inputs, (), None, **kw, backend="triton")))
    assert noted[0] == noted[1]
    assert {call["kernel"] for call in noted[0]} >= {"move_keys_kernel", "usage_gradient_kernel"}


def test_refused_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    inputs = random_inputs(1, 3, 1, n=6)
    with pytest.raises(ValueError, match="backend 'triton' runs on a CUDA device, not on cpu"):
        fwpkm(**inputs, topk=3, chunk_size=4, backend="triton")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        pkm(*draw(3), topk=2, backend="triton")


def test_refused_on_the_command_line(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "bench.py", "sweep", "--layers", "pkm", "--backend", "triton"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "backend triton needs --device cuda" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper() -> None:
    """At the paper's sizes, and with more sub-keys than a block holds; none spills a register."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = """
import json
from dataclasses import asdict
from fwpkm_bench.measure.compiled import compile_call, note, report
rows = [asdict(row) for row in report(["fwpkm", "pkm"])]
calls = [c for c in note(["fwpkm", "pkm"]) if "ONE_BLOCK" in c["constants"]]
rows += [asdict(compile_call({**c, "constants": {**c["constants"], "ONE_BLOCK": False}}, 90)) for c in calls]
print(json.dumps(rows))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    rows = json.loads(done.stdout)
    kernels = {row["kernel"] for row in rows}
    written = {
        line.split("(")[0].removeprefix("def ").strip()
        for path in (*ROOT.glob("layers/*/triton*.py"), *ROOT.glob("fwpkm_bench/kernels/*triton*.py"))
        for line in path.read_text().splitlines()
        if line.startswith("def ") and "_kernel(" in line
    }
    assert kernels == written
    assert all(row["registers"] > 0 for row in rows)
    assert [row for row in rows if row["spilled_bytes"]] == []
    assert all(row["shared_bytes"] <= 227 * 1024 for row in rows)
    blocks = {row["kernel"]: row["constants"] for row in rows}
    assert "BLOCK_J=8 " in blocks["usage_kernel"]  # a GPU's, not the interpreter's
