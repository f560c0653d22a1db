"""Causal softmax attention: exact reads over a cache that grows with every token (arXiv 1706.03762).

Shapes: B sequences, T tokens, D model width, H query heads, G key heads, Dk key and Dv value features a head.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from fwpkm_bench.kernels.phases import phase

from ..contract import Cost, SequenceLayer, linear_flops, parameter_bytes, require_positive
from .core import IMPLEMENTATIONS, Core, State


@dataclass(frozen=True)
class Settings:
    """``heads`` query heads of ``head_dim`` features share ``kv_heads`` key and value heads."""

    width: int = 256
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "eager") -> Tensor:
    """Causal ``softmax(q K^T / sqrt(Dk)) V``; the queries are those of the last T of S tokens
    (arXiv 1706.03762, eq. 1; grouped heads: arXiv 2305.13245).

    Args:
        q: ``[B, T, H, Dk]``.
        k: ``[B, S, G, Dk]``, S at least T, H a multiple of G.
        v: ``[B, S, G, Dv]``.
        backend: "eager" (torch's choice of kernel), "flash", "cudnn", "efficient" (these and no other; the
            first two take half precision on a GPU, the last two nothing but a GPU) or "reference".

    Returns:
        The output ``[B, T, H, Dv]``.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
    """
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend is {backend!r}; softmax_attention has {', '.join(IMPLEMENTATIONS)}")
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q is {list(q.shape)}; it must be [B, T, H, Dk], none of them 0")
    batch, seq, heads, key_dim = q.shape
    fits = (
        k.ndim == v.ndim == 4 and (k.shape[0], k.shape[3]) == (batch, key_dim) and k.shape[:3] == v.shape[:3]
    )
    if not fits or k.shape[1] < seq or k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(
            f"k is {list(k.shape)}, v {list(v.shape)}; for q {list(q.shape)} they must be "
            f"[{batch}, S, G, {key_dim}] and [{batch}, S, G, Dv], S at least {seq} and G a divisor of {heads}"
        )
    return IMPLEMENTATIONS[backend](q, k, v)


class SoftmaxAttention(SequenceLayer):
    """Projections, causal softmax attention over all tokens so far, and a projection back to the width.

    Tokens carry no positions but their order: add rotary embeddings outside if a model needs them.
    """

    Settings: TypeAlias = Settings
    sizes: ClassVar = {"laptop": Settings(), "paper": Settings(width=512, heads=8, kv_heads=8)}
    backends = tuple(IMPLEMENTATIONS)
    half_backends = ("flash", "cudnn")

    @classmethod
    def best_backend(cls, device: str, dtype: str) -> str:
        """On a GPU a kernel by name, so that the table says which one it was.

        Not cuDNN's, which may be faster on whole sequences: it plans anew for each length, so for each token
        that is decoded.
        """
        if device == "cpu":
            return "eager"
        return "flash" if dtype in ("bfloat16", "float16") else "efficient"

    def __init__(self, settings: Settings, backend: str = "eager") -> None:
        super().__init__(settings, backend)
        width, head_dim = settings.width, settings.head_dim
        self.query = nn.Linear(width, settings.heads * head_dim, bias=False)
        self.key = nn.Linear(width, settings.kv_heads * head_dim, bias=False)
        self.value = nn.Linear(width, settings.kv_heads * head_dim, bias=False)
        self.out = nn.Linear(settings.heads * head_dim, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        """An empty cache for ``batch_size`` sequences, on the parameters' device."""
        shape = (batch_size, self.settings.kv_heads, 0, self.settings.head_dim)
        return State(self.out.weight.new_empty(shape), self.out.weight.new_empty(shape), 0)

    def state_from(self, tensors: dict[str, Tensor]) -> State:
        """The cache that `State.tensors` took apart."""
        keys, values = (tensors[name].to(self.out.weight.device) for name in ("keys", "values"))
        return State(keys, values, keys.shape[2], [keys.shape[2]])

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            ValueError: ``x`` is not ``[B, T, D]``, or ``state`` is of another number of sequences.
        """
        self.check_input(x)
        if state is None:
            state = self.init_state(x.shape[0])
        sequences = state.key_buffer.shape[0]
        if sequences != x.shape[0]:
            raise ValueError(f"state is of {sequences} sequences, x of {x.shape[0]}; give one a row")

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.settings.head_dim))

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        with phase("cache"):
            state = state.append(key.transpose(1, 2), value.transpose(1, 2))
        keys, values = state.keys.transpose(1, 2), state.values.transpose(1, 2)
        with phase("attention"):
            output = softmax_attention(query, keys, values, backend=self.backend)
        return self.out(output.flatten(-2)), state

    def cost(self, batch: int, seq: int) -> Cost:
        """Projections, and per head a multiply-add a feature for the score and for the read of every key up
        to the query's own. Bytes: weights, x, y and the cache."""
        settings, tokens = self.settings, batch * seq
        pairs = batch * settings.heads * (seq * (seq + 1) // 2)
        cache = 2 * tokens * settings.kv_heads * settings.head_dim
        projections = linear_flops(self.query, self.key, self.value, self.out)
        return Cost(
            flops=tokens * projections + 4 * settings.head_dim * pairs,
            bytes=parameter_bytes(self) + 4 * (2 * tokens * settings.width + cache),
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


LAYER = SoftmaxAttention
