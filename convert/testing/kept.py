"""What autograd keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Kept:
    """Bytes that were kept."""

    total: int = 0


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[Kept]:
    """Count the bytes kept for the backward pass, each storage once, parameters left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # the tensors themselves, so that no address is used again
    kept: dict[int, Tensor] = {}
    found = Kept()

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in weights:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        yield found
    found.total = sum(value.untyped_storage().nbytes() for value in kept.values())
