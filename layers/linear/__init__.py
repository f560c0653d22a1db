"""Linear attention: keys and values summed into one matrix, read as a weighted mean (arXiv 2006.16236).

Shapes: B sequences, T tokens, D model width, H heads, Dk key and Dv value features a head.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.kernels.precision import full_precision, wide_type

from ..contract import Cost, SequenceLayer, linear_flops, parameter_bytes, require_positive
from . import eager
from .core import IMPLEMENTATIONS, Core, LinearState, feature_map


@dataclass(frozen=True)
class Settings:
    """``heads`` heads of ``head_dim`` key and value features in a model of width ``width``."""

    width: int = 256
    heads: int = 4
    head_dim: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "head_dim")


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, state: LinearState | None = None, backend: str = "eager"
) -> tuple[Tensor, LinearState]:
    """Per head, ``S += k v^T; z += k; o = S^T q / (z . q)`` (arXiv 2006.16236, eq. 18-20).

    Args:
        q, k: ``[B, T, H, Dk]``, already mapped to positive features (see `feature_map`).
        v: ``[B, T, H, Dv]``.
        state: S and z before the first token; None is an empty memory.
        backend: "eager", "fla" (fla-core's kernels, on a GPU, which keep the type of q, k and v) or
            "reference".

    Returns:
        The output ``[B, T, H, Dv]`` in the type of ``v``, and the state after the last token.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
    """
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend is {backend!r}; linear_attention has {', '.join(IMPLEMENTATIONS)}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q is {list(q.shape)}; it must be [B, T, H, Dk], none of them 0")
    batch, seq, heads, key_dim = q.shape
    value_dim = v.shape[-1]
    dtype = wide_type(q)
    if state is None:
        memory = q.new_zeros((batch, heads, key_dim, value_dim), dtype=dtype)
        state = LinearState(memory, q.new_zeros((batch, heads, key_dim), dtype=dtype))
    for name, tensor, shape in (
        ("k", k, q.shape),
        ("v", v, (batch, seq, heads, value_dim)),
        ("state.memory", state.memory, (batch, heads, key_dim, value_dim)),
        ("state.normaliser", state.normaliser, (batch, heads, key_dim)),
    ):
        if tensor.shape != torch.Size(shape):
            raise ValueError(
                f"{name} is {list(tensor.shape)}; for q {list(q.shape)} and v {list(v.shape)} "
                f"it must be {list(shape)}"
            )
    kept = 3 if backend == "fla" else 0  # tensors that keep their type
    tensors = (q, k, v, state.memory, state.normaliser)
    inputs = (*tensors[:kept], *(tensor.to(dtype) for tensor in tensors[kept:]))
    with phase("attention"), full_precision(q.device.type):
        output, memory, normaliser = IMPLEMENTATIONS[backend](*inputs)
    return output.to(v.dtype), LinearState(memory, normaliser)


class LinearAttention(SequenceLayer):
    """Projections to queries, keys and values, ``phi = elu + 1`` on the first two, and one back to the width
    (arXiv 2006.16236, section 3.2)."""

    Settings: TypeAlias = Settings
    sizes: ClassVar = {"laptop": Settings(), "paper": Settings(width=512, heads=8)}
    backends = tuple(IMPLEMENTATIONS)

    @classmethod
    def best_backend(cls, device: str, dtype: str) -> str:
        """On a GPU fla-core's kernels, the field's own: nothing home-made stands in for them."""
        return "fla" if device == "cuda" else "eager"

    def __init__(self, settings: Settings, backend: str = "eager") -> None:
        super().__init__(settings, backend)
        width, features = settings.width, settings.heads * settings.head_dim
        self.query = nn.Linear(width, features, bias=False)
        self.key = nn.Linear(width, features, bias=False)
        self.value = nn.Linear(width, features, bias=False)
        self.out = nn.Linear(features, width, bias=False)

    def init_state(self, batch_size: int) -> LinearState:
        """An empty memory for ``batch_size`` sequences, on the parameters' device."""
        heads, head_dim = self.settings.heads, self.settings.head_dim
        weight = self.out.weight
        dtype = wide_type(weight)
        memory = weight.new_zeros((batch_size, heads, head_dim, head_dim), dtype=dtype)
        return LinearState(memory, weight.new_zeros((batch_size, heads, head_dim), dtype=dtype))

    def state_from(self, tensors: dict[str, Tensor]) -> LinearState:
        """The state that `State.tensors` took apart."""
        device = self.out.weight.device
        return LinearState(tensors["memory"].to(device), tensors["normaliser"].to(device))

    def forward(self, x: Tensor, state: LinearState | None = None) -> tuple[Tensor, LinearState]:
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

    def _piece(self, x: Tensor, state: LinearState) -> tuple[Tensor, LinearState]:
        q, k, v = (
            project(x).unflatten(-1, (self.settings.heads, -1))
            for project in (self.query, self.key, self.value)
        )
        output, state = linear_attention(feature_map(q), feature_map(k), v, state=state, backend=self.backend)
        return self.out(output.flatten(-2)), state

    def cost(self, batch: int, seq: int) -> Cost:
        """Projections, and per head and token a multiply-add an element of S to write and one to read, and
        three operations an element of z. Bytes: weights, x, y and the final state."""
        heads, head_dim = self.settings.heads, self.settings.head_dim
        tokens = batch * seq
        memory = heads * (4 * head_dim**2 + 3 * head_dim)
        return Cost(
            flops=tokens * (linear_flops(self.query, self.key, self.value, self.out) + memory),
            bytes=parameter_bytes(self)
            + 4 * (2 * tokens * self.settings.width + batch * heads * head_dim * (head_dim + 1)),
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


LAYER = LinearAttention
