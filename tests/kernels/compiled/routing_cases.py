"""The kernels of `router_select`, for the routers that adaconvert makes and meets."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from launches import cases

from adaconvert.kernels import triton_routing
from adaconvert.kernels.routing_steps import Rule

_PLAIN = {"null": 0, "tau": None, "scores": "softmax", "scaling": 1.0, "force_real": False}
_TOKENS = 16384

#: the tensor cores have no part in it, but whole rows should be read 16 bytes at a time
_WIDE_LOADS = {80: ("LDG.E.128",), 90: ("LDG.E.128",)}

#: name -> columns, type of the logits, options
_ROUTERS: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "mixtral": (8, torch.float32, {"top_k": 2, "normalise": "selected"}),
    "olmoe": (64, torch.bfloat16, {"top_k": 8, "normalise": "none"}),
    "qwen3-next": (512, torch.float32, {"top_k": 10, "normalise": "selected"}),
    "deepseek": (
        *(256, torch.float32),
        {"top_k": 8, "normalise": "selected", "scores": "sigmoid", "scaling": 2.5},
    ),
    "null-apart": (11, torch.float16, {"top_k": 4, "normalise": "all_real", "null": 4}),
    "tau": (64, torch.float32, {"top_k": 64, "normalise": "none", "tau": 0.3}),
    "tau-forced": (
        *(48, torch.bfloat16),
        {"top_k": 8, "normalise": "real", "tau": 0.3, "null": 16, "force_real": True},
    ),
    "widest": (triton_routing.WIDEST, torch.float32, {"top_k": 8, "normalise": "selected"}),
}


def _run(columns: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    rule = Rule(**(_PLAIN | options))
    # a stride of its own value, so that its products can be told from others
    logits = torch.empty(_TOKENS, columns + 16, dtype=dtype)[:, :columns]
    counted = torch.empty(_TOKENS, dtype=torch.bool)
    bias = torch.empty(columns) if rule.scores == "sigmoid" else None
    weights, _, slots, sums, _ = triton_routing.router_select(logits, bias, counted, rule)
    triton_routing.backward(logits, slots, counted, weights, sums, rule)


CASES = [
    case
    for name, (columns, dtype, options) in _ROUTERS.items()
    for case in cases(
        *(name, triton_routing, partial(_run, columns, dtype, options)),
        wide=("stride",),
        wants=_WIDE_LOADS if columns >= 64 else {},
    )
]
