"""Tiny models of six blocks, and the same models with blocks skipped by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adaconvert.testing.tiny_models import make

#: blocks of every model here.
BLOCKS = 6


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from the name of a tiny model and config values to its folder."""
    root = tmp_path_factory.mktemp("deep")

    def source(name: str, **values: object) -> Path:
        folder = root / f"{name}-{abs(hash(repr(sorted(values.items()))))}"
        return folder if folder.exists() else make(name, folder, layers=BLOCKS, **values)

    return source


def opened(folder: Path, dtype: str = "float32", **options: Any) -> Any:
    """Return a checkpoint as stock transformers loads it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    made = getattr(transformers, config.architectures[0])
    return made.from_pretrained(folder, dtype=getattr(torch, dtype), **options).eval()


def blocks_of(model: Any) -> nn.ModuleList:
    """Return the list of a model's blocks."""
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers
    ]
    assert len(found) == 1
    return found[0]


def skipping(model: Any, gone: Iterable[int]) -> Any:
    """Return a model whose blocks `gone` give back what they receive."""

    class Same(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            # what backbones ask blocks for
            for name in ("attention_type", "layer_type"):
                if hasattr(block, name):
                    setattr(self, name, getattr(block, name))

        def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
            return hidden_states

    blocks = blocks_of(model)
    for number in gone:
        blocks[number] = Same(blocks[number])
    return model


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Return two texts longer than every window, or two images."""
    generator = torch.Generator().manual_seed(7)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    return {"input_ids": torch.randint(3, 290, (2, 24), generator=generator)}


def logits_of(model: Any) -> torch.Tensor:
    """Return what a model gives for `inputs_of`, without a cache."""
    extra = {"use_cache": False} if model.can_generate() else {}
    with torch.no_grad():
        found: torch.Tensor = model(**inputs_of(model), **extra).logits
    return found
