"""What compiling needs on this machine."""

from __future__ import annotations

import os
import shutil


def has_compiler() -> bool:
    """Return whether torch.compile finds a C++ compiler."""
    return bool(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++"))
