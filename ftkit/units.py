"""Bytes, counts and seconds to text and back; the only place where numbers become words."""

from __future__ import annotations

import re

from ftkit.errors import RecipeError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def bytes_text(size_bytes: float) -> str:
    """`9_663_676_416` → `9.00 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= unit * 0.99995:  # what rounds to the next unit is told in it
            return f"{size_bytes / unit:.2f} {name}" if unit == GIB else f"{size_bytes / unit:.1f} {name}"
    return f"{size_bytes:.0f} B"


def count_text(count: float) -> str:
    """`134_515_008` → `134.5 M`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f}"


def seconds_text(seconds: float) -> str:
    """`754.2` → `12 min 34 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def spanned_text(low: float, high: float, least_high: float | None = None) -> str:
    """A range of seconds: `4320, 9000` → `1.2 to 2.5 hours`, two digits of each. In a list by the unit of its least."""
    units = ((86400, "days"), (3600, "hours"), (60, "minutes"))
    unit, name = next((found for found in units if (high if least_high is None else least_high) >= found[0]), (1, "seconds"))
    return f"{_two_digits(low / unit)} to {_two_digits(high / unit)} {name}"


def _two_digits(number: float) -> str:
    return f"{number:.2g}" if number < 0.995 else f"{number:.1f}" if number < 9.95 else f"{float(f'{number:.2g}'):.0f}"


def parse_vram(text: str) -> int:
    """Bytes of `24`, `24GB`, `24 GiB` or `800MiB`.

    Cards sold as "24 GB" carry 24 GiB, so GB and GiB both mean 2**30 bytes here.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(g|gb|gib|m|mb|mib)?\s*", text, re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise RecipeError(f"`{text}` is no amount of memory.", "give it in GiB, as in --vram 24")
    return int(float(match[1]) * (MIB if (match[2] or "g").lower().startswith("m") else GIB))
