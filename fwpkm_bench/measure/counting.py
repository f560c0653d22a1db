"""What the operators of a call compute and move, by phase.

Bytes are those that operators read and write: each input once, each output once, and of a table that is
looked up or scattered into only the rows that are touched. This is what the implementation moves between
operators, caches or not; the least that the algorithm must move is `Cost` of a layer. Operations are those of
matrix products, attention and table sums by formula, and one for each element of an elementwise operator or a
reduction; comparisons, sorts and copies count none. Kernels of Triton's are invisible here but for their
launches.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
FREE = ALLOCATES | {"_unsafe_view", "lift_fresh", "resize_", "set_", "_has_compatible_shallow_copy_type"}
LIKE = {f"{kind}_like" for kind in ("zeros", "ones", "full", "rand", "randn")}
LIKE |= {"new_zeros", "new_ones", "new_full"}  # of the first argument they look at the shape alone
OVERWRITES = {"fill_", "zero_", "copy_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
COPIES = {"copy_", "clone", "_to_copy", "fill_", "zero_", "where", "masked_fill", "fill", "contiguous"}
LOOKUPS = {"index_select", "index", "gather", "embedding", "take"}  # the first argument is the table
SCATTERS = {"index_add_": 2, "index_copy_": 1, "scatter_": 1, "scatter_add_": 2, "index_put_": 1}
REDUCTIONS = {  # operations an element of the input
    **dict.fromkeys(("sum", "mean", "cumsum", "prod", "logsumexp"), 1),
    **dict.fromkeys(("linalg_vector_norm", "norm"), 2),
    **dict.fromkeys(("_softmax", "_log_softmax", "var", "std", "var_mean", "_softmax_backward_data"), 3),
}
ATTENTION_ON_CPU = "_scaled_dot_product_flash_attention_for_cpu"


@dataclass
class Counts:
    """Of a phase: operators called, what they compute and move, and launches of Triton kernels."""

    operators: int = 0
    flops: int = 0
    bytes: int = 0
    launches: int = 0


class OperatorCounter(TorchDispatchMode):
    """A context manager that books every operator on the phase that ``current()`` names."""

    def __init__(self, current: Callable[[], str]) -> None:
        super().__init__()
        self.phases: dict[str, Counts] = defaultdict(Counts)
        self._current = current
        self._patches = ExitStack()

    def __enter__(self) -> "OperatorCounter":
        for kernel in _triton_kernels():
            self._patches.enter_context(mock.patch.object(kernel, "run", self._launch_of(kernel.run)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patches.close()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        counts = self.phases[self._current()]
        counts.operators += 1
        if not _is_view(func):
            counts.bytes += moved_bytes(func, args, kwargs, out)
            counts.flops += flops(func, args, kwargs, out)
        return out

    def _launch_of(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.phases[self._current()].launches += 1
            return run(*args, **kwargs)

        return launch


def _triton_kernels() -> Iterator[Any]:
    """The classes of Triton whose ``run`` launches a kernel; none where it is not installed."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    yield from (JITFunction, InterpretedFunction)


