"""`import adaconvert.auto`: after it, transformers' Auto classes load adaptive checkpoints.

No code of a checkpoint runs then, and `trust_remote_code` is not needed. It also makes
`experts_implementation="adaconvert"` known to transformers, which runs the experts of stock
mixture-of-experts models, in training and generation, by `adaconvert.kernels`. Where peft is
installed, adapter folders of the type MOLORA load by its and transformers' own functions. Importing
twice is harmless.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import transformers

from adaconvert.arch.registry import FAMILIES
from adaconvert.errors import ResourceError
from adaconvert.modeling import modeling_adaptive, stock_experts
from adaconvert.modeling.configuration_adaptive import made_config
from adaconvert.modeling.stock_experts import EXPERTS

__all__ = ["EXPERTS", "register"]

_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)


def register() -> None:
    """Register the adaptive classes of every dense family, the experts implementation, and the PEFT
    method of routed adapters."""
    stock_experts.register()
    if importlib.util.find_spec("peft") is not None:
        _register_adapters()
    for family in FAMILIES.values():
        for architecture in family.architectures:
            _register(architecture)


def _register_adapters() -> None:
    from adaconvert.adapters.register import register as register_method

    try:
        register_method()
    except ResourceError as error:
        # everything else works with any PEFT
        warnings.warn(str(error), stacklevel=2)


def _register(architecture: str) -> None:
    stock: Any = getattr(transformers, architecture, None)
    if stock is None or getattr(stock, "config_class", None) is None:
        return
    config: Any = made_config(f"Adaptive{stock.config_class.__name__}")
    transformers.AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in (architecture, *_classes_of(stock.config_class)):
        made: Any = getattr(modeling_adaptive, f"Adaptive{name}")
        if made._auto_class is not None:
            auto: Any = getattr(transformers, made._auto_class)
            auto.register(config, made, exist_ok=True)


def _classes_of(config_class: Any) -> Iterator[str]:
    """Yield the names of the classes that Auto classes build for a stock configuration."""
    for name in _AUTO_CLASSES:
        found: Any = getattr(transformers, name)._model_mapping.get(config_class, None)
        if isinstance(found, tuple):
            found = found[0]
        if found is not None:
            yield str(found.__name__)


register()
