"""What every layer offers, to a model and to the benchmark.

Shapes: B sequences, T tokens, D model width.

A layer is a folder whose ``__init__.py`` names its class ``LAYER``, a subclass of `SequenceLayer`.
Nothing in here knows of the benchmark.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class State(Protocol):
    """What a layer must carry to go on after the tokens that it has read."""

    def nbytes(self) -> int:
        """The exact size in bytes of what must be carried, not of the buffers that hold it."""
        ...

    def detach(self) -> Self:
        """The same state, cut off from the graph that computed it."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name, for `SequenceLayer.state_from`: to save it or to move it."""
        ...


class MemoryCore(Protocol):
    """The memory of a layer alone, for one sequence, without projections: written, then asked.

    ``write`` returns the state to go on with; the state handed in is used up. Everything is float32, on the
    device of the generator that the core was made with.
    """

    def init_state(self) -> Any:
        """An empty memory."""
        ...

    def write(self, state: Any, keys: Tensor, values: Tensor) -> Any:
        """Write the pairs ``keys [T, key_dim]``, ``values [T, value_dim]`` in order."""
        ...

    def read(self, state: Any, queries: Tensor) -> Tensor:
        """Answer ``queries [Q, key_dim]`` with ``[Q, value_dim]``, writing nothing."""
        ...

    def slot_writes(self, state: Any) -> Tensor | None:
        """How often each slot was written, ``[slots]``, or None for a memory without slots."""
        ...


@dataclass(frozen=True)
class Cost:
    """What one forward pass in float32 must do at the least: ``flops`` operations (a multiply-add is two)
    and ``bytes`` moved (weights, inputs, outputs once; of a memory what each step must fetch and store)."""

    flops: int
    bytes: int


class SequenceLayer(nn.Module):
    """A causal layer: ``y, state = layer(x, state)``, ``x`` and ``y`` of shape ``[B, T, D]``.

    Feeding a sequence in pieces, each with the state of the one before, equals feeding it whole.
    The state handed in is used up by the call; a layer never keeps one itself.
    """

    Settings: ClassVar[Callable[..., Any]]  # a frozen dataclass with defaults; it refuses bad values
    sizes: ClassVar[dict[str, Any]]  # Settings by the name of a size: "laptop" and "paper"
    backends: ClassVar[tuple[str, ...]]  # the implementations, "reference" first
    memory_core: ClassVar[Callable[..., MemoryCore]]  # (settings, key_dim=, value_dim=, backend=, generator=)

    half_backends: ClassVar[tuple[str, ...]] = ()  # those that compute in half precision alone on a GPU

    settings: Any
    backend: str

    def __init__(self, settings: Any, backend: str) -> None:
        super().__init__()
        if backend not in self.backends:
            raise ValueError(f"backend is {backend!r}; {type(self).__name__} has {', '.join(self.backends)}")
        self.settings = settings
        self.backend = backend

    @classmethod
    def best_backend(cls, device: str, dtype: str) -> str:
        """The fastest implementation for ``device`` ("cpu" or "cuda") and ``dtype`` ("float32", ...)."""
        order = ("triton", "eager") if device == "cuda" else ("eager",)
        return next((name for name in order if name in cls.backends), cls.backends[0])

    def init_state(self, batch_size: int) -> Any:
        """The state before the first token of ``batch_size`` sequences."""
        raise NotImplementedError

    def state_from(self, tensors: dict[str, Tensor]) -> Any:
        """The state that `State.tensors` took apart, on the device of this layer."""
        raise NotImplementedError

    def cost(self, batch: int, seq: int) -> Cost:
        """The `Cost` of reading ``batch`` sequences of ``seq`` tokens in float32 from an empty state."""
        raise NotImplementedError

    def check_input(self, x: Tensor) -> None:
        """Refuse an ``x`` that is not ``[B, T, D]`` floating point with B and T at least 1."""
        width = self.settings.width
        if x.ndim != 3 or x.shape[-1] != width or 0 in x.shape or not x.is_floating_point():
            raise ValueError(
                f"x is {list(x.shape)} {x.dtype}; it must be [B, T, {width}] floating point, none of them 0"
            )


def save_state(state: State, path: str | Path) -> None:
    """Write ``state`` to a safetensors file."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in state.tensors().items()}, path)


def load_state(layer: SequenceLayer, path: str | Path) -> Any:
    """The state that `save_state` wrote, for a ``layer`` of the same settings; nothing is unpickled.

    Raises:
        ValueError: the file holds a state of another kind of layer.
    """
    tensors = load_file(path)
    try:
        return layer.state_from(tensors)
    except KeyError as error:
        raise ValueError(f"{path} holds no state of {type(layer).__name__}: it lacks {error}") from None


def require_positive(settings: Any, *names: str) -> None:
    """Refuse a settings field that is not a whole number of at least 1."""
    for name in names:
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def tensor_bytes(*tensors: Tensor | None) -> int:
    """The bytes of the elements of ``tensors`` (views count what they show)."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def parameter_bytes(module: nn.Module) -> int:
    """The bytes of the parameters of ``module`` in float32."""
    return 4 * sum(p.numel() for p in module.parameters())


def detached(state: Any) -> Any:
    """A copy of the dataclass ``state`` whose tensors are detached."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return type(state)(**{k: v.detach() if isinstance(v, Tensor) else v for k, v in fields.items()})


def linear_flops(*layers: nn.Linear) -> int:
    """Operations a token of the projections ``layers``."""
    return sum(2 * math.prod(layer.weight.shape) for layer in layers)


__all__ = [
    "Cost",
    "MemoryCore",
    "SequenceLayer",
    "State",
    "detached",
    "linear_flops",
    "load_state",
    "parameter_bytes",
    "require_positive",
    "save_state",
    "tensor_bytes",
]
