"""Sequence lengths as people write them: ``4k..128k``, ``4k,16k``, ``1k..8k:1k``, ``4k..1m*4``."""

import re

from fwpkm_bench.errors import UsageError

_UNITS = {"": 1, "k": 1024, "m": 1024**2}
_LENGTH = re.compile(r"([0-9]{1,15})([km]?)", re.IGNORECASE)
_RANGE = re.compile(r"(?P<first>[^.:*]+)\.\.(?P<last>[^.:*]+)(?:(?P<kind>[:*])(?P<step>[^.:*]+))?")
_FORMS = "write 4096, 4k, 4k..128k (doubling), 1k..8k:1k (step) or 4k..1m*4 (factor)"
LONGEST = 2**32
_MOST = 10_000  # lengths in one range


def parse_lengths(text: str) -> tuple[int, ...]:
    """The lengths that ``text`` names, ascending, each once (k = 1024, m = 1024^2).

    Raises:
        UsageError: what was wrong, and what would be right.
    """
    lengths: set[int] = set()
    for part in text.split(","):
        lengths.update(_parse_part(part.strip()))
    return tuple(sorted(lengths))


def format_length(length: int) -> str:
    """``4096`` as ``4k``; what is no whole number of k as it is."""
    for unit in ("m", "k"):
        if length >= _UNITS[unit] and length % _UNITS[unit] == 0:
            return f"{length // _UNITS[unit]}{unit}"
    return str(length)


def _parse_part(part: str) -> list[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        return [_parse_length(part)]
    first, last = _parse_length(match["first"]), _parse_length(match["last"])
    if first > last:
        raise UsageError(f"the range {part!r} runs backwards; write {match['last']}..{match['first']}")
    lengths = [first]
    if match["kind"] == ":":
        step = _parse_length(match["step"])
        lengths = list(range(first, min(last, first + step * _MOST) + 1, step))
    else:
        factor = 2 if match["step"] is None else _parse_factor(match["step"], part)
        while lengths[-1] * factor <= last:
            lengths.append(lengths[-1] * factor)
    if len(lengths) > _MOST:
        raise UsageError(f"the range {part!r} has more than {_MOST} lengths; take a larger step")
    return lengths


def _parse_length(text: str) -> int:
    match = _LENGTH.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text.strip()!r} is not a sequence length; {_FORMS}")
    length = int(match[1]) * _UNITS[match[2].lower()]
    if length < 1:
        raise UsageError(f"the sequence length {text.strip()!r} must be at least 1; {_FORMS}")
    if length > LONGEST:
        raise UsageError(f"the sequence length {text.strip()!r} is beyond {format_length(LONGEST)}")
    return length


def _parse_factor(text: str, part: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 2:
        raise UsageError(f"the factor {text!r} in {part!r} must be a whole number of at least 2; {_FORMS}")
    return int(text)
