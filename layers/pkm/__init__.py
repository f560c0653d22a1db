"""Static product key memory: a large table, learned in training and read sparsely (arXiv 1907.05242).

Shapes: B sequences, T tokens, D model width, N tokens of all sequences, H heads, n sub-keys per half of
h = key_dim / 2 features each, k = top-k.
"""

from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwpkm_bench.kernels.precision import full_precision

from ..contract import Cost, SequenceLayer, linear_flops, parameter_bytes, require_positive
from . import eager
from .core import IMPLEMENTATIONS, Core, State, draw_tables

SEGMENT = {"cpu": 2048, "cuda": 16384}  # tokens at a time where no gradient is wanted: bounds the memory


@dataclass(frozen=True)
class Settings:
    """``heads`` heads, each with its own ``2 * n_subkeys`` sub-keys and its own ``topk`` reads from one table
    of ``n_subkeys**2`` values; ``key_dim`` is that of one head's query, two halves together.
    ``sparse_grad`` gives the table a sparse gradient, for ``torch.optim.SparseAdam``."""

    width: int = 256
    heads: int = 4
    n_subkeys: int = 512
    topk: int = 32
    key_dim: int = 128
    value_dim: int = 256
    sparse_grad: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "width", "heads", "n_subkeys", "topk", "key_dim", "value_dim")
        if self.topk > self.n_subkeys:
            raise ValueError(f"topk must be at most n_subkeys, got {self.topk} and {self.n_subkeys}")
        if self.key_dim % 2:
            raise ValueError(
                f"key_dim must be even, two halves, got {self.key_dim}; {self.key_dim + 1} would do"
            )


