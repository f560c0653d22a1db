"""FwPKM: the authors' vectors, and the sparse backend against the dense reference.

Tolerances: 1e-5 in float32 is what the golden vectors promise; in float64 both backends compute the same
sums in another order, so 1e-11 leaves four digits over the rounding seen.
"""

import itertools

import pytest
import torch
from torch import Tensor

from fwpkm_bench.layers.fwpkm import FwPKM, FwPKMOutput, MemorySettings, Settings, fwpkm

GOLDEN = [
    *("batch_shared", "dot_product", "large_keys", "left_padding", "lookahead_0", "many_chunks"),
    *("no_addressing_loss", "no_gate", "ragged_tail", "single_chunk", "two_heads"),
]
BACKENDS = ("reference", "eager")
EXACT = {"rtol": 0, "atol": 1e-11}


def run_golden(vectors: dict, backend: str) -> FwPKMOutput:
    config = vectors["config"]
    return fwpkm(
        vectors["q"],
        vectors["v"],
        vectors.get("gate"),
        vectors["keys0"],
        vectors["values0"],
        topk=config["topk"],
        chunk_size=config["chunk_size"],
        lookahead=config["lookahead"],
        score=config["score"].removesuffix("_product"),
        learning_rate=config["learning_rate"],
        addressing_weight=config["addressing_loss_weight"],
        boundary="drop",
        scope="shared",
        mask=vectors.get("mask"),
        backend=backend,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", GOLDEN)
def test_golden(golden, name: str, backend: str) -> None:
    vectors = golden(name)
    with torch.no_grad():
        out = run_golden(vectors, backend)
    keys, values = out.state.materialize()
    assert torch.equal(out.indices, vectors["indices"])
    for mine, theirs in (
        (out.retrieved, "retrieved"),
        (out.weights, "weights"),
        (out.losses, "losses"),
        (out.addressing_loss, "addr_loss"),
        (keys[0], "keys1"),
        (values[0], "values1"),
    ):
        torch.testing.assert_close(
            mine, vectors[theirs], rtol=0, atol=1e-5, msg=lambda m, t=theirs: f"{t}: {m}"
        )


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_gradients_of_the_reference(golden, name: str) -> None:
    vectors = golden(name)
    inputs = [n for n in ("q", "v", "gate", "keys0", "values0") if n in vectors]
    for n in inputs:
        vectors[n].requires_grad_()
    (run_golden(vectors, "reference").retrieved * vectors["cotangent"]).sum().backward()
    for n in inputs:
        expected = vectors["grad_" + n.rstrip("0") + "0" * n.endswith("0")]
        mine = torch.zeros_like(expected) if vectors[n].grad is None else vectors[n].grad
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


def random_inputs(batch: int, tokens: int, heads: int, n: int, *, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    h, value_dim = 3, 5
    return {
        "query": draw(batch, tokens, heads * 2 * h),
        "target": draw(batch, tokens, value_dim),
        "gate": draw(batch, tokens).sigmoid(),
        "keys": draw(heads, 2, n, h),
        "values": draw(n * n, value_dim),
    }


AXES = {
    "topk": (1, 3, 6),
    "chunk_size": (1, 7, 100),
    "lookahead": (0, 1, 3),
    "write_rule": ("paper", "authors", "projected"),
    "boundary": ("carry", "drop"),
    "scope": ("per_sequence", "shared"),
    "score": ("idw", "dot"),
}
# Every fifth: every value meets every other, and the rest adds time but no new pair of values.
GRID = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())][::5]


def grid_id(kw: dict) -> str:
    return "-".join(str(v) for v in kw.values())


