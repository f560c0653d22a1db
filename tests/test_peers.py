"""Other people's implementations: listed without them, a row where absent, and what they compute."""

import itertools
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from fwpkm_bench import catalog, palette, plot, report, spec, tables
from fwpkm_bench import run as runner
from fwpkm_bench.cli import main
from fwpkm_bench.errors import UsageError
from fwpkm_bench.kernels import fla_support
from fwpkm_bench.layers import peers
from fwpkm_bench.layers.fwpkm import FwPKM
from fwpkm_bench.layers.gdn import GatedDeltaNet
from fwpkm_bench.layers.linear import LinearAttention
from fwpkm_bench.layers.pkm import pkm
from fwpkm_bench.store import read_journal
from tests.test_run import ROOT

NAMES = tuple(peers.PEERS)
SMALL = {"width": 16, "key_dim": 8, "value_dim": 12, "n_subkeys": 32, "topk": 3, "chunk_size": 10}
HEADS = {"width": 16, "heads": 2, "head_dim": 8}


def peer(name: str, **settings: int):
    """A small peer of that name; skips the test where it is absent."""
    if reason := catalog.peer_absence(name):
        pytest.skip(f"{name}: {reason}")
    layer = catalog.load_layer(name)
    torch.manual_seed(0)
    return layer(layer.Settings(**settings))


@pytest.fixture
def absent(monkeypatch):
    """Every peer is absent."""

    def version(distribution: str) -> str:
        raise peers.importlib.metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(peers.importlib.metadata, "version", version)
    monkeypatch.delenv(peers.AUTHORS_PATH, raising=False)


