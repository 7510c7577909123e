"""`adaconvert.kernels` as an experts implementation of transformers' mixture-of-experts models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from adaconvert.kernels import experts

logger = logging.getLogger(__name__)

#: the name of our experts implementation in transformers.
EXPERTS = "adaconvert"


def register() -> None:
    """Make `experts_implementation="adaconvert"` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts_forward)


def use(model: Any) -> None:
    """Make the experts of a mixture in transformers run by our kernels.

    A model without modules of experts is left alone.

    Args:
        model: any model of transformers, changed in place. What it saves does not name the
            implementation.
    """
    chosen = getattr(model.config, "_experts_implementation", None)
    if chosen is not None and experts.holds_experts(model):
        register()
        model.config._experts_implementation = EXPERTS


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output; transformers' own where ours does not know the module."""
    call = (hidden_states, top_k_index, top_k_weights)
    reason = experts.refuses(module, *call)
    if reason is None:
        return experts.experts_forward(module, *call)
    if not torch.compiler.is_compiling():
        _tell(type(module).__name__, reason)
    run = partial(_stock_forward(module), module)
    if getattr(module, "drops_slots", False):
        # a mixture with null experts has slots that transformers' implementations do not know
        run = partial(module.adaptive_compacted, run)
    out: Tensor = run(*call)
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
