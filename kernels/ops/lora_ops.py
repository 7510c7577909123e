"""Routed low-rank adapters as operations of torch.library, for compiled graphs.

The bodies are those of `lora_steps`. Sizes follow from shapes alone: the low-rank values have as
many rows as if no pair were dropped, and the rest of them is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels import lora_steps
from adaconvert.kernels.lora_steps import Gradients, Inputs
from adaconvert.kernels.plan import RoutePlan

_ORDER = "Tensor pairs, Tensor tokens, Tensor ends, Tensor places, Tensor live"
_TENSORS = "Tensor x, Tensor weights_of, Tensor a, Tensor b"
_HOW = "int slots, bool dropped, str form, str backend"
#: where the backward finds what: Inputs, base, order of the plan, the rest.
_INPUTS, _BASE, _PLAN, _REST = slice(0, 4), 4, slice(5, 10), slice(10, 14)


def forward(*given: Any) -> tuple[Tensor, Tensor]:
    """Return the output and the low-rank values; arguments as the schema says."""
    found: tuple[Tensor, Tensor] = torch.ops.adaconvert.grouped_lora(*given)
    return found


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    inputs, plan, form, backend = _read(given)
    out, low = lora_steps.run_forward(inputs, given[_BASE], plan, form, backend)
    missing = lora_steps.low_shape(inputs, plan, form)[0] - low.shape[0]
    return out, functional.pad(low, (0, 0, 0, missing)).contiguous()


def _fake_forward(*given: Any) -> tuple[Tensor, Tensor]:
    inputs, plan, form, _ = _read(given)
    like = inputs.x if given[_BASE] is None else given[_BASE]
    out = like.new_empty(inputs.x.shape[0], inputs.b.shape[1])
    return out, inputs.x.new_empty(lora_steps.low_shape(inputs, plan, form))


def _backward(
    grad: Tensor, low: Tensor, needs: list[bool], *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, plan, form, backend = _read(given)
    names = lora_steps.named(needs)
    found = lora_steps.run_backward(grad, low, inputs, plan, form, backend, names)
    # an operation returns tensors only: an empty one where none was asked for
    x, weights_of, a, b = (
        grad.new_empty(0) if each is None else each.contiguous() for each in found
    )
    return x, weights_of, a, b


def _fake_backward(
    grad: Tensor, low: Tensor, needs: list[bool], *given: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weights_of, a, b = (
        each.new_empty(each.shape) if asked else grad.new_empty(0)
        for asked, each in zip(needs, given[_INPUTS], strict=True)
    )
    return x, weights_of, a, b


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs[_INPUTS], *inputs[_PLAN])
    ctx.rest = inputs[_REST]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    low, *kept = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[_INPUTS])
    given = (*kept[:4], None, *kept[4:], *ctx.rest)
    found = torch.ops.adaconvert.grouped_lora_backward(grad, low, needs, *given)
    gradients = (each if asked else None for asked, each in zip(needs, found, strict=True))
    of_base = grad if ctx.needs_input_grad[_BASE] else None
    return *gradients, of_base, *(None,) * (len(given) - _BASE - 1)


def _read(given: tuple[Any, ...]) -> tuple[Inputs, RoutePlan, Any, Any]:
    slots, dropped, form, backend = given[_REST]
    plan = lora_steps.plan_of(given[_PLAN], slots, dropped)
    return Inputs(*given[_INPUTS]), plan, form, backend


def _register() -> None:
    given = f"{_TENSORS}, Tensor? base, {_ORDER}, {_HOW}"
    op = torch.library.custom_op(
        "adaconvert::grouped_lora",
        _forward,
        mutates_args=(),
        schema=f"({given}) -> (Tensor, Tensor)",
    )
    op.register_fake(_fake_forward)
    op.register_autograd(_differentiate, setup_context=_save)
    torch.library.custom_op(
        "adaconvert::grouped_lora_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor low, bool[] needs, {given}) -> "
        f"({', '.join(['Tensor'] * len(Gradients._fields))})",
    ).register_fake(_fake_backward)


_register()
