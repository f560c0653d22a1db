"""Static product key memory: its backends, its empty state, and the table alone for the recall workload.

Shapes: B sequences, T pairs, Q queries, H heads, n sub-keys per half, Dk key and Dv value features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import eager, reference


def triton_pkm(query: Tensor, keys: Tensor, values: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """`triton.pkm`, which is imported, Triton with it, when it is first asked for."""
    from . import triton

    return triton.pkm(query, keys, values, topk)


IMPLEMENTATIONS = {"reference": reference.pkm, "eager": eager.pkm, "triton": triton_pkm}


@dataclass
class State:
    """Nothing but the number of sequences: a static memory carries nothing from token to token."""

    batch_size: int

    def nbytes(self) -> int:
        """0."""
        return 0

    def tensors(self) -> dict[str, Tensor]:
        """The number of sequences."""
        return {"batch_size": torch.tensor(self.batch_size)}

    def detach(self) -> "State":
        """The same state."""
        return State(self.batch_size)


def draw_tables(
    heads: int,
    n_subkeys: int,
    key_dim: int,
    value_dim: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Keys ``[H, 2, n, Dk / 2]``, uniform in +-1/sqrt(Dk), and values ``[n*n, Dv]``, normal with
    deviation 1/sqrt(Dv), on ``generator``'s device or else torch's default."""
    device = generator.device if generator is not None else None
    keys = torch.empty(heads, 2, n_subkeys, key_dim // 2, device=device)
    keys.uniform_(-(key_dim**-0.5), key_dim**-0.5, generator=generator)
    values = torch.empty(n_subkeys**2, value_dim, device=device)
    return keys, values.normal_(std=value_dim**-0.5, generator=generator)


class Core:
    """A random table that is never written: what recall comes to without any learning, the control.

    Every head gets the whole query.
    """

    def __init__(self, keys: Tensor, values: Tensor, *, topk: int, backend: str) -> None:
        if backend not in IMPLEMENTATIONS:
            raise ValueError(f"backend is {backend!r}; pkm has {', '.join(IMPLEMENTATIONS)}")
        self.keys = keys
        self.values = values
        self.topk = topk
        self.backend = backend

    def init_state(self) -> State:
        """An empty state."""
        return State(1)

    def write(self, state: State, keys: Tensor, values: Tensor) -> State:
        """Write nothing: the state as it was."""
        return state

    def read(self, state: State, queries: Tensor) -> Tensor:
        """What the table holds for ``queries [Q, Dk]``: ``[Q, Dv]``."""
        queries = queries[:, None].expand(-1, self.keys.shape[0], -1)
        return IMPLEMENTATIONS[self.backend](queries, self.keys, self.values, self.topk)[0]

    def slot_writes(self, state: State) -> Tensor:
        """Zeros ``[n*n]``: no slot is ever written."""
        return torch.zeros(self.values.shape[0], dtype=torch.int64, device=self.values.device)
