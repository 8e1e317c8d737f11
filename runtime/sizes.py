"""Sizes in words. Pure."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30
_DIGITS = 9  # after the point: a byte of a GiB shows


def size(count: int) -> str:
    """12884901888 -> "12.0 GiB"; below 1 GiB in MiB."""
    return f"{count / MIB:.0f} MiB" if count < GIB else f"{count / GIB:.1f} GiB"


def sizes_apart(first: int, second: int) -> tuple[str, str]:
    """Two sizes that are compared, with as many digits as it takes for them to differ.

    Example: 2147483648 and 2148532224 -> "2.000 GiB", "2.001 GiB".
    """
    if first == second or size(first) != size(second):
        return size(first), size(second)
    unit, name = (MIB, "MiB") if first < GIB else (GIB, "GiB")
    for digits in range(1, _DIGITS + 1):
        shown = f"{first / unit:.{digits}f}", f"{second / unit:.{digits}f}"
        if shown[0] != shown[1]:
            break
    return f"{shown[0]} {name}", f"{shown[1]} {name}"
