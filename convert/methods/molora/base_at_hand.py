"""The base that a stock LoRA names, where it is on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaconvert.arch.adapters import linears
from adaconvert.errors import AdaconvertError
from adaconvert.methods.sources import Described, open_source


def fingerprint_of(item: Described, paths: Sequence[str]) -> str | None:
    """Return the fingerprint of a model over some of its linears; None where it lacks one."""
    from adaconvert.io.fingerprint import of_source

    known = linears(item.spec)
    if not set(paths) <= set(known):
        return None
    return of_source(item.source, {path: known[path].weight for path in paths})


def fingerprint_at(base: str | None, paths: Sequence[str]) -> str | None:
    """Return the fingerprint of the model in a folder over some of its linears.

    Args:
        base: as an adapter names its base.
        paths: of the linears.

    Returns:
        None where no folder is there, or it holds no model that can be read.
    """
    if base is None or not Path(base).is_dir():
        return None
    try:
        return fingerprint_of(open_source(base), paths)
    except (AdaconvertError, OSError):
        return None
