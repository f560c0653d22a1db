"""The gated delta rule: golden vectors, parity of its backends, pieces, and its memory alone."""

import pytest
import torch

from fwpkm_bench.layers.gdn import LAYER, Settings, gated_delta_rule
from fwpkm_bench.layers.gdn.eager import SEGMENT

BACKENDS = ("reference", "eager")
SMALL = Settings(width=24, heads=2, head_dim=8)


def draw(batch, seq, heads=2, key_dim=8, value_dim=12, decay=0.1, dtype=torch.float64):
    """q, k, v, beta, log_decay as the rule wants them, and a state, all asking for gradients."""
    generator = torch.Generator().manual_seed(batch * 1000 + seq)
    q, k, v = (
        torch.randn(batch, seq, heads, features, generator=generator, dtype=dtype)
        for features in (key_dim, key_dim, value_dim)
    )
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    beta, log_decay = (torch.rand(batch, seq, heads, generator=generator, dtype=dtype) for _ in range(2))
    state = torch.randn(batch, heads, key_dim, value_dim, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, beta, -decay * log_decay, state)]


def outcome(backend, inputs):
    """Output, final state and the gradients of every input."""
    *arguments, state = inputs
    output, state1 = gated_delta_rule(*arguments, state=state, backend=backend)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    gradients = torch.autograd.grad((output * weights).sum() + 0.3 * state1.sum(), inputs)
    return [output, state1, *gradients]


@pytest.mark.parametrize("name", ["gated_delta_rule", "gated_delta_rule_long"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_golden(golden, name, backend):
    data = golden(name)
    names = ("q", "k", "v", "beta", "log_decay", "state0")
    *arguments, state = inputs = [data[key].requires_grad_() for key in names]
    output, state1 = gated_delta_rule(*arguments, state=state, backend=backend)
    loss = (output * data["cotangent"]).sum() + data["config"]["state_loss"] * state1.sum()
    gradients = torch.autograd.grad(loss, inputs)
    # The files are float32 and good to 3e-6; 1e-5 leaves room for another order of summation.
    torch.testing.assert_close(output, data["output"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state1, data["state1"], rtol=1e-5, atol=1e-5)
    for key, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(
            gradient, data[f"grad_{key}"], rtol=1e-5, atol=1e-5, msg=lambda m, k=key: k + m
        )


@pytest.mark.parametrize("seq", [1, 2, 63, 64, 65, 200, SEGMENT + 70])
def test_eager_equals_reference(seq):
    inputs = draw(2 if seq < 500 else 1, seq)
    # Float64 rounds at 1e-16; a few hundred sums of terms near 1 stay far below 1e-10.
    for eager, reference in zip(outcome("eager", inputs), outcome("reference", inputs), strict=True):
        torch.testing.assert_close(eager, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("decay", [0.0, 40.0])
def test_decay_of_none_and_of_nearly_all(decay):
    """Within a chunk of decay 40 a token, e^-g would overflow float32 at once."""
    inputs = draw(1, 150, decay=decay, dtype=torch.float32)
    for eager, reference in zip(outcome("eager", inputs), outcome("reference", inputs), strict=True):
        assert eager.isfinite().all()
        # The cumulative decay reaches 64 * 40: its float32 step there, 2.4e-4, is the error of e^(g_t - g_j).
        torch.testing.assert_close(eager, reference, rtol=5e-4, atol=5e-4 if decay else 1e-5)


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


def test_a_long_prefill_without_gradients_equals_one_with():
    torch.manual_seed(2)
    layer = LAYER(SMALL).double()
    x = torch.randn(3, SEGMENT, SMALL.width, dtype=torch.float64)  # three segments of each sequence
    whole, final = layer(x)
    with torch.no_grad():
        y, state = layer(x)
    torch.testing.assert_close(y, whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state.memory, final.memory, rtol=1e-10, atol=1e-10)


def test_half_precision_keeps_a_float32_state():
    layer = LAYER(SMALL).bfloat16()
    y, state = layer(torch.randn(1, 70, SMALL.width, dtype=torch.bfloat16))
    assert (y.dtype, state.memory.dtype) == (torch.bfloat16, torch.float32)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_the_memory_alone(backend):
    outcomes = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            output, state = gated_delta_rule(*(tensor.float() for tensor in draw(2, 70)[:5]), backend=backend)
        outcomes.append([output, state])
    for plain, autocast in zip(*outcomes, strict=True):
        assert torch.equal(plain, autocast)


def test_detach_cuts_the_graph_and_keeps_the_bytes():
    _, state = LAYER(SMALL)(torch.randn(2, 3, SMALL.width))
    assert state.memory.requires_grad
    assert not state.detach().memory.requires_grad
    assert state.detach().nbytes() == state.nbytes() == 2 * 2 * 8 * 8 * 4


def test_cost_counts_the_state_it_leaves():
    layer = LAYER(SMALL)
    x = torch.randn(2, 9, SMALL.width)
    _, state = layer(x)
    weights = sum(p.numel() * 4 for p in layer.parameters())
    assert layer.cost(2, 9).bytes == weights + 2 * x.nbytes + state.nbytes()
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert layer.cost(2, 9).flops == 18 * (2 * matrices + 7 * 2 * 8 * 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_recalls_what_was_written_last_and_what_nothing_overlaps(backend):
    core = LAYER.memory_core(SMALL, key_dim=16, value_dim=5, backend=backend)
    keys = torch.linalg.qr(torch.randn(16, 16)).Q
    values, newer = torch.randn(16, 5), torch.randn(1, 5)
    state = core.write(core.init_state(), 3 * keys[:10], values[:10])
    state = core.write(state, keys[10:], values[10:])
    torch.testing.assert_close(core.read(state, 2 * keys), values, rtol=1e-4, atol=1e-5)
    state = core.write(state, keys[:1], newer)  # replaces the pair of the same key
    torch.testing.assert_close(core.read(state, keys), torch.cat((newer, values[1:])), rtol=1e-4, atol=1e-5)
    assert core.slot_writes(state) is None


def test_bad_inputs_are_refused_by_name():
    *arguments, state = draw(2, 5)
    with pytest.raises(ValueError, match=r"beta is \[2, 5, 1\].*must be \[2, 5, 2\]"):
        gated_delta_rule(*arguments[:3], arguments[3][..., :1], arguments[4])
    with pytest.raises(ValueError, match=r"state is \[1, 2, 8, 12\].*must be \[2, 2, 8, 12\]"):
        gated_delta_rule(*arguments, state=state[:1])
    with pytest.raises(ValueError, match="backend is 'cuda'; gated_delta_rule has reference, eager"):
        gated_delta_rule(*arguments, backend="cuda")
    with pytest.raises(ValueError, match="heads must be a whole number of at least 1, got 0"):
        Settings(heads=0)
    layer = LAYER(SMALL)
    with pytest.raises(ValueError, match="state is of 3 sequences, x of 2"):
        layer(torch.randn(2, 4, SMALL.width), layer.init_state(3))
