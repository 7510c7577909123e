"""What stands between the two matrices of an expert, forward and backward, in blocks of rows.

R rows, i intermediate size. Pre-activations are [R, 2i] for gated experts (gate first, then up),
[R, i] for plain ones. Everything is computed in float32 (float64 for float64) and rounded once.
A block of rows at a time, so that on a CPU its many passes stay in the cache (on an accelerator one
block is everything of usual size) and no float32 copy of the whole is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

#: values of a block: 0.5 MB of float32 fit in the cache of a CPU core.
_BLOCK = {"cpu": 2**17}
_LARGE_BLOCK = 2**28
_aten = torch.ops.aten


class Gradients(NamedTuple):
    """What `backward` returns.

    Attributes:
        pre: [R, 2i] or [R, i], of the pre-activations.
        weights: [R], of the routing weights.
        hidden: [R, i], the hidden values times the routing weights, for the gradient of `down`.
    """

    pre: Tensor
    weights: Tensor
    hidden: Tensor


def forward(pre: Tensor, weights: Tensor, activation: Activation, *, glu: bool) -> Tensor:
    """Return the hidden values of the rows times their routing weights, [R, i].

    Args:
        pre: [R, 2i] with `glu`, [R, i] without.
        weights: [R], float32 or float64.
    """
    out = pre.new_empty(pre.shape[0], pre.shape[1] // (2 if glu else 1))
    for mine in _blocks(pre):
        hidden = _hidden(pre[mine].to(weights.dtype), activation, glu=glu)[-1]
        out[mine] = hidden.mul_(weights[mine, None])
    return out


def backward(
    pre: Tensor, weights: Tensor, grad: Tensor, activation: Activation, *, glu: bool
) -> Gradients:
    """Return the gradients of a row block of experts; `grad` is used up.

    The gradient of a routing weight is the scalar product of the hidden values and their gradient,
    so the outputs of the experts are not needed: Guo et al. 2025 (SonicMoE), arXiv 2512.14080,
    section 3.

    Args:
        pre: [R, 2i] with `glu`, [R, i] without.
        weights: [R], float32 or float64.
        grad: [R, i], of the hidden values before the routing weights.
    """
    found = Gradients(torch.empty_like(pre), torch.empty_like(weights), grad)
    for mine in _blocks(pre):
        values, share = pre[mine].to(weights.dtype), weights[mine, None]
        active, hidden = _hidden(values, activation, glu=glu)
        above = grad[mine].to(weights.dtype)
        torch.sum(above * hidden, -1, out=found.weights[mine])
        above = above * share
        found.hidden[mine] = hidden.mul_(share)
        if not glu:
            found.pre[mine] = _DERIVATIVES[activation](above, values)
            continue
        gate, up = values.chunk(2, -1)
        at_gate, at_up = found.pre[mine].chunk(2, -1)
        at_up.copy_(active.mul_(above))
        at_gate.copy_(_DERIVATIVES[activation](above.mul_(up), gate))
    return found


def _hidden(pre: Tensor, activation: Activation, *, glu: bool) -> tuple[Tensor, Tensor]:
    """Return the activated gate and the hidden values; the same tensor twice without a gate."""
    if not glu:
        active = _FUNCTIONS[activation](pre)
        return active, active
    gate, up = pre.chunk(2, -1)
    active = _FUNCTIONS[activation](gate)
    return active, active * up


def _blocks(pre: Tensor) -> Iterator[slice]:
    rows, width = pre.shape
    step = max(1, _BLOCK.get(pre.device.type, _LARGE_BLOCK) // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _relu2(values: Tensor) -> Tensor:
    return functional.relu(values).square_()


def _relu2_backward(grad: Tensor, values: Tensor) -> Tensor:
    return grad * functional.relu(values).mul_(2)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
    "relu": functional.relu,
    "relu2": _relu2,
}
#: (gradient of the activated values, values) -> gradient of the values.
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": _aten.silu_backward,
    "gelu": _aten.gelu_backward,
    "gelu_tanh": lambda grad, values: _aten.gelu_backward(grad, values, approximate="tanh"),
    "relu": lambda grad, values: _aten.threshold_backward(grad, values, 0),
    "relu2": _relu2_backward,
}
