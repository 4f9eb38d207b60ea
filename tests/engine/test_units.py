"""Sizes, times and rates are parsed and formatted as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.units import format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0), ("1048576", 1 << 20), ("16GiB", 16 << 30), ("16 gib", 16 << 30), ("512M", 512 << 20),
        ("512MiB", 512 << 20), ("2GB", 2 * 10**9), ("1.5k", 1536), ("3TB", 3 * 10**12), ("1T", 1 << 40),
        ("7b", 7), (" 2 KB ", 2000), ("0.5GiB", 1 << 29),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "1.2.3", "5 apples", "1e9", "0x10", "1,000", "16GiBs", "nan", "inf"]
)
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="16GiB"):
        parse_bytes(text)


@given(st.integers(0, 1 << 50))
def test_shown_sizes_are_read_back_within_their_digits(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.006)


@given(st.integers(0, 1023), st.sampled_from(["B", "KiB", "MiB", "GiB", "TiB"]))
def test_whole_sizes_are_read_back_exactly(count: int, unit: str) -> None:
    assert parse_bytes(format_bytes(parse_bytes(f"{count}{unit}"))) == parse_bytes(f"{count}{unit}")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (1 << 20, "1.00 MiB"),
        (40 << 30, "40.0 GiB"),
        (300 << 40, "300 TiB"),
    ],
)
def test_shown_sizes(count: int, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.85, "850 ms"),
        (12.34, "12.3 s"),
        (59.9, "59.9 s"),
        (60, "1:00"),
        (245, "4:05"),
        (7390, "2:03:10"),
    ],
)
def test_shown_times(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(1234.4, "1,234 token/s"), (31.41, "31.4 token/s"), (3.141, "3.14 token/s")]
)
def test_shown_rates(rate: float, text: str) -> None:
    assert format_rate(rate, "token") == text
