"""The code that the authors of FwPKM published (arXiv 2601.00671), from the user's own clone of it.

Shapes: B sequences, T tokens, D model width, H heads, n sub-keys per half, h = key_dim / 2, k = top-k.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..contract import Cost, detached, require_positive, tensor_bytes
from ..fwpkm import FwPKM
from . import AUTHORS_FILE, AUTHORS_PATH
from .base import FwPKMSizes, PeerLayer, check_batch

PACKAGE = "_fwpkm_of_the_authors"
GATES = 8  # outputs whose mean is the gate's logit


@dataclass(frozen=True, kw_only=True)
class Settings(FwPKMSizes):
    """The sizes of ``fwpkm``; theirs is one memory for all sequences of a batch, and it drops the pairs
    that cross a chunk's end (our ``scope="shared"`` and ``boundary="drop"``)."""

    heads: int = 1
    lookahead: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "heads")
        if not 0 <= self.lookahead < self.chunk_size:
            raise ValueError(
                f"lookahead must be from 0 to below chunk_size ({self.chunk_size}), got {self.lookahead}"
            )


@dataclass
class State:
    """The fast weights, whole, after ``tokens`` tokens a sequence: ``keys [2*H*n, h]``,
    ``values [n*n, value_dim]``, shared by ``batch_size`` sequences."""

    keys: Tensor
    values: Tensor
    batch_size: int
    tokens: int

    def nbytes(self) -> int:
        """The bytes of both tables."""
        return tensor_bytes(self.keys, self.values)

    def tensors(self) -> dict[str, Tensor]:
        """Both tables."""
        return {"keys": self.keys, "values": self.values}

    def detach(self) -> "State":
        """The same state; they never let a gradient pass from call to call."""
        return detached(self)


class AuthorsFwPKM(PeerLayer):
    """Their ``FastWeightProductKeyMemory`` between the projections of the paper.

    A state goes on at chunk ends alone: what they do with tokens one at a time depends on the cuts.
    Whether gradients are wanted decides their ``training``, without which they keep no second-order graph.
    """

    Settings: TypeAlias = Settings
    sizes: ClassVar = {
        "laptop": Settings(width=256, key_dim=256, value_dim=256),
        "paper": Settings(),
    }
    peer = "peer:authors-fwpkm"

    def __init__(self, settings: Settings, backend: str = "theirs") -> None:
        super().__init__(settings, backend)
        width, value_dim = settings.width, settings.value_dim
        self.query_norm = nn.RMSNorm(width)
        self.value_norm = nn.RMSNorm(width)
        self.gate_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, settings.heads * settings.key_dim, bias=False)
        self.value = nn.Linear(width, value_dim, bias=False)
        self.gate = nn.Linear(width, GATES)
        self.output_norm = nn.RMSNorm(value_dim)
        self.output = nn.Linear(value_dim, width, bias=False)
        self.memory: Any = load(Path(os.environ[AUTHORS_PATH]).expanduser()).FastWeightProductKeyMemory(
            mem_k_dim=settings.key_dim,
            mem_v_dim=value_dim,
            mem_heads=settings.heads,
            mem_topk=settings.topk,
            mem_n_subkeys=settings.n_subkeys,
            lookahead=settings.lookahead,
            learning_rate=settings.learning_rate,
            addr_loss_weight=settings.addressing_weight,
        )
        self.memory.reset_parameters()

    def init_state(self, batch_size: int) -> State:
        """The initial tables, which no call changes."""
        return State(self.memory.keys, self.memory.values, batch_size, 0)

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """``x [B, T, D]`` to ``y [B, T, D]`` and the state to go on with.

        Raises:
            NotImplementedError: ``state`` ends within a chunk, or the last chunk of ``x`` is no longer than
                the lookahead, for which their code yields NaN.
        """
        self.check_input(x)
        state = self.init_state(len(x)) if state is None else state
        check_batch(state.batch_size, len(x))
        chunk, lookahead = self.settings.chunk_size, self.settings.lookahead
        if state.tokens % chunk:
            raise NotImplementedError(
                f"{self.peer} goes on at the ends of its chunks alone: "
                f"after {state.tokens} tokens it is within a chunk of {chunk}"
            )
        if 0 < x.shape[1] % chunk <= lookahead:
            raise NotImplementedError(
                f"{self.peer} makes NaN of a last chunk of {x.shape[1] % chunk} tokens; "
                f"it must be longer than the lookahead, {lookahead}"
            )
        query = self.query(self.query_norm(x))
        value = self.value(self.value_norm(x))
        value = (value - value.mean(-1, keepdim=True)) / (value.std(-1, keepdim=True) + 1e-6)
        gate = self.gate(self.gate_norm(x)).mean(-1).sigmoid()
        retrieved, state = self._remember(query, value, gate, state)
        mixed = torch.lerp(value, retrieved, gate.unsqueeze(-1))
        return self.output(self.output_norm(mixed)), state

    def _remember(self, query: Tensor, value: Tensor, gate: Tensor, state: State) -> tuple[Tensor, State]:
        """Their forward pass, begun from ``state`` and ended in tables of its own."""
        begin = {"keys": state.keys, "values": state.values}
        # They differentiate the fast weights in inference too.
        begin = {n: (t if t.requires_grad else t.detach().requires_grad_()).float() for n, t in begin.items()}
        end = {"keys": torch.empty_like(state.keys), "values": torch.empty_like(state.values)}
        end = {n: t.detach() for n, t in end.items()}
        self.memory.get_fw_named_params = lambda: begin
        self.memory.train(torch.is_grad_enabled())
        arguments = {"q": query, "ref_v": value, "gates": gate, "chunk_size": self.settings.chunk_size}
        out = functional_call(self.memory, end, (), arguments)
        del self.memory.get_fw_named_params
        after = State(end["keys"], end["values"], state.batch_size, state.tokens + query.shape[1])
        return out["output"], after

    def cost(self, batch: int, seq: int) -> Cost:
        """What ``fwpkm`` of these sizes must do."""
        with torch.device("meta"):
            ours = FwPKM(FwPKM.Settings(**vars(self.settings)))
        return ours.cost(batch, seq)


