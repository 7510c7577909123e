"""What names a folder or file."""

from __future__ import annotations

from pathlib import Path

PathLike = str | Path
