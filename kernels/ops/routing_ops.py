"""Who computes `router_select`, and its operators for torch.compile and torch.export.

`adaconvert::router_select` and `adaconvert::router_select_backward` are `forward` and `backward`,
which ask `dispatch` with the real tensors whether a kernel runs.

Shapes: T tokens, A experts with the null ones, K slots of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaconvert.kernels import dispatch, routing_steps, triton_support
from adaconvert.kernels.routing_steps import Rule

Found = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

#: the fields of `Rule`
_RULE = "int top_k, int null, float? tau, str scores, str normalise, float scaling, bool force_real"


def router_select(
    logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: Rule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weights, experts, probability sums and counts by the operator; differentiable."""
    op = torch.ops.adaconvert.router_select
    weights, experts, _, sums, counts = op(logits, bias, counted, *_values(rule))
    return weights, experts, sums, counts


def forward(logits: Tensor, bias: Tensor | None, counted: Tensor | None, rule: Rule) -> Found:
    """Return what `routing_steps.forward` does, by the kernel where one is selected."""
    kernel = _kernel(logits, rule)
    if kernel is None:
        return routing_steps.forward(logits, bias, counted, rule)
    found: Found = kernel(logits, bias, counted, rule)
    return found


def backward(
    logits: Tensor,
    slots: Tensor,
    counted: Tensor | None,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    rule: Rule,
) -> Tensor:
    """Return what `routing_steps.backward` does, by the kernel where one is selected."""
    if _kernel(logits, rule) is None:
        return routing_steps.backward(logits, slots, counted, weights_grad, sums_grad, rule)
    from adaconvert.kernels import triton_routing

    return triton_routing.backward(logits, slots, counted, weights_grad, sums_grad, rule)


def _kernel(logits: Tensor, rule: Rule) -> Callable[..., Any] | None:
    """Return the kernel for these logits, None for torch."""
    # a CPU has a kernel in Triton's interpreter alone, which nobody runs unasked
    if logits.is_meta or (logits.device.type == "cpu" and dispatch.wanted() != "triton"):
        return None
    tokens, columns = logits.shape
    return dispatch.select(
        "router_select",
        device=logits.device.type,
        capability=triton_support.capability_on(logits.device),
        dtype=logits.dtype,
        tokens=tokens,
        experts=columns,
        slots=rule.top_k,
    )


def _values(rule: Rule) -> tuple[Any, ...]:
    """Return the arguments of the operators that stand for the rule."""
    return (
        *(rule.top_k, rule.null, rule.tau, rule.scores),
        *(rule.normalise, rule.scaling, rule.force_real),
    )


def _rule(values: tuple[Any, ...]) -> Rule:
    top_k, null, tau, scores, normalise, scaling, force_real = values
    return Rule(
        top_k=top_k,
        null=null,
        tau=tau,
        scores=scores,
        normalise=normalise,
        scaling=scaling,
        force_real=force_real,
    )


def _op_forward(logits: Tensor, bias: Tensor | None, counted: Tensor | None, *rule: Any) -> Found:
    return forward(logits, bias, counted, _rule(rule))


def _fake_forward(logits: Tensor, bias: Tensor | None, counted: Tensor | None, *rule: Any) -> Found:
    tokens, columns = logits.shape
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    slots = (tokens, rule[0])
    return (
        logits.new_empty(slots, dtype=wide),
        logits.new_empty(slots, dtype=torch.int64),
        logits.new_empty(slots, dtype=torch.int32),
        logits.new_empty(columns, dtype=wide),
        logits.new_empty(columns, dtype=torch.int64),
    )


def _op_backward(
    logits: Tensor,
    slots: Tensor,
    counted: Tensor | None,
    weights_grad: Tensor | None,
    sums_grad: Tensor | None,
    *rule: Any,
) -> Tensor:
    return backward(logits, slots, counted, weights_grad, sums_grad, _rule(rule)).contiguous()


def _fake_backward(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
    logits, _, counted, *rule = inputs
    ctx.rule = rule
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2], output[4])
    ctx.save_for_backward(logits, output[2], counted)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weights_grad, _, _, sums_grad, _ = grads
    op = torch.ops.adaconvert.router_select_backward
    grad: Tensor = op(*ctx.saved_tensors, weights_grad, sums_grad, *ctx.rule)
    return grad, None, None, *(None for _ in ctx.rule)


def _register() -> None:
    op = torch.library.custom_op(
        "adaconvert::router_select",
        _op_forward,
        mutates_args=(),
        schema=f"(Tensor logits, Tensor? bias, Tensor? counted, {_RULE})"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    op.register_fake(_fake_forward)
    op.register_autograd(_differentiate, setup_context=_save)
    back = torch.library.custom_op(
        "adaconvert::router_select_backward",
        _op_backward,
        mutates_args=(),
        schema="(Tensor logits, Tensor slots, Tensor? counted, Tensor? weights_grad,"
        f" Tensor? sums_grad, {_RULE}) -> Tensor",
    )
    back.register_fake(_fake_backward)


_register()
