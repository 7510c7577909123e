"""`import adaconvert.auto`: after it, transformers' Auto classes load adaptive checkpoints.

No code of a checkpoint runs then, and `trust_remote_code` is not needed. Importing twice is
harmless.
"""

from __future__ import annotations

from typing import Any

import transformers

from adaconvert.arch.registry import FAMILIES
from adaconvert.modeling import modeling_adaptive
from adaconvert.modeling.configuration_adaptive import made_config

__all__ = ["register"]


def register() -> None:
    """Register the adaptive classes of every dense family adaconvert knows."""
    for family in FAMILIES.values():
        for architecture in family.architectures:
            _register(architecture)


def _register(architecture: str) -> None:
    stock: Any = getattr(transformers, architecture, None)
    if stock is None or getattr(stock, "config_class", None) is None:
        return
    config: Any = made_config(f"Adaptive{stock.config_class.__name__}")
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in (architecture, _backbone(stock)):
        made: Any = getattr(modeling_adaptive, f"Adaptive{name}", None) if name else None
        if made is not None and made._auto_class is not None:
            auto: Any = getattr(transformers, made._auto_class)
            auto.register(config, made, exist_ok=True)


def _backbone(stock: Any) -> str | None:
    """Return the name of the class AutoModel builds for the same configuration."""
    found: Any = transformers.MODEL_MAPPING.get(stock.config_class, None)
    if isinstance(found, tuple):
        found = found[0]
    return None if found is None else str(found.__name__)


register()
