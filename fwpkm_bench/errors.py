"""The errors that a user can mend, and the nearest name to a wrong one."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Bad input: the message is one line that says what was wrong and what would be right."""


def choose(kind: str, name: str, names: Iterable[str]) -> str:
    """``name`` if it is one of ``names``, else a `UsageError` with the nearest."""
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "there is"
    others = f" ({', '.join(names)})" if near else f" {', '.join(names)}"
    raise UsageError(f"no {kind} is called {name!r}; {hint}{others}")