@torch.no_grad()
@pytest.mark.parametrize("kw", GRID, ids=grid_id)
def test_eager_is_the_reference(kw: dict) -> None:
    for batch, tokens, heads, masked in ((3, 23, 2, True), (1, 1, 1, False), (2, 15, 3, False)):
        inputs = random_inputs(batch, tokens, heads, n=6)
        # Each sequence has its own padding: with memories of their own, they must not see each other's.
        mask = torch.arange(tokens) >= torch.tensor([[4], [0], [9]]) if masked else None
        expected = fwpkm(**inputs, **kw, mask=mask, backend="reference")
        mine = fwpkm(**inputs, **kw, mask=mask, backend="eager")
        assert torch.equal(mine.indices, expected.indices)
        for name in ("retrieved", "weights", "losses", "addressing_loss"):
            torch.testing.assert_close(getattr(mine, name), getattr(expected, name), **EXACT)
        flush = kw["boundary"] == "carry"
        states = [out.state.flush() if flush else out.state for out in (mine, expected)]
        for a, b in zip(*(state.materialize() for state in states), strict=True):
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["per_sequence", "shared"])
@pytest.mark.parametrize("lookahead", [0, 1, 9])
def test_pieces_are_the_whole(backend: str, scope: str, lookahead: int) -> None:
    inputs = random_inputs(2, 40, 2, n=6)
    kw = {"topk": 3, "chunk_size": 7, "lookahead": lookahead, "scope": scope, "backend": backend}
    whole = fwpkm(**inputs, **kw)
    tables = {n: inputs.pop(n) for n in ("keys", "values")}
    for cuts in ((1, 2, 9, 23, 24), range(1, 40), (7, 14, 21)):
        state, pieces = None, []
        for start, stop in itertools.pairwise((0, *cuts, 40)):
            piece = {n: t[:, start:stop] for n, t in inputs.items()}
            out = fwpkm(**piece, **tables, **kw, state=state)
            state = out.state
            pieces.append(out.retrieved)
        torch.testing.assert_close(torch.cat(pieces, 1), whole.retrieved, **EXACT)
        assert state is not None
        assert state.nbytes() == whole.state.nbytes()
        for a, b in zip(state.materialize(), whole.state.materialize(), strict=True):
            torch.testing.assert_close(a, b, **EXACT)


def test_causal_and_batch_invariant() -> None:
    inputs = random_inputs(3, 30, 1, n=6)
    kw = {"topk": 2, "chunk_size": 8}
    with torch.no_grad():
        whole = fwpkm(**inputs, **kw).retrieved
        for name in ("query", "target", "gate"):
            changed = dict(inputs)
            changed[name] = inputs[name].clone()
            changed[name][:, 20:] += 1
            assert torch.equal(fwpkm(**changed, **kw).retrieved[:, :20], whole[:, :20])
        alone = {n: t[1:2] if n in ("query", "target", "gate") else t for n, t in inputs.items()}
        torch.testing.assert_close(fwpkm(**alone, **kw).retrieved[0], whole[1], **EXACT)


@torch.no_grad()
def test_a_projected_write_makes_the_next_read_exact() -> None:
    inputs = random_inputs(1, 1, 2, n=8)
    kw = {"topk": 3, "chunk_size": 1, "lookahead": 0, "addressing_weight": 0.0, "write_rule": "projected"}
    inputs["gate"] = torch.ones_like(inputs["gate"])
    first = fwpkm(**inputs, **kw)
    second = fwpkm(**inputs, **kw, state=first.state)
    torch.testing.assert_close(second.retrieved, inputs["target"], **EXACT)


