"""How parts that a stock model does not have are filled where no checkpoint does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .adaptive_adapted import init_adapters
from .adaptive_adapters import RoutedAdapters
from .adaptive_depth_parts import Depth, init_depth
from .adaptive_exits import ExitHead, init_exit
from .adaptive_ffn import AdaptiveFFN
from .adaptive_null import NullExperts
from .adaptive_routers import Router


def init_part(module: nn.Module) -> bool:
    """Fill a module and return True, or return False for one that is stock code's.

    Args:
        module: of an adaptive model.
    """
    if isinstance(module, Depth):
        init_depth(module)
    elif isinstance(module, Router):
        for parameter in module.parameters():
            init.normal_(parameter, mean=0.0, std=0.02)
        for buffer in module.buffers():
            init.zeros_(buffer)
    elif isinstance(module, NullExperts):
        init.normal_(module.weight, mean=0.0, std=0.02)
        for added in (module.bias, module.scale, module.value):
            if added is not None:
                init.zeros_(added)
    elif isinstance(module, RoutedAdapters):
        init_adapters(module)
    elif isinstance(module, ExitHead):
        init_exit(module)
    elif isinstance(module, AdaptiveFFN) and hasattr(module, "neuron_order"):
        order: Any = module.neuron_order
        init.copy_(order, torch.arange(order.numel(), dtype=order.dtype))
    else:
        return False
    return True
