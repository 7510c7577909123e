"""Routed low-rank adapters on a linear: the weighted sum of each token's selected adapters.

Two exact forms. "sorted" computes the (token, adapter) pairs in the order of a plan, which all
linears with the same routing share: two grouped GEMMs and a gather of each token's rows. "all" runs
every adapter on every token, as two plain GEMMs with the weight 0 for those not selected. Both keep
their inputs and the low-rank values alone for the backward, use no atomics, and give the same bits
every time.

T tokens, K slots per token, E adapters of rank r, n inputs and m outputs of the linear.

Source: mixture of adapters as in MoLoRA, Zadouri et al. 2023, arXiv 2309.05444, section 3; sorted
pairs as in ScatterMoE, Tan et al. 2024, arXiv 2403.08245, section 3.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from adaconvert.kernels import grouped_gemm, lora_ops, lora_steps
from adaconvert.kernels.lora_steps import ASKED, FORMS, Asked, Form, Inputs
from adaconvert.kernels.plan import RoutePlan


def grouped_lora(
    x: Tensor,
    base_out: Tensor | None,
    plan: RoutePlan,
    weights_of: Tensor,
    *,
    a: Tensor,
    b: Tensor,
    scaling: float | Tensor,
    form: Form | Literal["auto"] = "auto",
    backend: Asked = "auto",
) -> Tensor:
    """Return base_out + the sum over a token's slots of weight * scaling * b a x, [T, m].

    Dropped pairs add nothing and get the gradient 0. Adapters are computed in the dtype of x (of
    autocast where that is on); gradients arrive in the dtypes given.

    Args:
        x: [T, n].
        base_out: [T, m], the output of the adapted linear, or None for zeros. The result has its
            dtype, without it that of x.
        plan: of the T tokens and E adapters; one serves every linear with this routing.
        weights_of: [T, K], computed in float32 (float64 for a float64 x).
        a: [E, r, n].
        b: [E, m, r].
        scaling: alpha / r of all adapters, or [E] of each; gets no gradient.
        form: "auto" is what `choose_form` says.
        backend: of the grouped GEMMs in the form "sorted"; "auto" is grouped_mm where it runs these
            tensors, else the loop. A rank it cannot take is filled up with zeros.

    Raises:
        ValueError: shapes disagree, the rank is 0, the form or backend is unknown, or the backend
            cannot run this.
    """
    _check(Inputs(x, weights_of, a, b), base_out, plan, scaling)
    inputs = _in_compute_dtypes(x, weights_of, a, b)
    inputs = inputs._replace(weights_of=_scaled(inputs.weights_of, scaling, plan))
    how = _how(inputs, plan, form, backend)
    if torch.compiler.is_compiling() or x.is_meta:
        order = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live)
        out, _ = lora_ops.forward(*inputs, base_out, *order, plan.slots, plan.dropped, *how)
    else:
        out = _GroupedLora.apply(  # type: ignore[no-untyped-call]
            plan, how, base_out, *inputs
        )
    return out if base_out is not None else out.to(x.dtype)


#: forward and backward over a frozen linear, in times of that linear's own; one core of a two-core
#: x86 machine with 32 MB of cache, torch 2.13, float32, r = 16, other work running, timed by hand
#: before "all" masked what is not selected (kernels/README.md has rows of two of these sizes):
#:      T, n, m           E, K   sorted  all   |  T, n, m           E, K   sorted  all
#:      512, 576, 1536    8, 1   1.23    1.61  |  512, 2048, 8192   8, 1   1.11    1.16
#:      512, 576, 1536    8, 2   1.42    1.54  |  512, 2048, 8192   8, 2   1.13    1.14
#:      512, 576, 1536    8, 4   2.12    1.62  |  512, 2048, 8192   8, 4   1.37    1.14
#:      512, 576, 1536    8, 8   2.50    1.62  |  512, 2048, 8192   8, 8   1.60    1.06
#:      2048, 576, 1536   8, 2   1.41    1.60  |  2048, 2048, 8192  8, 2   1.28    1.15
#:      2048, 576, 1536   32, 2  1.60    3.07  |  512, 2048, 8192   32, 2  1.15    1.54
#:      2048, 576, 1536   64, 2  1.42    5.00  |  512, 2048, 8192   64, 2  1.32    2.57
#: What "sorted" moves for one slot of a token takes as long as this many more columns in "all":
#: where the moved outputs of all pairs stay in the cache, and where they do not.
_COLUMNS_OF_A_SLOT = (40, 100)
_CACHE_BYTES = 2**25
#: In bfloat16 oneDNN makes a new kernel for every number of rows, and "sorted" has as many as there
#: are adapters, others in each step; "all" is faster up to this many columns. Times of the linear's
#: own on that machine, one thread, CPU time, routing new in each step, r = 16:
#:      T, n, m          E, K   sorted  all    |  T, n, m          E, K   sorted  all
#:      512, 576, 1536   8, 1   3.26    1.80   |  2048, 576, 1536  8, 2   4.12    1.75
#:      512, 576, 1536   8, 2   4.69    1.79   |  2048, 576, 1536  32, 2  4.59    3.23
#:      512, 576, 1536   32, 2  3.61    3.58   |  512, 2048, 8192  8, 2   1.43    1.16
#:      512, 576, 1536   64, 2  3.16    5.48   |  512, 2048, 8192  32, 2  1.45    1.56
_LOW_COLUMNS = 512
#: with fewer tokens the time goes into reading adapters, and "sorted" reads the selected alone.
_FEW_TOKENS = 64


def choose_form(plan: RoutePlan, x: Tensor, a: Tensor, b: Tensor) -> tuple[Form, str]:
    """Return the form that should be faster for these tensors, and why.

    On the CPU as measured; no accelerator was at hand to measure.
    """
    (tokens, slots), (experts, rank) = plan.places.shape, a.shape[:2]
    reason = f"{tokens} tokens, {slots} of {experts} adapters of rank {rank} selected"
    moved = tokens * slots * b.shape[1] * x.element_size()
    columns = slots * _COLUMNS_OF_A_SLOT[moved > _CACHE_BYTES]
    wins = rank * (experts - slots) <= columns
    if x.device.type == "cpu":
        wins |= x.element_size() < 4 and experts * rank <= _LOW_COLUMNS
        return "all" if wins and tokens >= _FEW_TOKENS else "sorted", reason
    refusal = grouped_gemm.refuses(x)
    if refusal is not None:
        return "all", f"a loop over adapters would wait for the device, and {refusal}"
    launches = experts * rank <= 128 and tokens <= 1024
    return "all" if launches or wins else "sorted", reason


class _How(NamedTuple):
    """Who computes."""

    form: Form
    backend: Asked


class _GroupedLora(torch.autograd.Function):
    """The autograd of `run_forward` and `run_backward`."""

    @staticmethod
    def forward(
        ctx: Any, plan: RoutePlan, how: _How, base: Tensor | None, *given: Tensor
    ) -> Tensor:
        inputs = Inputs(*given)
        out, low = lora_steps.run_forward(inputs, base, plan, *how)
        order = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live)
        ctx.save_for_backward(low, *order, *given)
        ctx.how, ctx.slots, ctx.dropped = how, plan.slots, plan.dropped
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        low, *rest = ctx.saved_tensors
        plan = lora_steps.plan_of(rest[:5], ctx.slots, ctx.dropped)
        needs = lora_steps.named(ctx.needs_input_grad[3:])
        how: _How = ctx.how
        given = Inputs(*rest[5:])
        found = lora_steps.run_backward(grad, low, given, plan, how.form, how.backend, needs)
        return None, None, grad if ctx.needs_input_grad[2] else None, *found


def _check(inputs: Inputs, base: Tensor | None, plan: RoutePlan, scaling: float | Tensor) -> None:
    (tokens, slots), (experts,) = plan.places.shape, plan.ends.shape
    if inputs.a.dim() != 3 or inputs.b.dim() != 3:
        raise ValueError("a and b hold one matrix per adapter; expected [E, r, n] and [E, m, r]")
    (_, rank, width), outputs = inputs.a.shape, inputs.b.shape[1]
    if not rank:
        raise ValueError("a is of rank 0; expected at least 1")
    expected = {
        **{"x": (inputs.x, (tokens, width)), "weights_of": (inputs.weights_of, (tokens, slots))},
        **{"a": (inputs.a, (experts, rank, width)), "b": (inputs.b, (experts, outputs, rank))},
    }
    if base is not None:
        expected["base_out"] = (base, (tokens, outputs))
    if isinstance(scaling, Tensor):
        expected["scaling"] = (scaling, (experts,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {list(shape)}")


def _in_compute_dtypes(x: Tensor, weights_of: Tensor, a: Tensor, b: Tensor) -> Inputs:
    """Return the inputs in the dtype of x or of autocast; routing weights in float32."""
    device, dtype = x.device.type, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = dtype if dtype == torch.float64 else torch.get_autocast_dtype(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(x.to(dtype), weights_of.to(wide), a.to(dtype), b.to(dtype))


def _scaled(weights_of: Tensor, scaling: float | Tensor, plan: RoutePlan) -> Tensor:
    if not isinstance(scaling, Tensor):
        return weights_of * scaling
    # one more, for the dropped pairs
    each = functional.pad(scaling.detach().to(weights_of.dtype), (0, 1))
    return weights_of * each[lora_steps.experts_of_slots(plan)]


def _how(inputs: Inputs, plan: RoutePlan, form: str, backend: str) -> _How:
    if form not in (*FORMS, "auto"):
        raise ValueError(f"form {form!r}; expected auto, {' or '.join(FORMS)}")
    if backend not in ASKED:
        raise ValueError(f"backend {backend!r}; expected one of {', '.join(ASKED)}")
    if form == "auto":
        form = choose_form(plan, inputs.x, inputs.a, inputs.b)[0]
    return _How(cast(Form, form), backend)