def moved_bytes(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that the operator ``func`` reads and writes in this call."""
    name = _name(func)
    if name in FREE:
        return 0
    if name in LIKE:
        return _span(*_tensors(out))
    if name in LOOKUPS:
        return _span(*_tensors(args[1:])) + 2 * _span(*_tensors(out))
    if name.startswith("_embedding_bag"):
        return _bag_bytes(name, args, out)
    if name in SCATTERS:
        source = args[-1] if name != "index_put_" else args[2]
        touched = _touched(name, args) * args[0].element_size()
        accesses = 2 if name == "index_put_" and len(args) > 3 and args[3] else SCATTERS[name]
        read = _tensors((args[1:3], source))
        return _span(*read) + accesses * touched
    written, read = _by_use(func, args, kwargs)
    if name in OVERWRITES:
        written_alone, both = written, []
    else:
        written_alone, both = [t for t in written if id(t) in _out_ids(kwargs)], written
        both = [t for t in both if id(t) not in _out_ids(kwargs)]
    known = {id(t) for t in written}
    fresh = [t for t in _tensors(out) if id(t) not in known]
    return _span(*_tensors(read)) + _span(*written_alone) + 2 * _span(*both) + _span(*fresh)


def _bag_bytes(name: str, args: tuple[Any, ...], out: Any) -> int:
    """A bag reads the rows of its indices; its backward passes read or add to as many."""
    if name in ("_embedding_bag", "_embedding_bag_forward_only"):
        table, indices = args[0], args[1]
        rows = indices.numel() * table.shape[1] * table.element_size()
        return rows + _span(*_tensors((args[1:], out)))
    if "per_sample_weights" in name:
        grad, table, indices = args[:3]
        rows = indices.numel() * table.shape[1] * table.element_size()
        return 2 * rows + _span(indices, *_tensors(args[3:])) + _span(*_tensors(out))
    grad, indices = args[:2]
    rows = indices.numel() * grad.shape[1] * grad.element_size()
    return 3 * rows + _span(*_tensors((args[1:], out)))


def _touched(name: str, args: tuple[Any, ...]) -> int:
    """Elements of the table ``args[0]`` that a scatter writes."""
    if name == "index_put_":
        table, indices, values = args[:3]
        if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return int(values.numel())
        shape = torch.broadcast_shapes(*(i.shape for i in indices if i is not None))
        rest = [n for i, n in enumerate(table.shape) if i >= len(indices) or indices[i] is None]
        return math.prod(shape) * math.prod(rest)
    if name in ("scatter_", "scatter_add_"):
        return int(args[2].numel())
    return int(args[3].numel())


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Operations on numbers with a fraction that the operator ``func`` does in this call."""
    name = _name(func)
    if "scaled_dot_product" in name:
        return _attention_flops(name, args, kwargs)
    if (formula := flop_registry.get(func._overloadpacket)) is not None:
        return int(formula(*args, **kwargs, out_val=out))
    results = [t for t in _tensors(out) if t.is_floating_point()]
    if not results or name in COPIES:
        return 0
    if name.startswith("_embedding_bag"):
        indices = args[2] if "per_sample_weights" in name else args[1]
        return 2 * indices.numel() * args[0].shape[-1]
    if name == "linalg_solve_triangular":
        return args[0].shape[-1] * out.numel()
    if name in ("index_add", "index_add_", "scatter_add", "scatter_add_"):
        return int(args[3].numel())
    if name in REDUCTIONS:
        return REDUCTIONS[name] * int(args[0].numel())
    return results[0].numel() if torch.Tag.pointwise in func.tags else 0


def _attention_flops(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Two products of queries and keys forward and five backward; of a causal square one half."""
    back = name.endswith("_backward")
    query, key, value = args[1:4] if back else args[:3]
    pairs = query.shape[-2] * key.shape[-2]
    if query.shape[-2] == key.shape[-2] and (any(a is True for a in args) or kwargs.get("is_causal")):
        pairs = pairs // 2
    features = query.shape[-1] + value.shape[-1]
    if back:
        features = 3 * query.shape[-1] + 2 * value.shape[-1]
    return int(2 * math.prod(query.shape[:-2]) * pairs * features)


@functools.cache
def _name(func: Any) -> str:
    return str(func._overloadpacket.__name__)


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether what ``func`` returns is an argument seen in another way."""
    aliases = [r.alias_info for r in func._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _by_use(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors among the arguments that ``func`` writes, and those that it only reads."""
    written: list[Tensor] = []
    read: list[Tensor] = []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    for argument in func._schema.arguments:
        if argument.name in given:
            into = written if argument.alias_info is not None and argument.alias_info.is_write else read
            into += _tensors(given[argument.name])
    return written, read


def _out_ids(kwargs: dict[str, Any]) -> set[int]:
    return {id(t) for t in _tensors(kwargs.get("out"))}


def _tensors(tree: Any) -> list[Tensor]:
    """The distinct tensors anywhere in ``tree``."""
    return list({id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}.values())


def _span(*tensors: Tensor) -> int:
    """Bytes of the elements of ``tensors``; what `expand` repeats counts once."""
    total = 0
    for tensor in tensors:
        if tensor.layout == torch.strided:
            sizes = (n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s or not n)
            total += math.prod(sizes) * tensor.element_size()
    return total