def pkm(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    topk: int,
    backend: str = "eager",
    sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Read the best ``topk`` of n*n slots for each token and head; heads are summed (arXiv 1907.05242,
    section 3.2; dot-product scores, softmax per head).

    Args:
        query: ``[N, H, 2 * h]``.
        keys: ``[H, 2, n, h]``.
        values: ``[n*n, value_dim]``; slot ``i1 * n + i2`` belongs to sub-keys i1 and i2 of the two halves.
        topk: slots read per token and head, at most n.
        backend: "eager", "triton" or "reference".
        sparse_grad: give ``values`` a sparse gradient of the rows that were read, for
            ``torch.optim.SparseAdam``; of backend "eager" alone.

    Returns:
        The output ``[N, value_dim]`` in the type of ``values``, the slots ``[N, H, k]`` int64, best first,
        and their weights in the type of ``query``. Scores are float32 at least.

    Raises:
        ValueError: shapes that do not fit each other, ``topk`` beyond n, or an unknown backend.
    """
    if backend not in IMPLEMENTATIONS:
        raise ValueError(f"backend is {backend!r}; pkm has {', '.join(IMPLEMENTATIONS)}")
    if keys.ndim != 4 or keys.shape[1] != 2:
        raise ValueError(f"keys is {list(keys.shape)}; it must be [H, 2, n, h]")
    heads, _, n, half = keys.shape
    if query.ndim != 3 or query.shape[1:] != (heads, 2 * half):
        raise ValueError(
            f"query is {list(query.shape)}; for keys {list(keys.shape)} it must be [N, {heads}, {2 * half}]"
        )
    if values.ndim != 2 or values.shape[0] != n * n:
        raise ValueError(f"values is {list(values.shape)}; for {n} sub-keys it must be [{n * n}, value_dim]")
    if not 1 <= topk <= n:
        raise ValueError(f"topk must be at least 1 and at most the number of sub-keys, got {topk} and {n}")
    if sparse_grad and backend != "eager":
        raise ValueError(f"sparse_grad is of backend 'eager' alone, got backend {backend!r}")
    with full_precision(query.device.type):
        if sparse_grad:
            return eager.pkm(query, keys, values, topk, sparse_grad=True)
        return IMPLEMENTATIONS[backend](query, keys, values, topk)


class ProductKeyMemory(SequenceLayer):
    """Queries ``norm(W_q x)`` per head, the read, and ``W_o (read * silu(W_s x))`` as in "memory layers at
    scale" (arXiv 2412.09764)."""

    Settings: TypeAlias = Settings
    sizes: ClassVar = {"laptop": Settings(), "paper": Settings(width=512, key_dim=512, value_dim=512)}
    backends = tuple(IMPLEMENTATIONS)

    def __init__(self, settings: Settings, backend: str = "eager") -> None:
        super().__init__(settings, backend)
        width, value_dim = settings.width, settings.value_dim
        self.query = nn.Linear(width, settings.heads * settings.key_dim, bias=False)
        self.query_norm = nn.RMSNorm(settings.key_dim, eps=1e-6)
        keys, values = draw_tables(settings.heads, settings.n_subkeys, settings.key_dim, value_dim)
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)
        self.swish = nn.Linear(width, value_dim, bias=False)
        self.out = nn.Linear(value_dim, width, bias=False)

    def init_state(self, batch_size: int) -> State:
        """A state of no bytes: each token is read alone."""
        return State(batch_size)

    def state_from(self, tensors: dict[str, Tensor]) -> State:
        """The state that `State.tensors` took apart."""
        return State(int(tensors["batch_size"]))

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            ValueError: ``x`` is not ``[B, T, D]``, or ``state`` is of another number of sequences.
        """
        self.check_input(x)
        if state is None:
            state = self.init_state(x.shape[0])
        if state.batch_size != x.shape[0]:
            raise ValueError(f"state is of {state.batch_size} sequences, x of {x.shape[0]}; give one a row")
        tokens = x.flatten(0, 1)
        if torch.is_grad_enabled():
            return self._piece(tokens).view_as(x), state
        y = torch.empty_like(tokens)
        segment = SEGMENT[tokens.device.type]
        for start in range(0, tokens.shape[0], segment):
            piece = slice(start, start + segment)
            y[piece] = self._piece(tokens[piece])
        return y.view_as(x), state

    def _piece(self, tokens: Tensor) -> Tensor:
        query = self.query_norm(self.query(tokens).unflatten(-1, (self.settings.heads, -1)))
        read, _, _ = pkm(
            query,
            self.keys,
            self.values,
            topk=self.settings.topk,
            backend=self.backend,
            sparse_grad=self.settings.sparse_grad,
        )
        return self.out(read * F.silu(self.swish(tokens)))

    def cost(self, batch: int, seq: int) -> Cost:
        """Projections, a multiply-add a feature for the score of each sub-key and for each value read, and
        per head k*k additions at the most for the slots' scores. Bytes: weights, x, y and the values read,
        counted as if no two reads shared a slot until the table is spent."""
        settings, tokens = self.settings, batch * seq
        reads = tokens * settings.heads * settings.topk
        scores = settings.heads * settings.n_subkeys * 2 * settings.key_dim
        memory = scores + settings.heads * (settings.topk**2 + 2 * settings.topk * settings.value_dim)
        values_read = min(reads, settings.n_subkeys**2) * settings.value_dim
        weights = parameter_bytes(self) - 4 * self.values.numel()
        return Cost(
            flops=tokens * (linear_flops(self.query, self.swish, self.out) + memory),
            bytes=weights + 4 * (2 * tokens * settings.width + values_read),
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
        """A table of the settings' heads, sub-keys and top-k, drawn with ``generator`` on its device.

        Raises:
            ValueError: an odd ``key_dim``, or an unknown backend.
        """
        if key_dim % 2:
            raise ValueError(f"key_dim must be even, two halves, got {key_dim}; {key_dim + 1} would do")
        keys, values = draw_tables(
            settings.heads, settings.n_subkeys, key_dim, value_dim, generator=generator
        )
        return Core(keys, values, topk=settings.topk, backend=backend)


LAYER = ProductKeyMemory
