"""The code an adaptive checkpoint carries, so that it loads where adaconvert is not installed."""

from __future__ import annotations

from adaconvert.modeling.loading import CODE_FILES, code_folder


def code_files() -> dict[str, bytes]:
    """Return the installed runtime's files by name; each imports torch, transformers and its
    neighbours, nothing else."""
    return {name: (code_folder() / name).read_bytes() for name in CODE_FILES}
