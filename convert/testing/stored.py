"""What the weight files of a checkpoint hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Return every stored tensor by name."""
    from safetensors.torch import load_file

    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def moved(before: Path, after: Path) -> set[str]:
    """Return the tensors that two checkpoints of the same tensors do not store alike."""
    import torch

    a, b = tensors_of(before), tensors_of(after)
    assert set(a) == set(b)
    return {name for name in a if not torch.equal(a[name], b[name])}
