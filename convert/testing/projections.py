"""Networks in the place of projections: options that make them in a second, what they left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file
from torch import Tensor

QUICK: Final[dict[str, Any]] = {
    "router_width": 16,
    "router_steps": 30,
    "projection_steps": 40,
    "projection_batch": 128,
    "projection_experts": 4,
    "data_tokens": 2000,
    "device": "cpu",
}


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def sites(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the spec of every network that stands for a projection."""
    slots = _slots(folder).items()
    return {path: slot["linear"]["mlp"] for path, slot in slots if "linear" in slot}


def ffn(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the spec of every feed-forward site."""
    return {path: slot["ffn"] for path, slot in _slots(folder).items() if "ffn" in slot}


def _slots(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["adaptive"]["sites"]
    return found