def test_listing_imports_nothing_of_theirs() -> None:
    code = (
        "import sys\n"
        "from fwpkm_bench import catalog\n"
        "assert len([catalog.peer_absence(name) for name in catalog.peer_names()]) == 5\n"
        "theirs = {'torch', 'fla', 'product_key_memory', 'fast_weight_product_key_memory'}\n"
        "assert not theirs & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_list_says_how_to_install_what_is_absent(absent) -> None:
    said = CliRunner().invoke(main, ["list"]).output
    assert "layers     fwpkm gdn linear pkm softmax\n" in said
    for name, one in peers.PEERS.items():
        (line,) = [line for line in said.splitlines() if name in line]
        assert line.endswith(f"not installed; {one.install}")


def test_a_clone_that_is_none_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv(peers.AUTHORS_PATH, str(tmp_path))
    assert str(tmp_path) in catalog.peer_absence("peer:authors-fwpkm")
    assert "src/models/fwpkm/fwpkm.py" in catalog.peer_absence("peer:authors-fwpkm")


@pytest.mark.parametrize("name", NAMES)
def test_an_absent_peer_is_unsupported_rows(absent, name: str) -> None:
    sweep = spec.Sweep(seq=(64,), layers=(name,), modes=("prefill", "train"))
    outcomes = {}
    for case in spec.cases(sweep):
        assert case.case_id.startswith(name.replace(":", "-") + "-theirs-")
        outcomes[case.mode or case.workload] = in_this_process(case)
    assert {o["status"] for o in outcomes.values()} == {"unsupported"}
    assert outcomes["prefill"]["reason"] == f"not installed; {peers.PEERS[name].install}"
    assert outcomes["recall"]["reason"] == f"{name} offers no memory core"


def in_this_process(case: spec.Case) -> dict:
    from fwpkm_bench.worker import attempt

    return attempt(case)


def test_names_are_checked_and_files_still_load() -> None:
    with pytest.raises(UsageError, match="did you mean 'peer:lucidrains-pkm'"):
        spec.Sweep(layers=("peer:lucidrain-pkm",))
    with pytest.raises(UsageError, match="did you mean 'peer:fla-gdn'"):
        catalog.load_layer("peer:fla-gdm")
    assert catalog.load_layer(f"{ROOT}/tests/broken_layers.py:Fine").__name__ == "Fine"
    assert tables.layer_name("path/to/file.py:Class") == "Class"
    assert tables.layer_name("peer:fla-gdn") == "peer:fla-gdn"
    assert spec.Sweep().layers == spec.LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_cost_are_those_of_our_layer(name: str, monkeypatch) -> None:
    theirs, ours = catalog.load_layer(name), catalog.load_layer(peers.PEERS[name].layer)
    assert theirs.backends == ("theirs",)
    for size in ("laptop", "paper"):
        shared = vars(theirs.sizes[size]).keys() & vars(ours.sizes[size]).keys()
        assert {"width"} < shared
        for field in shared:
            assert getattr(theirs.sizes[size], field) == getattr(ours.sizes[size], field), (size, field)
    if not catalog.peer_absence(name):
        layer = theirs(theirs.sizes["laptop"])
        assert layer.cost(2, 64) == ours(ours.sizes["laptop"]).cost(2, 64)


def test_colours_are_distinct_and_stable() -> None:
    colours = [palette.colour_of(name) for name in (*NAMES, *spec.LAYERS)]
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("name", NAMES[:2])
@torch.no_grad()
def test_lucidrains_in_pieces(name: str) -> None:
    fields = vars(catalog.load_layer(name).Settings()).keys()
    layer = peer(name, **{key: value for key, value in SMALL.items() if key in fields})
    x = torch.randn(2, 35, 16)
    whole, whole_state = layer(x)
    assert whole.shape == x.shape
    assert whole.isfinite().all()
    state, pieces = None, []
    for start, stop in itertools.pairwise((0, 1, 2, 9, 10, 21, 35)):
        y, state = layer(x[:, start:stop], state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)
    assert state.nbytes() == whole_state.nbytes()
    with pytest.raises(ValueError, match="state is of 2 sequences, x of 3"):
        layer(torch.randn(3, 4, 16), state)


def test_lucidrains_trains() -> None:
    for name in NAMES[:2]:
        fields = vars(catalog.load_layer(name).Settings()).keys()
        layer = peer(name, **{key: value for key, value in SMALL.items() if key in fields})
        x = torch.randn(2, 35, 16, requires_grad=True)
        y, _ = layer(x)
        y.square().sum().backward()
        for tensor in (x, *layer.parameters()):
            assert tensor.grad is not None
            assert tensor.grad.isfinite().all()
            assert tensor.grad.abs().max() > 0


def test_lucidrains_other_types_are_refused() -> None:
    layer = peer("peer:lucidrains-fwpkm", **SMALL).double()
    with pytest.raises(NotImplementedError, match="float32 alone, not in torch"):
        layer(torch.randn(1, 4, 16, dtype=torch.float64))


@torch.no_grad()
def test_lucidrains_fwpkm_is_our_definition_where_the_rules_meet() -> None:
    """With the gate all but shut at the last token of each chunk, which theirs pairs with the chunk's first,
    it is our ``paper`` rule. The values of theirs are larger throughout by sqrt(d / (d - 1)), the biased
    standard deviation, and the norm of the output takes that out again."""
    sizes = SMALL | {"n_subkeys": 128}
    layer = peer("peer:lucidrains-fwpkm", **sizes)
    oracle = FwPKM(FwPKM.Settings(**sizes, write_rule="paper"), backend="reference")
    theirs = layer.memory
    width, features = SMALL["width"], SMALL["value_dim"]
    theirs.keys.normal_(std=0.3)
    theirs.to_values[1].weight.mul_(30)  # so that their epsilon, within the root, does not show
    theirs.to_gates[1].weight.zero_()
    theirs.to_gates[1].weight[0, 0] = 8.0
    oracle.query.weight.copy_(theirs.to_queries[1].weight)
    oracle.value.weight.copy_(theirs.to_values[1].weight)
    oracle.gate.weight.copy_(theirs.to_gates[1].weight.expand(8, width))
    oracle.gate.bias.zero_()
    oracle.output.weight.copy_(theirs.to_out[1].weight)
    oracle.keys.copy_(theirs.keys.transpose(0, 1))
    oracle.values.copy_(theirs.memories[:, 0] / (features / (features - 1)) ** 0.5)
    chunk = SMALL["chunk_size"]
    x = torch.randn(1, 5 * chunk, width)
    x[:, :, 0] = torch.linspace(-0.3, 0.3, 5 * chunk)
    x[:, chunk - 1 :: chunk, 0] = -60.0
    y, state = layer(x)
    expected, out = oracle.forward_detailed(x)
    # The last tokens of chunks count as readers of their slots in this chunk there, in the next one here.
    slots = out.indices.view(5, chunk, -1)
    assert not torch.isin(slots[:, -1], slots[:, :-1]).any(), "choose another seed"
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-4)
    keys, _ = out.state.materialize()
    assert (keys[0] - oracle.keys).abs().max() > 1e-3  # there was something to learn
    # The fifth chunk is full but theirs is written when the next token comes.
    assert state.memories.num_cached == chunk


