"""Numbers to words and back."""

from __future__ import annotations

import pytest

from ftkit.errors import RecipeError
from ftkit.units import GIB, KIB, MIB, bytes_text, count_text, parse_vram, seconds_text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (KIB - 1, "1023 B"),
        (KIB, "1.0 KiB"),
        (1.5 * MIB, "1.5 MiB"),
        (GIB, "1.00 GiB"),
        (9 * GIB, "9.00 GiB"),
        (2000 * GIB, "2000.00 GiB"),
        (-3 * GIB, "-3.00 GiB"),
    ],
)
def test_bytes_text(size_bytes: float, text: str) -> None:
    assert bytes_text(size_bytes) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (134_515_008, "134.5 M"), (7.24e9, "7.2 B"), (2e12, "2.0 T")],
)
def test_count_text(count: float, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.9, "9.9 s"),
        (10, "10 s"),
        (59.6, "1 min 00 s"),
        (12 * 60 + 34.2, "12 min 34 s"),
        (3600 - 0.3, "1 h 00 min"),
        (2 * 3600 + 5 * 60 + 59, "2 h 05 min"),
    ],
)
def test_seconds_text(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("24", 24 * GIB),
        ("24GB", 24 * GIB),
        (" 24 GiB ", 24 * GIB),
        ("24g", 24 * GIB),
        ("7.5", 7.5 * GIB),
        ("800MiB", 800 * MIB),
        ("800 mb", 800 * MIB),
        ("800m", 800 * MIB),
    ],
)
def test_parse_vram(text: str, size_bytes: float) -> None:
    assert parse_vram(text) == size_bytes


@pytest.mark.parametrize("text", ["", "lots", "0", "0.0 GiB", "-3", "24 TB", "1,5", "24 24", "nan", "inf", "1e3"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(RecipeError, match="no amount of memory") as caught:
        parse_vram(text)
    assert "--vram 24" in str(caught.value.hint)
