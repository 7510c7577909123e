"""Forward and backward of routed low-rank adapters, as functions of tensors, in two exact forms.

T tokens, K slots per token, E adapters of rank r, n inputs and m outputs of the linear, P = T*K
pairs, R pairs that are computed: the live ones where their number is known without waiting (CPU),
else P. Rows of dropped pairs among the R are never initialised and never used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels import grouped_gemm
from adaconvert.kernels.grouped_gemm import Backend
from adaconvert.kernels.grouped_steps import combine
from adaconvert.kernels.plan import RoutePlan

Form = Literal["sorted", "all"]
FORMS: tuple[Form, ...] = get_args(Form)
Asked = Literal["auto", "loop", "grouped_mm"]
ASKED: tuple[Asked, ...] = get_args(Asked)


class Inputs(NamedTuple):
    """What is differentiated.

    Attributes:
        x: [T, n].
        weights_of: [T, K] float32 or float64, scaling included.
        a: [E, r, n].
        b: [E, m, r].
    """

    x: Tensor
    weights_of: Tensor
    a: Tensor
    b: Tensor


class Gradients(NamedTuple):
    """Of each of `Inputs`; None where it was not asked for."""

    x: Tensor | None = None
    weights_of: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def run_forward(
    inputs: Inputs, base: Tensor | None, plan: RoutePlan, form: Form, backend: Asked
) -> tuple[Tensor, Tensor]:
    """Return the output [T, m] and the low-rank values that backward needs.

    Those are b's unweighted inputs: [R, r] in the order of the plan, [T, E*r] in the form "all".
    """
    if form == "sorted":
        return _sorted_forward(inputs, base, plan, backend)
    return _all_forward(inputs, base, plan)


def run_backward(
    grad: Tensor,
    low: Tensor,
    inputs: Inputs,
    plan: RoutePlan,
    form: Form,
    backend: Asked,
    needs: frozenset[str],
) -> Gradients:
    """Return the gradients of the inputs that `needs` names.

    Args:
        grad: [T, m], of the output, of any strides.
        low: what `run_forward` returned; more rows than R do no harm.
    """
    # the output may be wider than what was computed with
    grad = grad.to(inputs.x.dtype)
    if form == "sorted":
        return _sorted_backward(grad, low, inputs, plan, backend, needs)
    return _all_backward(grad, low, inputs, plan, needs)


def low_shape(inputs: Inputs, plan: RoutePlan, form: Form) -> tuple[int, int]:
    """Return the largest shape of the low-rank values that `run_forward` returns."""
    experts, rank = inputs.a.shape[:2]
    if form == "sorted":
        return plan.pairs.shape[0], rank
    return inputs.x.shape[0], experts * rank


def plan_of(order: Sequence[Tensor], slots: int, dropped: bool) -> RoutePlan:
    """Return the plan of pairs, tokens, ends, places and live."""
    names = ("pairs", "tokens", "ends", "places", "live")
    return RoutePlan(**dict(zip(names, order, strict=True)), slots=slots, dropped=dropped)


def named(asked: Sequence[bool]) -> frozenset[str]:
    """Return the names of the inputs whose gradients are asked for."""
    return frozenset(name for name, yes in zip(Gradients._fields, asked, strict=True) if yes)


def experts_of_slots(plan: RoutePlan) -> Tensor:
    """Return the expert of each slot, [T, K] int64; E for a dropped pair."""
    return torch.searchsorted(plan.ends.to(torch.int64), plan.places, right=True)


def _sorted_forward(
    inputs: Inputs, base: Tensor | None, plan: RoutePlan, backend: Asked
) -> tuple[Tensor, Tensor]:
    engine, a, b = _ready(inputs, backend)
    tokens, shares = _rows(inputs, plan)
    gathered = inputs.x.index_select(0, tokens)
    low = grouped_gemm.times_transposed(engine, gathered, plan.ends, a)
    del gathered
    weighted = (low * shares).to(low.dtype)
    out = combine(grouped_gemm.times_transposed(engine, weighted, plan.ends, b), plan)
    return _onto(base, out), low[:, : inputs.a.shape[1]]


def _sorted_backward(
    grad: Tensor,
    low: Tensor,
    inputs: Inputs,
    plan: RoutePlan,
    backend: Asked,
    needs: frozenset[str],
) -> Gradients:
    engine, a, b = _ready(inputs, backend)
    rank = inputs.a.shape[1]
    tokens, shares = _rows(inputs, plan)
    low = functional.pad(low[: tokens.shape[0]], (0, a.shape[1] - rank))
    found = Gradients()
    at_rows = grad.index_select(0, tokens)
    if "b" in needs:
        weighted = (low * shares).to(low.dtype)
        found = found._replace(
            b=grouped_gemm.outer(engine, at_rows, weighted, plan.ends)[..., :rank]
        )
    if needs == {"b"}:
        return found
    at_weighted = grouped_gemm.times(engine, at_rows, plan.ends, b)
    del at_rows
    if "weights_of" in needs:
        found = found._replace(weights_of=_of_slots(_dots(at_weighted, low, shares), plan))
    at_low = (at_weighted * shares).to(low.dtype)
    if "a" in needs:
        gathered = inputs.x.index_select(0, tokens)
        of_a = grouped_gemm.outer(engine, at_low, gathered, plan.ends)
        found = found._replace(a=of_a[:, :rank])
        del gathered, of_a
    if "x" in needs:
        at_gathered = grouped_gemm.times(engine, at_low, plan.ends, a)
        found = found._replace(x=combine(at_gathered, plan))
    return found


def _all_forward(inputs: Inputs, base: Tensor | None, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    low = inputs.x @ inputs.a.flatten(0, 1).t()
    weighted = _each(low, *_dense_weights(inputs.weights_of, plan))
    if base is not None and base.dtype == low.dtype:
        return torch.addmm(base, weighted, _columns(inputs.b)), low
    return _onto(base, weighted @ _columns(inputs.b)), low


def _all_backward(
    grad: Tensor, low: Tensor, inputs: Inputs, plan: RoutePlan, needs: frozenset[str]
) -> Gradients:
    experts, rank, _ = inputs.a.shape
    dense, idle = _dense_weights(inputs.weights_of, plan)
    found = Gradients()
    if "b" in needs:
        columns = _each(low, dense, idle).t() @ grad
        split_columns = columns.view(experts, rank, columns.shape[1])
        found = found._replace(b=split_columns.transpose(1, 2).contiguous())
    if needs == {"b"}:
        return found
    at_weighted = grad @ _columns(inputs.b).t()
    if "weights_of" in needs:
        split = (-1, experts, rank)
        of_experts = _dots(at_weighted.view(split), low.view(split), dense)
        # one more column, of 0, for the dropped pairs
        slots = functional.pad(of_experts, (0, 1)).gather(1, experts_of_slots(plan))
        found = found._replace(weights_of=slots)
    at_low = _each(at_weighted, dense, idle)
    if "a" in needs:
        found = found._replace(a=(at_low.t() @ inputs.x).view(inputs.a.shape))
    if "x" in needs:
        found = found._replace(x=at_low @ inputs.a.flatten(0, 1))
    return found


def _ready(inputs: Inputs, asked: Asked) -> tuple[Backend, Tensor, Tensor]:
    """Return who computes grouped GEMMs, and a and b, with zeros added to a rank it cannot take.

    Raises:
        ValueError: the backend asked for cannot run this.
    """
    if asked == "loop":
        return "loop", inputs.a, inputs.b
    missing = -inputs.a.shape[1] % (grouped_gemm.ALIGNMENT_BYTES // inputs.a.element_size())
    a, b = inputs.a, inputs.b
    if missing:
        a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    reason = grouped_gemm.refuses(inputs.x, a, b)
    if reason is None:
        return "grouped_mm", a, b
    if asked == "grouped_mm":
        raise ValueError(f"grouped_mm cannot run this: {reason}")
    return "loop", inputs.a, inputs.b


def _rows(inputs: Inputs, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Return the tokens [R] and the weights [R, 1] of the rows that are computed."""
    rows = plan.pairs.shape[0]
    if plan.dropped and plan.ends.device.type == "cpu":
        rows = int(plan.ends[-1])
    shares = inputs.weights_of.reshape(-1).index_select(0, plan.pairs[:rows])
    return plan.tokens[:rows], shares[:, None]