def load(root: Path) -> ModuleType:
    """Their module from the clone ``root``; on a CPU with a gradient that needs no Triton.

    Raises:
        NotImplementedError: it fails to import.
    """
    name = f"{PACKAGE}.{AUTHORS_FILE.stem}"
    if name not in sys.modules:
        package = ModuleType(PACKAGE)
        package.__path__ = [str((root / AUTHORS_FILE).parent)]
        sys.modules[PACKAGE] = package
        try:
            wrapper: Any = importlib.import_module(f"{PACKAGE}.xformer_embeddingbag_grad_wrapper")
            module = importlib.import_module(name)
        except ImportError as error:
            raise NotImplementedError(f"{root / AUTHORS_FILE} fails to import: {error}") from error
        triton_backward = wrapper.embedding_bag_bw_rev_indices

        def backward(
            slots: Tensor, values: Tensor, weights: Tensor, gradient: Tensor
        ) -> tuple[Tensor, Tensor]:
            chosen = triton_backward if values.is_cuda else embedding_bag_backward
            return chosen(slots, values, weights, gradient)

        wrapper.embedding_bag_bw_rev_indices = backward
        return module
    return sys.modules[name]


def embedding_bag_backward(
    slots: Tensor, values: Tensor, weights: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``sum_j w_tj V[i_tj]`` to V, dense, and to w, ours in place of their Triton kernel.

    ``slots`` and ``weights [N, H*k]``, ``values [n*n, value_dim]``, ``gradient [N, value_dim]``.
    """
    spread = weights.unsqueeze(-1) * gradient.unsqueeze(1)
    to_values = torch.zeros_like(values).index_add_(0, slots.flatten(), spread.flatten(0, 1))
    return to_values, torch.einsum("njd,nd->nj", values[slots], gradient)
