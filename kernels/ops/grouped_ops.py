"""`grouped_ffn` as operators that torch.compile and torch.export put into their graphs whole.

`adaconvert::grouped_ffn` and `adaconvert::grouped_ffn_backward` are `run_forward` and
`run_backward`. The sizes of their outputs follow from sizes alone: R = P rows, those of dropped
pairs not initialised. Which backend runs is decided within, from the real tensors.

T tokens, K slots per token, E experts, P = T*K pairs, d hidden size, i intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaconvert.kernels.grouped_backend import kind_of
from adaconvert.kernels.grouped_steps import Gradients, Inputs, Kind, run_backward, run_forward
from adaconvert.kernels.plan import RoutePlan

#: `Inputs`, `RoutePlan` but its slots, which `places` tells, and how to compute.
_CALL = (
    "Tensor x, Tensor weights_of, Tensor first, Tensor down, Tensor? first_bias, Tensor? down_bias,"
    " Tensor pairs, Tensor tokens, Tensor ends, Tensor places, Tensor live, bool dropped,"
    " str activation, bool glu, str backend"
)
_PLAN = ("pairs", "tokens", "ends", "places", "live", "dropped")
_INPUTS = len(Inputs._fields)


def grouped_ffn(
    inputs: Inputs, plan: RoutePlan, activation: str, glu: bool, backend: str
) -> Tensor:
    """Return the output [T, d] by the operator; differentiable.

    Args:
        backend: one of `grouped_backend.ASKED`.
    """
    order = [getattr(plan, name) for name in _PLAN]
    out: Tensor
    out, _ = torch.ops.adaconvert.grouped_ffn(*inputs, *order, activation, glu, backend)
    return out


def _forward(*call: Any) -> tuple[Tensor, Tensor]:
    """Return the output [T, d] and the pre-activations [P, 2i] or [P, i]."""
    return run_forward(*_read(call))


def _fake_forward(*call: Any) -> tuple[Tensor, Tensor]:
    x, _, first = call[:3]
    pairs = call[_INPUTS].shape[0]
    return x.new_empty(x.shape), x.new_empty(pairs, first.shape[1])


def _backward(grad: Tensor, pre: Tensor, needs: list[bool], *call: Any) -> list[Tensor]:
    """Return the gradients of the inputs whose `needs` is true, in their order."""
    asked = zip(Gradients._fields, needs, strict=True)
    names = frozenset(name for name, needed in asked if needed)
    found = zip(run_backward(grad, pre, *_read(call), names), call, strict=False)
    return [each.to(given.dtype).contiguous() for each, given in found if each is not None]


def _fake_backward(grad: Tensor, pre: Tensor, needs: list[bool], *call: Any) -> list[Tensor]:
    asked = zip(call[:_INPUTS], needs, strict=True)
    return [given.new_empty(given.shape) for given, needed in asked if needed]


def _read(call: tuple[Any, ...]) -> tuple[Inputs, RoutePlan, Kind]:
    """Return what the arguments of an operator stand for."""
    inputs, order = Inputs(*call[:_INPUTS]), dict(zip(_PLAN, call[_INPUTS:], strict=False))
    activation, glu, backend = call[_INPUTS + len(_PLAN) :]
    # whether a gradient follows is not known here
    kind = kind_of(inputs, backend, activation, glu=glu, grad=True, compact=False)
    return inputs, RoutePlan(**order, slots=order["places"].shape[1]), kind


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = _INPUTS + len(_PLAN) - 1
    ctx.save_for_backward(output[1], *inputs[:tensors])
    ctx.rest = inputs[tensors:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    pre, *tensors = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_INPUTS])
    call = (*tensors, *ctx.rest)
    found = iter(torch.ops.adaconvert.grouped_ffn_backward(grad, pre, needs, *call))
    gradients = [next(found) if needed else None for needed in needs]
    return *gradients, *(None for _ in call[_INPUTS:])


def _register() -> None:
    op = torch.library.custom_op(
        "adaconvert::grouped_ffn",
        _forward,
        mutates_args=(),
        schema=f"({_CALL}) -> (Tensor, Tensor)",
    )
    op.register_fake(_fake_forward)
    op.register_autograd(_differentiate, setup_context=_save)
    backward = torch.library.custom_op(
        "adaconvert::grouped_ffn_backward",
        _backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor pre, bool[] needs, {_CALL}) -> Tensor[]",
    )
    backward.register_fake(_fake_backward)


_register()
