"""The files of a PEFT folder."""

from __future__ import annotations

from typing import Final

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