def _dense_weights(weights_of: Tensor, plan: RoutePlan) -> tuple[Tensor, Tensor]:
    """Return the weight of every adapter, [T, E], and where it is not selected: there 0."""
    experts_of, experts = experts_of_slots(plan), plan.ends.shape[0]
    dense = weights_of.new_zeros(weights_of.shape[0], experts + 1)
    # slot by slot, so that an adapter that is selected twice is added up in one order
    for slot in range(plan.slots):
        at = experts_of[:, slot : slot + 1]
        dense.scatter_(1, at, dense.gather(1, at) + weights_of[:, slot : slot + 1])
    idle = torch.ones_like(dense, dtype=torch.bool).scatter_(1, experts_of, False)
    return dense[:, :experts], idle[:, :experts]


def _each(columns: Tensor, dense: Tensor, idle: Tensor) -> Tensor:
    """Return columns [T, E*r] times the weight [T, E] of their adapter, 0 where it is idle."""
    tokens, experts = dense.shape
    split = columns.view(tokens, experts, columns.shape[1] // experts)
    # an overflow times the weight 0 would not be 0
    weighted = (split * dense[:, :, None]).masked_fill_(idle[:, :, None], 0)
    return weighted.to(columns.dtype).view(columns.shape)


def _columns(b: Tensor) -> Tensor:
    """Return b [E, m, r] as one matrix [E*r, m]."""
    return b.transpose(1, 2).flatten(0, 1)


def _dots(left: Tensor, right: Tensor, wide: Tensor) -> Tensor:
    """Return the products of the last dimension, summed in the dtype of `wide`."""
    return (left.to(wide.dtype) * right).sum(-1)


def _of_slots(rows: Tensor, plan: RoutePlan) -> Tensor:
    """Return values of the rows [R] as values of the slots, [T, K], 0 for dropped pairs."""
    if plan.dropped:
        rows = rows.masked_fill(~plan.live[: rows.shape[0]], 0)
    out = rows.new_zeros(plan.pairs.shape[0])
    return out.index_copy_(0, plan.pairs[: rows.shape[0]], rows).view(plan.places.shape)


def _onto(base: Tensor | None, out: Tensor) -> Tensor:
    """Return base + out in the dtype of base; uses up `out`."""
    if base is None:
        return out
    return out.add_(base) if base.dtype == out.dtype else base + out.to(base.dtype)
