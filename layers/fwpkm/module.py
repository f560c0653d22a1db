"""FwPKM as a layer: projections around the memory.

Shapes: B sequences, T tokens, D model width.
"""

from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Cost, SequenceLayer, linear_flops
from . import reference
from .core import FwPKMCore, initial_memory, memory_settings
from .functional import FwPKMOutput, fwpkm, init_state
from .settings import Settings
from .state import EagerState, FwPKMState, ReferenceState

GATES = 8  # outputs whose mean is the gate's logit
SEGMENT = 2048  # tokens at a time where no gradient is wanted


class FwPKM(SequenceLayer):
    """Fast-weight product key memory, a layer that learns while it reads (arXiv 2601.00671).

    ``y, state = FwPKM(Settings(width=512))(x)`` with x and y ``[B, T, D]``; the residual is the caller's.
    The fast weights start from the parameters ``keys`` and ``values`` and live in the state.
    """

    Settings: TypeAlias = Settings
    sizes: ClassVar = {
        "laptop": Settings(width=256, key_dim=256, value_dim=256),
        "paper": Settings(),
    }
    backends = ("reference", "eager")
    memory_core = FwPKMCore

    def __init__(self, settings: Settings | None = None, *, backend: str = "eager") -> None:
        settings = settings or Settings()
        super().__init__(settings, backend)
        width, heads = settings.width, settings.heads
        self.query_norm = nn.RMSNorm(width)
        self.value_norm = nn.RMSNorm(width)
        self.gate_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, heads * settings.key_dim, bias=False)
        self.value = nn.Linear(width, settings.value_dim, bias=False)
        self.gate = nn.Linear(width, GATES)
        self.output_norm = nn.RMSNorm(settings.value_dim)
        self.output = nn.Linear(settings.value_dim, width, bias=False)
        keys, values = initial_memory(settings)
        self.keys = nn.Parameter(keys)
        self.values = nn.Parameter(values)

    def init_state(self, batch_size: int) -> FwPKMState:
        settings = memory_settings(self.settings)
        return init_state(self.keys, self.values, batch_size, settings, self.backend)

    def state_from(self, tensors: dict[str, Tensor]) -> FwPKMState:
        """The state that `FwPKMState.tensors` took apart; the initial table is this layer's ``values``."""
        settings = memory_settings(self.settings)
        if "slots" not in tensors:
            parts = (tensors[name].to(self.keys.device) for name in reference.Memory.__dataclass_fields__)
            return ReferenceState([reference.Memory(*p) for p in zip(*parts, strict=True)], settings)
        state = EagerState(self.keys, self.values, len(tensors["query"]), settings)
        state.fill(tensors)
        return state

    def forward(self, x: Tensor, state: FwPKMState | None = None) -> tuple[Tensor, FwPKMState]:
        """Read ``x [B, T, D]`` and write the memory: ``y [B, T, D]`` and the state to go on with.

        Without gradients a long sequence passes through in segments, whose intermediates stay in the cache.
        """
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or self.settings.boundary == "drop":
            y, out = self.forward_detailed(x, state)
            return y, out.state
        self.check_input(x)
        state = self.init_state(len(x)) if state is None else state
        state.reserve(x.shape[1])
        chunk = self.settings.chunk_size
        y = torch.empty_like(x)
        step = max(1, SEGMENT // chunk) * chunk
        start, stop = 0, step - state.pending_tokens
        while start < x.shape[1]:
            segment, out = self.forward_detailed(x[:, start:stop], state)
            y[:, start:stop] = segment
            state = out.state
            start, stop = stop, stop + step
        return y, state

    def forward_detailed(
        self, x: Tensor, state: FwPKMState | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, FwPKMOutput]:
        """`forward`, with all that the memory returned. ``mask [B, T]``: 0 for tokens not to be learned."""
        self.check_input(x)
        # The three norms of x differ in their weights alone, which move into the projections.
        x = F.rms_norm(x, x.shape[-1:], eps=self.query_norm.eps)
        query = F.linear(x, self.query.weight * self.query_norm.weight)
        value = z_score(F.linear(x, self.value.weight * self.value_norm.weight))
        gate_weight = (self.gate.weight * self.gate_norm.weight).mean(0)
        gate = (F.linear(x, gate_weight.unsqueeze(0)).squeeze(-1) + self.gate.bias.mean()).sigmoid()
        memory = fwpkm
        if torch.compiler.is_compiling():
            from .opaque import fwpkm_opaque

            memory = fwpkm_opaque
        out = memory(
            query,
            value,
            gate,
            self.keys,
            self.values,
            **vars(memory_settings(self.settings)),
            mask=mask,
            state=state,
            backend=self.backend,
        )
        mixed = torch.lerp(value, out.retrieved, gate.unsqueeze(-1))
        return self.output(self.output_norm(mixed)), out

    def cost(self, batch: int, seq: int) -> Cost:
        """Scores of all sub-keys, key gradients of the selected ones, and a multiply-add a feature for each
        row that is read and written. Bytes: a token's rows are fetched and stored back with its chunk."""
        s = self.settings
        tokens = batch * seq
        score = 2 * s.heads * s.n_subkeys * s.key_dim
        key_gradient = 2 * s.heads * s.topk * s.key_dim * bool(s.addressing_weight)
        reads = s.heads * s.topk
        flops = linear_flops(self.query, self.value, self.gate, self.output)
        flops += score + key_gradient + 2 * 2 * reads * s.value_dim
        weights = sum(p.numel() for name, p in self.named_parameters() if name != "values")
        moved = tokens * (2 * s.width + 2 * reads * s.value_dim) + weights
        return Cost(tokens * flops, 4 * moved)


def z_score(value: Tensor) -> Tensor:
    """``(v - mean) / (std + 1e-6)`` over the features, std unbiased."""
    centred = value - value.mean(-1, keepdim=True)
    std = (centred.square().sum(-1, keepdim=True) / (value.shape[-1] - 1)).sqrt()
    return centred / (std + 1e-6)
