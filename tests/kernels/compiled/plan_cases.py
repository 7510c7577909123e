"""The kernels of `route_plan`, for few and many experts."""

from __future__ import annotations

from functools import partial

import torch
from launches import cases

from adaconvert.kernels import triton_plan

#: name -> experts, type of the indices
_PLANS = {
    "plan-8": (8, torch.int64),
    "plan-512": (512, torch.int32),
    "plan-4095": (4095, torch.int64),
}


def _run(experts: int, dtype: torch.dtype) -> None:
    triton_plan.route_plan(torch.empty(16384, 8, dtype=dtype), experts)


CASES = [
    case
    for name, options in _PLANS.items()
    for case in cases(name, triton_plan, partial(_run, *options), wide=("BLOCK",))
]