@torch.no_grad()
def test_near_keys_keep_their_digits() -> None:
    """A query almost on a key, both far from the origin: |q|^2 + |K|^2 - 2qK alone would lose all digits."""
    generator = torch.Generator().manual_seed(0)
    keys = 30 + torch.randn(1, 2, 16, 4, generator=generator)
    query = (keys[0, :, 3] + 0.01).reshape(1, 1, 8)
    values = torch.randn(256, 4, generator=generator)
    arguments = (query, torch.zeros(1, 1, 4), None, keys, values)
    mine = fwpkm(*arguments, topk=4, chunk_size=1)
    exact = fwpkm(
        *(None if t is None else t.double() for t in arguments), topk=4, chunk_size=1, backend="reference"
    )
    assert torch.equal(mine.indices, exact.indices)
    torch.testing.assert_close(mine.weights.double(), exact.weights, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_state_is_an_overlay() -> None:
    inputs = random_inputs(2, 20, 1, n=50)
    before = inputs["values"].clone()
    out = fwpkm(**inputs, topk=2, chunk_size=5)
    assert torch.equal(inputs["values"], before)
    row = 5 * 8 + 4  # value_dim float64, and the slot's number
    keys = 2 * inputs["keys"].numel() * 8
    leftover = 2 * (6 + 1) * 8  # one query and gate a sequence wait for their target
    assert out.state.nbytes() - keys - leftover <= 2 * 20 * 2 * row
    assert (out.state.nbytes() - keys - leftover) % row == 0


@torch.no_grad()
def test_a_state_is_used_up_and_can_be_cloned() -> None:
    inputs = random_inputs(1, 10, 1, n=6)
    kw = {"topk": 2, "chunk_size": 4}
    first = fwpkm(**inputs, **kw).state
    kept = first.clone()
    expected = fwpkm(**inputs, **kw, state=first).retrieved
    with pytest.raises(ValueError, match="used up"):
        fwpkm(**inputs, **kw, state=first)
    torch.testing.assert_close(fwpkm(**inputs, **kw, state=kept).retrieved, expected, **EXACT)


BAD = {
    "query": ({"query": torch.zeros(1, 4, 7)}, r"query is \[1, 4, 7\].*\[B, T, 6\]"),
    "target": ({"target": torch.zeros(1, 3, 5)}, r"target is \[1, 3, 5\].*\[1, 4, 5\]"),
    "gate": ({"gate": torch.zeros(1, 4, 1)}, r"gate is .*\[1, 4\]"),
    "values": ({"values": torch.zeros(35, 5)}, r"values is .*\[36, value_dim\]"),
    "dtype": ({"target": torch.zeros(1, 4, 5).double()}, r"target is .*float64.*as precise as keys"),
    "integers": ({"query": torch.zeros(1, 4, 6).long()}, r"query is .*int64.*floating point"),
    "topk": ({"topk": 7}, "topk is 7; it must be at most .* 6"),
    "topk-negative": ({"topk": -1}, "topk must be a whole number of at least 1, got -1"),
    "mask": ({"mask": torch.full((1, 4), 0.5)}, "mask has values other than 0 and 1"),
    "mask-shape": ({"mask": torch.ones(4)}, r"mask is \[4\]"),
    "learning-rate": ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
    "write-rule": ({"write_rule": "author"}, "write_rule must be one of paper, authors, projected"),
    "backend": ({"backend": "cuda"}, "backend must be one of"),
    "empty": ({"query": torch.zeros(1, 0, 6)}, "B and T at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(name: str) -> None:
    inputs: dict = {n: t.float() for n, t in random_inputs(1, 4, 1, n=6).items()}
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message), torch.no_grad():
        fwpkm(**{**inputs, "topk": 2, "chunk_size": 2, **changes})


@torch.no_grad()
def test_a_state_of_another_configuration_is_refused() -> None:
    inputs = random_inputs(1, 4, 1, n=6)
    state = fwpkm(**inputs, topk=2, chunk_size=2).state
    with pytest.raises(ValueError, match=r"topk=2.*must be made with .*topk=3"):
        fwpkm(**inputs, topk=3, chunk_size=2, state=state)
    with pytest.raises(ValueError, match="goes on from a ReferenceState"):
        fwpkm(**inputs, topk=2, chunk_size=2, state=state, backend="reference")
    with pytest.raises(ValueError, match="state is of 1 sequences; query has 2"):
        fwpkm(**random_inputs(2, 4, 1, n=6), topk=2, chunk_size=2, state=state)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("key_dim", 7, "key_dim must be even"), ("topk", 9, "at most n_subkeys"), ("width", 0, "width must be")],
)
def test_bad_settings_are_named(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"n_subkeys": 8, "topk": 2, field: value})


def test_module_is_the_function_between_projections() -> None:
    torch.manual_seed(0)
    settings = Settings(width=12, key_dim=8, value_dim=10, n_subkeys=6, topk=2, chunk_size=5, heads=2)
    layers = [FwPKM(settings, backend=backend).double() for backend in BACKENDS]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    with torch.no_grad():
        (expected, _), (mine, state) = (layer(x) for layer in layers)
        torch.testing.assert_close(mine, expected, **EXACT)
        again, _ = layers[1](x, state)
        assert (again - mine).abs().max() > 1e-3  # a second reading reads what the first one wrote
    assert isinstance(layers[0].init_state(2).settings, MemorySettings)