@torch.no_grad()
def test_lucidrains_pkm_is_our_read() -> None:
    layer = peer("peer:lucidrains-pkm", width=16, heads=2, n_subkeys=16, topk=4, key_dim=8)
    theirs = layer.memory
    x = torch.randn(2, 9, 16)
    query = theirs.to_queries(x).view(18, 2, 2, 4)  # [N, half, H, h]
    query = theirs.norm(query).transpose(1, 2).flatten(2)
    read, _, _ = pkm(query, theirs.keys.transpose(1, 2), theirs.values.weight, topk=4, backend="reference")
    torch.testing.assert_close(layer(x)[0].flatten(0, 1), read, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [30, 90, 100])
def test_authors_are_our_reference_that_drops_and_shares(tokens: int) -> None:
    sizes = SMALL | {"heads": 2, "chunk_size": 30}
    theirs = peer("peer:authors-fwpkm", **sizes)
    ours = FwPKM(FwPKM.Settings(**sizes, boundary="drop", scope="shared"), backend="reference")
    same = {name: p for name, p in theirs.state_dict().items() if not name.startswith("memory.")}
    tables_ = {"keys": theirs.memory.keys.view_as(ours.keys), "values": theirs.memory.values}
    ours.load_state_dict(same | {name: t.detach() for name, t in tables_.items()})
    inputs = [torch.randn(2, tokens, 16).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    (y, state), (expected, expected_state) = theirs(inputs[0]), ours(inputs[1])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
    keys, values = expected_state.materialize()
    torch.testing.assert_close(state.keys.view_as(keys[0]), keys[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(state.values, values[0], rtol=0, atol=1e-5)
    assert (state.values - theirs.memory.values).abs().max() > 0.1

    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    expected.backward(cotangent)
    own = dict(ours.named_parameters())
    pairs = [(own[name.removeprefix("memory.")], p) for name, p in theirs.named_parameters()]
    for mine, their in [*pairs, (inputs[1], inputs[0])]:
        bound = 1e-5 * float(mine.grad.abs().max())
        torch.testing.assert_close(their.grad.view_as(mine), mine.grad, rtol=1e-4, atol=bound)


@torch.no_grad()
def test_authors_go_on_at_chunk_ends_alone() -> None:
    layer = peer("peer:authors-fwpkm", **SMALL)
    x = torch.randn(2, 38, 16)
    whole, whole_state = layer(x)
    first, state = layer(x[:, :20])
    second, state = layer(x[:, 20:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=0, atol=1e-5)
    assert state.nbytes() == whole_state.nbytes() == 4 * (2 * 32 * 4 + 32**2 * 12)
    with pytest.raises(NotImplementedError, match="goes on at the ends of its chunks alone"):
        layer(x, state)
    with pytest.raises(NotImplementedError, match="makes NaN of a last chunk of 1 tokens"):
        layer(x[:, :31])


@pytest.mark.parametrize("name", NAMES[3:])
def test_fla_wants_a_gpu(name: str) -> None:
    layer = peer(name, **HEADS)
    with pytest.raises(NotImplementedError, match="backend 'fla' runs on a CUDA device, not on cpu"):
        layer(torch.randn(1, 4, 16))


@pytest.mark.parametrize(("name", "ours"), [(NAMES[3], GatedDeltaNet), (NAMES[4], LinearAttention)])
@torch.no_grad()
def test_fla_is_our_layer(name: str, ours: type, monkeypatch) -> None:
    """Their kernels on a GPU; without one, their own slow equivalents with the same arguments."""
    layer = peer(name, **HEADS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        from fla.ops import gated_delta_rule, linear_attn
        from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
        from fla.ops.linear_attn.naive import naive_recurrent_linear_attn

        for kernel in ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"):
            monkeypatch.setattr(gated_delta_rule, kernel, naive_recurrent_gated_delta_rule)
        monkeypatch.setattr(linear_attn, "chunk_linear_attn", naive_recurrent_linear_attn)
        monkeypatch.setattr(fla_support, "require_fla", lambda device: None)
    oracle = ours(ours.Settings(**HEADS), backend="reference").to(device)
    oracle.load_state_dict(layer.ours.state_dict())
    x = torch.randn(2, 100, 16).to(device)
    expected, _ = oracle(x)
    tolerance = 1e-5 if device == "cpu" else 2e-3  # their products are TF32
    layer.to(device)
    whole, _ = layer(x)
    torch.testing.assert_close(whole, expected, rtol=0, atol=tolerance)
    first, state = layer(x[:, :64])
    second, state = layer(x[:, 64:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), expected, rtol=0, atol=tolerance)
    _, fresh = layer(x[:, :1], layer.init_state(2))
    assert fresh.nbytes() == state.nbytes() > 0


def summary_rows(**columns: list) -> pd.DataFrame:
    rows = pd.DataFrame(columns)
    fixed = {"mode": "prefill", "seq": 1024, "batch": 1, "dtype": "float32", "device": "cpu"}
    fixed |= {"backend": "eager", "status": "ok", "reason": None, "state_bytes": 1, "recall": None}
    fixed |= {"recall_lo": None, "recall_hi": None, "cosine": None}
    return rows.assign(**{name: value for name, value in fixed.items() if name not in rows})


def test_ratios_are_ours_over_theirs() -> None:
    short = summary_rows(
        layer=["fwpkm", "peer:lucidrains-fwpkm", "peer:lucidrains-fwpkm", "gdn", "peer:lucidrains-pkm"],
        seq=[1024, 1024, 2048, 1024, 1024],
        tokens_per_s=[1000.0, 10.0, 9.0, 5.0, 6.0],
        tokens_per_s_lo=[900.0, 9.0, None, 4.0, 5.0],
        tokens_per_s_hi=[1100.0, 11.0, None, 6.0, 7.0],
        peak_memory_bytes=[100, 1000, 1000, 1, 1],
    )
    compared = tables.ratios(short)
    assert len(compared) == 1  # the others have nothing of ours beside them
    (row,) = compared.to_dict("records")
    assert (row["layer"], row["peer"], row["seq"]) == ("fwpkm", "peer:lucidrains-fwpkm", 1024)
    assert row["tokens_per_s_ratio"] == pytest.approx(100)
    assert row["tokens_per_s_ratio_lo"] == pytest.approx(900 / 11)
    assert row["tokens_per_s_ratio_hi"] == pytest.approx(1100 / 9)
    assert row["peak_memory_ratio"] == pytest.approx(0.1)
    short.loc[1, ["tokens_per_s_lo", "tokens_per_s_hi"]] = None
    assert tables.ratios(short)["tokens_per_s_ratio_lo"].isna().all()
    _, (cells,) = report.ratio_headings_and_rows(tables.ratios(short))
    assert cells[-3:] == ["100", "measured once", "0.1"]
    assert tables.ratios(short[:0]).empty


def test_ratios_to_the_reference() -> None:
    short = summary_rows(
        layer=["fwpkm", "fwpkm", "gdn"],
        backend=["eager", "reference", "eager"],
        seq=[1024, 1024, 1024],
        tokens_per_s=[1000.0, 10.0, 5.0],
        tokens_per_s_lo=[900.0, 9.0, 4.0],
        tokens_per_s_hi=[1100.0, 11.0, 6.0],
        peak_memory_bytes=[100, 1000, 1],
    )
    (row,) = tables.ratios(short).to_dict("records")
    assert (row["layer"], row["peer"]) == ("fwpkm, backend eager", "fwpkm, backend reference")
    assert row["tokens_per_s_ratio"] == pytest.approx(100)


def test_a_sweep_with_peers(tmp_path: Path, capsys) -> None:
    """What is installed is measured, what is not is a row, and the report sets both beside ours."""
    layers = ("pkm", "peer:lucidrains-pkm", "peer:fla-gdn")
    sweep = spec.Sweep(seq=(64, 128), layers=layers, budget_s=0.05)
    runner.run(sweep, tmp_path / "run", "test", lambda progress: None)
    status = {
        (r["case"]["layer"], r["case"]["workload"]): r["status"] for r in read_journal(tmp_path / "run")
    }
    assert status["peer:fla-gdn", "throughput"] == "unsupported"
    assert status["peer:lucidrains-pkm", "recall"] == "unsupported"
    frame, short = tables.write_tables(tmp_path / "run")
    assert "peer:lucidrains-pkm.topk" in frame.columns
    assert set(short["layer"]) == set(layers)
    plot.draw_all(frame, short, tmp_path / "run" / "plots")
    report.write(tmp_path / "run", frame, short)
    report.print_summary(short)
    said = capsys.readouterr().out
    _, rows = report.headings_and_rows(short)
    # Of a peer that is not installed the summary gives the first reason, the table every one.
    assert any("peer:lucidrains-pkm" in cell for row in rows for cell in row)
    assert frame["reason"].fillna("").str.contains("peer:lucidrains-pkm offers no memory core").any()
    if catalog.peer_absence("peer:lucidrains-pkm"):
        assert not (tmp_path / "run" / "ratios.csv").exists()
        return
    compared = pd.read_csv(tmp_path / "run" / "ratios.csv")
    assert list(compared["seq"]) == [64, 128]
    assert (compared["tokens_per_s_ratio"] > 0).all()
    assert "ours / theirs" in said
    for name in ("report.md", "report.html"):
        assert "Against other implementations" in (tmp_path / "run" / name).read_text()
