"""What several commands read from the command line."""

import re
import signal
from typing import Any

import click

from fwpkm_bench.errors import UsageError

LONGEST_S = 7 * 24 * 3600


def names(_ctx: click.Context, _option: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    """``a,b`` as two names."""
    return None if value is None else tuple(v.strip() for v in value.split(",") if v.strip())


def numbers(ctx: click.Context, option: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """``1,8`` as two numbers."""
    found = names(ctx, option, value)
    if found is None:
        return None
    bad = [n for n in found if not (n.isascii() and n.isdecimal() and int(n) < 2**63)]
    if bad:
        raise UsageError(f"--{option.name} takes whole numbers such as 1,8; {bad[0]!r} is none")
    return tuple(int(n) for n in found)


def seconds(_ctx: click.Context, option: click.Parameter, value: str) -> float:
    """``90``, ``90s`` or ``1.5m`` in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", value.strip())
    found = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < found <= LONGEST_S:
        raise UsageError(f"--{option.name} takes a time such as 90s or 5m, above 0; {value!r} is none")
    return found


def interrupt_on(number: int) -> None:
    """Let the signal ``number`` end a command as Ctrl-C does."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(number, interrupt)
