"""The recipes that come with adaconvert, by name such as "upcycle/smollm2-135m"."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import Final

SUFFIX: Final = ".yaml"


def root() -> Path:
    """Return the folder they lie in."""
    return Path(str(files("adaconvert.recipes")))


def names() -> list[str]:
    """Return the name of each, sorted."""
    top = root()
    return sorted(
        str(path.relative_to(top).with_suffix("").as_posix()) for path in top.glob(f"*/*{SUFFIX}")
    )


def find(name: str) -> Path | None:
    """Return the file of a shipped recipe, None when there is none of this name."""
    wanted = name.removesuffix(SUFFIX).removeprefix("recipes/")
    return root() / f"{wanted}{SUFFIX}" if wanted in names() else None


def name_of(path: Path) -> str | None:
    """Return the name of a shipped recipe by its file, None for any other file."""
    try:
        inner = Path(os.path.realpath(path)).relative_to(os.path.realpath(root()))
    except ValueError:
        return None
    return inner.with_suffix("").as_posix()
