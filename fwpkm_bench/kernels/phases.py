"""Named ranges of a layer's work, for whoever listens: ``address``, ``read``, ``write``, ``keys`` ...

A layer names what it does; a profiler that listens times it. While nobody listens, a range costs a look at
one variable, and torch.compile sees nothing of it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import ParamSpec, Protocol, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Listener(Protocol):
    """Told when a range begins and when the innermost one ends."""

    def push(self, name: str) -> None: ...

    def pop(self) -> None: ...


# One for the process, not for the thread or the context: backward passes run in threads of autograd's own.
_listener: Listener | None = None
_UNHEARD = contextlib.nullcontext()


class _Range:
    """Between its two ends ``listener`` knows of ``name``, whoever listens by then."""

    __slots__ = ("listener", "name")

    def __init__(self, listener: Listener, name: str) -> None:
        self.listener, self.name = listener, name

    def __enter__(self) -> None:
        self.listener.push(self.name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.listener.pop()


def phase(name: str) -> AbstractContextManager[None]:
    """The range ``name``: ``with phase("read"): ...``; a range inside another interrupts it."""
    if _listener is None or torch.compiler.is_compiling():
        return _UNHEARD
    return _Range(_listener, name)


def in_phase(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """A function all of whose work is the range ``name``."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def ranged(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            with phase(name):
                return function(*args, **kwargs)

        return ranged

    return decorate


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let ``listener`` hear of every range until the end of the block."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
