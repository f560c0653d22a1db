"""The gated delta rule: a matrix memory that forgets, and corrects what a key recalls (arXiv 2412.06464).

Shapes: B sequences, T tokens, D model width, H heads, Dk key and Dv value features a head.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.kernels.precision import full_precision, wide_type

from ..contract import Cost, SequenceLayer, linear_flops, parameter_bytes, require_positive
from . import eager
from .core import IMPLEMENTATIONS, Core, State


@dataclass(frozen=True)
class Settings:
    """``heads`` heads of ``head_dim`` key and value features in a model of width ``width``."""

    width: int = 256
    heads: int = 4
    head_dim: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "head_dim")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    backend: str = "eager",
) -> tuple[Tensor, Tensor]:
    """Per head, ``S = e^a S; S += k (beta (v - S^T k))^T; o = S^T q / sqrt(Dk)`` (arXiv 2412.06464, eq. 10).

    Args:
        q, k: ``[B, T, H, Dk]``, used as given; the rule is stable for keys of length at most 1.
        v: ``[B, T, H, Dv]``.
        beta: ``[B, T, H]``, how much of the error each token corrects.
        log_decay: ``[B, T, H]``, a above: finite, at most 0.
        state: ``[B, H, Dk, Dv]``, S before the first token; None is an empty memory.
        backend: "eager", "fla" (fla-core's kernels, on a GPU, which keep the type of q, k and v) or
            "reference".

    Returns:
        The output ``[B, T, H, Dv]`` in the type of ``v``, and S after the last token, float32 at least.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
    """
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend is {backend!r}; gated_delta_rule has {', '.join(IMPLEMENTATIONS)}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q is {list(q.shape)}; it must be [B, T, H, Dk], none of them 0")
    batch, seq, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    dtype = wide_type(q)
    if state is None:
        state = q.new_zeros((batch, heads, key_dim, value_dim), dtype=dtype)
    for name, tensor, shape in (
        ("k", k, q.shape),
        ("v", v, (batch, seq, heads, value_dim)),
        ("beta", beta, (batch, seq, heads)),
        ("log_decay", log_decay, (batch, seq, heads)),
        ("state", state, (batch, heads, key_dim, value_dim)),
    ):
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"{name} is {list(tensor.shape)}; for q {list(q.shape)} and v {list(v.shape)} "
                f"it must be {list(shape)}"
            )
    kept = 3 if backend == "fla" else 0  # tensors that keep their type
    tensors = (q, k, v, beta, log_decay, state)
    inputs = (*tensors[:kept], *(tensor.to(dtype) for tensor in tensors[kept:]))
    with phase("delta rule"), full_precision(q.device.type):
        output, state = IMPLEMENTATIONS[backend](*inputs)
    return output.to(v.dtype), state


class GatedDeltaNet(SequenceLayer):
    """Gated DeltaNet's token mixer, without its short convolution (arXiv 2412.06464, section 3.4).

    ``q, k = normalise(silu(W x))``, ``v = W_v x``, ``beta = sigmoid(W_b x)``, log decay
    ``-e^A softplus(W_a x + bias)``; the output is normalised per head, gated by ``silu(W_g x)``, projected.
    """

    Settings: TypeAlias = Settings
    sizes: ClassVar = {"laptop": Settings(), "paper": Settings(width=512, heads=8)}
    backends = tuple(IMPLEMENTATIONS)

    @classmethod
    def best_backend(cls, device: str, dtype: str) -> str:
        """On a GPU fla-core's kernels, the field's own: nothing home-made stands in for them."""
        return "fla" if device == "cuda" else "eager"

    def __init__(self, settings: Settings, backend: str = "eager") -> None:
        super().__init__(settings, backend)
        width, heads, head_dim = settings.width, settings.heads, settings.head_dim
        self.query = nn.Linear(width, heads * head_dim, bias=False)
        self.key = nn.Linear(width, heads * head_dim, bias=False)
        self.value = nn.Linear(width, heads * head_dim, bias=False)
        self.beta = nn.Linear(width, heads, bias=False)
        self.decay = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, heads * head_dim, bias=False)
        self.norm = nn.RMSNorm(head_dim, eps=1e-6)
        self.out = nn.Linear(heads * head_dim, width, bias=False)
        # Mamba2's start: rates of 1 to 16 times steps of 0.001 to 0.1, both spread over the heads.
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.log_decay_rate = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.decay_bias = nn.Parameter(step + torch.log(-torch.expm1(-step)))  # softplus(bias) = step

    def init_state(self, batch_size: int) -> State:
        """An empty memory for ``batch_size`` sequences, on the parameters' device."""
        heads, head_dim = self.settings.heads, self.settings.head_dim
        weight = self.out.weight
        dtype = wide_type(weight)
        return State(weight.new_zeros((batch_size, heads, head_dim, head_dim), dtype=dtype))

    def state_from(self, tensors: dict[str, Tensor]) -> State:
        """The state that `State.tensors` took apart."""
        return State(tensors["memory"].to(self.out.weight.device))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            ValueError: ``x`` is not ``[B, T, D]``, or ``state`` is of another number of sequences.
        """
        self.check_input(x)
        if state is None:
            state = self.init_state(x.shape[0])
        if state.memory.shape[0] != x.shape[0]:
            raise ValueError(
                f"state is of {state.memory.shape[0]} sequences, x of {x.shape[0]}; give one a row"
            )
        if torch.is_grad_enabled() or self.backend == "fla":
            return self._piece(x, state)
        # Where no gradient is wanted, projecting a segment at a time bounds the memory of a long prefill.
        y = torch.empty_like(x)
        segment = eager.segment_length(x.shape[0])
        for start in range(0, x.shape[1], segment):
            piece = slice(start, start + segment)
            y[:, piece], state = self._piece(x[:, piece], state)
        return y, state

    def _piece(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.settings.heads, -1))

        q = F.normalize(F.silu(heads(self.query(x))), dim=-1)
        k = F.normalize(F.silu(heads(self.key(x))), dim=-1)
        beta = torch.sigmoid(self.beta(x))
        log_decay = -self.log_decay_rate.exp() * F.softplus(self.decay(x) + self.decay_bias)
        output, memory = gated_delta_rule(
            q, k, heads(self.value(x)), beta, log_decay, state=state.memory, backend=self.backend
        )
        gated = self.norm(output) * F.silu(heads(self.gate(x)))
        return self.out(gated.flatten(-2)), State(memory)

    def cost(self, batch: int, seq: int) -> Cost:
        """Projections, and per head and token seven operations an element of S: decay 1, recall, correction
        and read 2 each. Bytes: weights, x, y and the final state."""
        projections = (self.query, self.key, self.value, self.beta, self.decay, self.gate, self.out)
        state_elements = self.settings.heads * self.settings.head_dim**2
        tokens = batch * seq
        return Cost(
            flops=tokens * (linear_flops(*projections) + 7 * state_elements),
            bytes=parameter_bytes(self) + 4 * (2 * tokens * self.settings.width + batch * state_elements),
        )

    @classmethod
    def memory_core(
        cls,
        settings: Settings,
        *,
        key_dim: int,
        value_dim: int,
        backend: str = "eager",
        generator: torch.Generator | None = None,
    ) -> Core:
        """The memory alone, on ``generator``'s device or else torch's default; nothing is drawn."""
        device = generator.device if generator is not None else None
        return Core(key_dim=key_dim, value_dim=value_dim, backend=backend, device=device)


LAYER = GatedDeltaNet
