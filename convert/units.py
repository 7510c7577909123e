"""Numbers with units, for people."""

from __future__ import annotations


def human_bytes(count: int) -> str:
    """Return a size in decimal units, such as "12.9 GB"."""
    size = float(count)
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{count} bytes" if unit == "bytes" else f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


def human_count(count: int) -> str:
    """Return a count in powers of a thousand, such as "1.35 B"."""
    size = float(count)
    for unit in ("", " K", " M", " B"):
        if size < 1000:
            return f"{size:.4g}{unit}"
        size /= 1000
    return f"{size:.4g} T"
