"""Sequence lengths as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwpkm_bench.errors import UsageError
from fwpkm_bench.ranges import format_length, parse_lengths

K = 1024


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("4k..128k", (4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K)),
        ("4k,16k", (4 * K, 16 * K)),
        ("1k..4k:1k", (K, 2 * K, 3 * K, 4 * K)),
        ("4k..1m*4", (4 * K, 16 * K, 64 * K, 256 * K, 1024 * K)),
        ("3..20", (3, 6, 12)),
        ("1M, 77 ,77", (77, K * K)),
        ("5..5", (5,)),
    ],
)
def test_forms(text: str, lengths: tuple[int, ...]) -> None:
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "must be at least 1"),
        ("128k..4k", r"runs backwards; write 4k\.\.128k"),
        ("4x", r"'4x' is not a sequence length; write 4096, 4k"),
        ("", "is not a sequence length"),
        ("4k,,8k", "is not a sequence length"),
        ("-4k", "is not a sequence length"),
        ("4k..", "is not a sequence length"),
        ("1k..8k:0", "must be at least 1"),
        ("1k..8k*1", "must be a whole number of at least 2"),
        ("1k..4k*²", "must be a whole number of at least 2"),
        ("9" * 15, "is beyond 4096m"),
        ("9" * 5000, "is not a sequence length"),
        ("1..1m:1", "has more than 10000 lengths"),
    ],
)
def test_mistakes_are_named(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_lengths(text)


@given(st.integers(1, 2**32))
def test_format_is_read_back(length: int) -> None:
    assert parse_lengths(format_length(length)) == (length,)
