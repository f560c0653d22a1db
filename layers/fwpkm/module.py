"""FwPKM as a layer: projections around the memory.

Shapes: B sequences, T tokens, D model width.
"""

from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwpkm_bench.kernels.phases import phase
from fwpkm_bench.kernels.precision import wide_type

from ..contract import Cost, SequenceLayer, linear_flops
from . import reference
from .backends import BACKENDS
from .core import FwPKMCore, initial_memory, memory_settings
from .functional import FwPKMOutput, init_state, run_memory
from .overlay import OverlayState
from .settings import Settings
from .state import FwPKMState, ReferenceState

GATES = 8  # outputs whose mean is the gate's logit
SEGMENT = {"cpu": 2048, "cuda": 16384}  # tokens at a time where no gradient is wanted


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
    backends = BACKENDS
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
        self.memory_settings = memory_settings(settings)

    def init_state(self, batch_size: int) -> FwPKMState:
        return init_state(self.keys, self.values, batch_size, self.memory_settings, self.backend)

    def state_from(self, tensors: dict[str, Tensor]) -> FwPKMState:
        """The state that `FwPKMState.tensors` took apart; the initial table is this layer's ``values``."""
        settings = self.memory_settings
        if "slots" not in tensors:
            parts = (tensors[name].to(self.keys.device) for name in reference.Memory.__dataclass_fields__)
            return ReferenceState([reference.Memory(*p) for p in zip(*parts, strict=True)], settings)
        state = OverlayState(self.keys, self.values, len(tensors["query"]), settings, self.backend)
        state.fill(tensors)
        return state

    def forward(self, x: Tensor, state: FwPKMState | None = None) -> tuple[Tensor, FwPKMState]:
        """Read ``x [B, T, D]`` and write the memory: ``y [B, T, D]`` and the state to go on with.

        Without gradients a long sequence passes through in segments, whose intermediates stay in the cache.
        """
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or self.settings.boundary == "drop" or x.shape[1] == 1:
            y, out = self.forward_detailed(x, state)
            return y, out.state
        self.check_input(x)
        state = self.init_state(len(x)) if state is None else state
        state.reserve(x.shape[1])
        chunk = self.settings.chunk_size
        y = torch.empty_like(x)
        step = max(1, SEGMENT[x.device.type] // chunk) * chunk
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
        with phase("projections"):
            x = unit_rms(x)  # once for the three norms, which differ in their weights alone
            query = _project(x, self.query_norm.weight, self.query.weight)
            value = z_score(_project(x, self.value_norm.weight, self.value.weight))
            gate = _project(x, self.gate_norm.weight, self.gate.weight, self.gate.bias).mean(-1).sigmoid()
        memory = run_memory
        if torch.compiler.is_compiling():
            from .opaque import memory_opaque

            memory = memory_opaque
        out = memory(
            query, value, gate, self.keys, self.values, self.memory_settings, mask, state, self.backend
        )
        with phase("projections"):
            mixed = torch.lerp(value, out.retrieved, gate.unsqueeze(-1))
            return _project(unit_rms(mixed), self.output_norm.weight, self.output.weight), out

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


def _project(x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear(x * scale)``; the scale moves into the weight where that is the smaller of the two."""
    if x.numel() <= weight.numel():
        return F.linear(x * scale, weight, bias)
    return F.linear(x, weight * scale, bias)


def unit_rms(x: Tensor) -> Tensor:
    """`torch.nn.RMSNorm` without its weight, in float32 at least; torch's takes twice as long here."""
    wide = x.to(wide_type(x))
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * (mean_square + torch.finfo(wide.dtype).eps).rsqrt()).to(x.dtype)


def z_score(value: Tensor) -> Tensor:
    """``(v - mean) / (std + 1e-6)`` over the features, std unbiased."""
    centred = value - value.mean(-1, keepdim=True)
    std = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) * (value.shape[-1] - 1) ** -0.5
    return centred / (std + 1e-6)
