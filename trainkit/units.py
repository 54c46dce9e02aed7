"""Bytes, counts and seconds, parsed and printed in one place."""

from __future__ import annotations

import re

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
_SUFFIX_BYTES = {
    "": 1, "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip


def parse_bytes(text: str | int) -> int:
    """`80GiB`, `80 GB`, `512MiB` or a plain number of bytes. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].lower() not in _SUFFIX_BYTES:
        raise ValueError(f"{text!r} is not a size: write for example 80GiB or 24GB")
    return int(float(match[1]) * _SUFFIX_BYTES[match[2].lower()])


def gib(num_bytes: float) -> float:
    return num_bytes / GIB


def format_bytes(num_bytes: float) -> str:
    """The largest binary unit in which the number is at least 1, with three significant digits."""
    for size, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.3g} {unit}" if num_bytes / size < 999.5 else f"{num_bytes / size:,.0f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(number: float) -> str:
    """12, 1,234, 60.5 M, 1.24 B."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:,.0f}"


def format_seconds(seconds: float) -> str:
    """0.25 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60:02d} min"
