"""`import adaconvert.auto`: after it, transformers' Auto classes load adaptive checkpoints.

No code of a checkpoint runs then, and `trust_remote_code` is not needed. It also makes
`experts_implementation="adaconvert"` known to transformers, which runs the experts of stock
mixture-of-experts models, in training and generation, by `adaconvert.kernels`. Importing twice is
harmless.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from adaconvert.arch.registry import FAMILIES
from adaconvert.kernels import experts
from adaconvert.modeling import modeling_adaptive
from adaconvert.modeling.configuration_adaptive import made_config

__all__ = ["EXPERTS", "register"]

logger = logging.getLogger(__name__)

#: the name of our experts implementation in transformers.
EXPERTS = "adaconvert"

_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForImageClassification",
)


def register() -> None:
    """Register the adaptive classes of every dense family, and the experts implementation."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts_forward)
    for family in FAMILIES.values():
        for architecture in family.architectures:
            _register(architecture)


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


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output; transformers' own where ours does not know the module."""
    call = (hidden_states, top_k_index, top_k_weights)
    reason = experts.refuses(module, *call)
    if reason is None:
        return experts.experts_forward(module, *call)
    if not torch.compiler.is_compiling():
        _tell(type(module).__name__, reason)
    out: Tensor = _stock_forward(module)(module, *call)
    return out


def _stock_forward(module: Any) -> Any:
    """Return transformers' grouped_mm where it runs the module's weights, else its eager loop."""
    if experts.refuses_grouped_mm(module) is None:
        return grouped_mm_experts_forward
    forwards: Iterator[Any] = (kind.__dict__.get("forward") for kind in type(module).__mro__)
    return next(found.__wrapped__ for found in forwards if hasattr(found, "__wrapped__"))


@cache
def _tell(name: str, reason: str) -> None:
    """Say once why a class does not run by our kernels."""
    logger.warning("%s runs by transformers' own experts implementation: %s", name, reason)


register()
