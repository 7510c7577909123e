"""The expert feed-forward of a mixture of experts, computed expert by expert and differentiated.

One autograd function over grouped GEMMs. It keeps its inputs, the pre-activations and the plan;
everything else is computed again in the backward, and the outputs of the experts are never needed.
Where torch.compile traces, the same is one operator of the graph (`grouped_ops`).

T tokens, K slots per token, E experts, d hidden size, i intermediate size of one expert.

Source: what is saved and how the gradient of the routing weights is found follow SonicMoE, Guo et
al. 2025, arXiv 2512.14080, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adaconvert.kernels import grouped_ops
from adaconvert.kernels.expert_activations import ACTIVATIONS, Activation
from adaconvert.kernels.grouped_backend import ASKED, Asked, choose_backend, kind_of
from adaconvert.kernels.grouped_steps import Gradients, Inputs, Kind, run_backward, run_forward
from adaconvert.kernels.plan import RoutePlan

__all__ = ["choose_backend", "grouped_ffn"]


def grouped_ffn(
    x: Tensor,
    weights_of: Tensor,
    plan: RoutePlan,
    *,
    down: Tensor,
    activation: Activation,
    glu: bool,
    gate_up: Tensor | None = None,
    up: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    backend: Asked = "auto",
) -> Tensor:
    """Return each token's weighted sum of its experts' outputs, [T, d], of the dtype of x.

    An expert computes down(act(gate x) * up x) with `glu`, down(act(up x)) without. Dropped pairs
    add nothing and get the gradient 0. Bitwise the same every time. Under autocast everything is
    computed in its dtype.

    Args:
        x: [T, d].
        weights_of: [T, K], computed in float32 (float64 for a float64 x).
        plan: of the T tokens and E experts.
        down: [E, d, i].
        gate_up: [E, 2i, d] with `glu`, gate first.
        up: [E, i, d] without `glu`.
        gate_up_bias: [E, 2i].
        up_bias: [E, i].
        down_bias: [E, d].
        backend: "auto" is what `choose_backend` says, with Triton's kernels where `dispatch.select`
            has them; "triton" insists on those.

    Raises:
        ValueError: shapes disagree, tensors of the other form of expert are given, the activation
            is unknown, or the backend asked for cannot run this.
        TypeError: x and the weights differ in dtype, and autocast is off.
        RuntimeError: ADACONVERT_KERNELS is "triton", `backend` "auto", and they cannot run this.
    """
    first, first_bias = (gate_up, gate_up_bias) if glu else (up, up_bias)
    unused = (up, up_bias) if glu else (gate_up, gate_up_bias)
    if first is None or any(tensor is not None for tensor in unused):
        raise ValueError(f"experts {'with' if glu else 'without'} a gate need {_NEEDS[glu]}")
    asked = Inputs(x, weights_of, first, down, first_bias, down_bias)
    _check(asked, plan, activation, glu, backend)
    given = _in_compute_dtypes(asked)
    if torch.compiler.is_compiling() or x.is_meta:
        return grouped_ops.grouped_ffn(given, plan, activation, glu, backend).to(x.dtype)
    grad = torch.is_grad_enabled()
    kind = kind_of(given, backend, activation, glu=glu, grad=grad, compact=True)
    out: Tensor = _GroupedFFN.apply(plan, kind, *given)  # type: ignore[no-untyped-call]
    return out.to(x.dtype)


class _GroupedFFN(torch.autograd.Function):
    """The autograd of `run_forward` and `run_backward`."""

    @staticmethod
    def forward(ctx: Any, plan: RoutePlan, kind: Kind, *given: Tensor | None) -> Tensor:
        inputs = Inputs(*given)  # type: ignore[arg-type]
        out, pre = run_forward(inputs, plan, kind)
        order = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live)
        ctx.save_for_backward(pre, *order, *given)
        ctx.kind, ctx.slots, ctx.dropped = kind, plan.slots, plan.dropped
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pre, pairs, tokens, ends, places, live, *given = ctx.saved_tensors
        plan = RoutePlan(
            **{"pairs": pairs, "tokens": tokens, "ends": ends, "places": places, "live": live},
            slots=ctx.slots,
            dropped=ctx.dropped,
        )
        asked = zip(Gradients._fields, ctx.needs_input_grad[2:], strict=True)
        needs = frozenset(name for name, needed in asked if needed)
        return None, None, *run_backward(grad, pre, Inputs(*given), plan, ctx.kind, needs)


_NEEDS = {True: "gate_up and take no up", False: "up and take no gate_up"}


def _in_compute_dtypes(inputs: Inputs) -> Inputs:
    """Return the inputs with x in the dtype of autocast where it is on; routing weights in float32.

    The matrices stay what they are, so that no copy of them is kept for the backward.
    """
    dtype = inputs.x.dtype
    if _is_cast(inputs.x) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(inputs.x.device.type)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return inputs._replace(x=inputs.x.to(dtype), weights_of=inputs.weights_of.to(wide))


def _is_cast(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _check(inputs: Inputs, plan: RoutePlan, activation: str, glu: bool, backend: str) -> None:
    if backend not in ASKED:
        raise ValueError(f"backend {backend!r}; expected one of {', '.join(ASKED)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    (tokens, slots), (experts,) = plan.places.shape, plan.ends.shape
    hidden, width = inputs.down.shape[1:]
    wide = 2 * width if glu else width
    expected = (
        *((tokens, hidden), (tokens, slots), (experts, wide, hidden), (experts, hidden, width)),
        *((experts, wide), (experts, hidden)),
    )
    for name, tensor, shape in zip(Inputs._fields, inputs, expected, strict=True):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")
        if name != "weights_of" and tensor.dtype != inputs.x.dtype and not _is_cast(inputs.x):
            raise TypeError(f"{name} is {tensor.dtype}, x is {inputs.x.dtype}")
