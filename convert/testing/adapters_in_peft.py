"""Tiny models with routed adapters under PEFT, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from adaconvert.adapters import MoloraConfig
from adaconvert.modeling.loading import load_model


def attach(
    base: Path | nn.Module, name: str = "default", *, seed: int | None = 0, **settings: Any
) -> Any:
    """Return a base with adapters, a PeftModel in evaluation mode.

    Args:
        base: folder, or a model that is changed.
        name: of the adapter set.
        seed: every tensor of the adapters is drawn from it; None leaves them as they start.
        settings: of `MoloraConfig`; four adapters of rank 3 on all linears unless they say else.
    """
    model: Any = base if isinstance(base, nn.Module) else load_model(base)
    known = {"target_modules": "all-linear", "num_experts": 4, "r": 3}
    found: Any = get_peft_model(model, MoloraConfig(**{**known, **settings}), adapter_name=name)
    if seed is not None:
        fill(found, name, seed=seed)
    return found.eval()


def fill(model: nn.Module, name: str = "default", *, seed: int = 0) -> None:
    """Draw every tensor of the adapter set `name`."""
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if "molora_" in path and path.endswith(f".{name}"):
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def batch_of(model: Any) -> dict[str, Tensor]:
    """Return what a tiny model takes: tokens, or pixels."""
    size = getattr(model.config, "image_size", None)
    if size is not None:
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
        return {"pixel_values": pixels.to(model.dtype)}
    return {"input_ids": torch.arange(5, 45).reshape(2, 20)}


def logits_of(model: Any, **inputs: Tensor) -> Tensor:
    """Return the logits of `batch_of`, or of other inputs."""
    with torch.no_grad():
        found: Tensor = model(**(inputs or batch_of(model))).logits
    return found
