"""Forward and backward of the grouped expert feed-forward, as functions of tensors.

T tokens, K slots per token, E experts, P = T*K pairs, d hidden size, i intermediate size,
R rows that are computed: the live pairs where their number is known without waiting (CPU) and may
be the size of a tensor (`Kind.compact`), else P.

Rows of dropped pairs that are among the R are never initialised. Two things leave the order of the
plan, the sums over slots and the gradient of the routing weights; both leave those rows out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels import expert_activations, grouped_gemm
from adaconvert.kernels.expert_activations import Activation
from adaconvert.kernels.grouped_gemm import Backend
from adaconvert.kernels.plan import RoutePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What experts compute and who computes it.

    Attributes:
        activation: between the two matrices.
        glu: the experts have a gate.
        backend: of the GEMMs.
        triton: Triton's kernels run the gather, the first GEMM and the activation as one.
        compact: R is the number of live pairs on a CPU. Not in a compiled graph, where sizes that
            depend on values would break it.
    """

    activation: Activation
    glu: bool
    backend: Backend
    triton: bool = False
    compact: bool = True


class Inputs(NamedTuple):
    """What is differentiated.

    Attributes:
        x: [T, d].
        weights_of: [T, K] float32 or float64.
        first: [E, 2i, d] gate over up with a gate, [E, i, d] up without; as `down` and the biases
            of any dtype, they are computed in that of x.
        down: [E, d, i].
        first_bias: [E, 2i] or [E, i].
        down_bias: [E, d].
    """

    x: Tensor
    weights_of: Tensor
    first: Tensor
    down: Tensor
    first_bias: Tensor | None
    down_bias: Tensor | None


class Gradients(NamedTuple):
    """Of each of `Inputs`; None where it was not asked for."""

    x: Tensor | None = None
    weights_of: Tensor | None = None
    first: Tensor | None = None
    down: Tensor | None = None
    first_bias: Tensor | None = None
    down_bias: Tensor | None = None


def run_forward(inputs: Inputs, plan: RoutePlan, kind: Kind) -> tuple[Tensor, Tensor]:
    """Return the output [T, d] and the pre-activations [R, 2i] or [R, i] that backward needs.

    The routing weights are multiplied into the hidden values, so that combining only adds up.
    """
    inputs = _in_dtype_of_x(inputs)
    rows = _rows(plan, kind)
    shares = inputs.weights_of.reshape(-1)[plan.pairs[:rows]]
    pre, hidden = _through_activation(inputs, plan, kind, shares)
    out = grouped_gemm.times_transposed(kind.backend, hidden, plan.ends, inputs.down)
    if inputs.down_bias is not None:
        out += _bias_of_rows(inputs.down_bias, plan, rows).to(shares.dtype) * shares[:, None]
    return combine(out, plan), pre


def _through_activation(
    inputs: Inputs, plan: RoutePlan, kind: Kind, shares: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the pre-activations and the weighted hidden values [R, i]."""
    rows = shares.shape[0]
    if kind.triton:
        from adaconvert.kernels import triton_grouped

        return triton_grouped.run(inputs, plan, kind, rows)
    gathered = inputs.x.index_select(0, plan.tokens[:rows])
    pre = grouped_gemm.times_transposed(kind.backend, gathered, plan.ends, inputs.first)
    del gathered
    if inputs.first_bias is not None:
        pre += _bias_of_rows(inputs.first_bias, plan, rows)
    return pre, expert_activations.forward(pre, shares, kind.activation, glu=kind.glu)


def run_backward(
    grad: Tensor, pre: Tensor, inputs: Inputs, plan: RoutePlan, kind: Kind, needs: frozenset[str]
) -> Gradients:
    """Return the gradients of the inputs that `needs` names, in the dtype of x.

    Args:
        grad: [T, d], of the output, of any strides.
        pre: what `run_forward` returned.
    """
    inputs = _in_dtype_of_x(inputs)
    rows = _rows(plan, kind)
    shares = inputs.weights_of.reshape(-1)[plan.pairs[:rows]]
    at_rows = grad.index_select(0, plan.tokens[:rows])
    inner = _at_activation(grad, at_rows, pre, shares, inputs, plan, kind)
    found = _after_activation(at_rows, shares, inner, inputs, plan, kind, needs)
    at_pre = inner.pre
    # freed before the rows of x are gathered again
    del at_rows, inner
    return _before_activation(at_pre, inputs, plan, kind, needs, found)


def _at_activation(
    grad: Tensor,
    at_rows: Tensor,
    pre: Tensor,
    shares: Tensor,
    inputs: Inputs,
    plan: RoutePlan,
    kind: Kind,
) -> expert_activations.Gradients:
    """Return the gradients between the two matrices."""
    if kind.triton:
        from adaconvert.kernels import triton_grouped_backward

        return triton_grouped_backward.run(grad, pre, inputs, plan, kind)
    at_hidden = grouped_gemm.times(kind.backend, at_rows, plan.ends, inputs.down)
    return expert_activations.backward(pre, shares, at_hidden, kind.activation, glu=kind.glu)


def _after_activation(
    at_rows: Tensor,
    shares: Tensor,
    inner: expert_activations.Gradients,
    inputs: Inputs,
    plan: RoutePlan,
    kind: Kind,
    needs: frozenset[str],
) -> Gradients:
    """Return the gradients of the routing weights, the last matrix and its bias."""
    found = Gradients()
    if "weights_of" in needs:
        at_weights = inner.weights
        if inputs.down_bias is not None:
            bias = _bias_of_rows(inputs.down_bias, plan, at_rows.shape[0])
            at_weights += (at_rows * bias.to(at_weights.dtype)).sum(-1)
        found = found._replace(weights_of=_of_slots(at_weights, plan))
    if "down" in needs:
        down = grouped_gemm.outer(kind.backend, at_rows, inner.hidden, plan.ends)
        found = found._replace(down=down)
    if "down_bias" in needs:
        weighted = (at_rows * shares[:, None]).to(at_rows.dtype)
        found = found._replace(down_bias=grouped_gemm.sums(kind.backend, weighted, plan.ends))
    return found


def _before_activation(
    at_pre: Tensor,
    inputs: Inputs,
    plan: RoutePlan,
    kind: Kind,
    needs: frozenset[str],
    found: Gradients,
) -> Gradients:
    """Return `found` with the gradients of the first matrix, its bias and x."""
    if "first" in needs:
        gathered = inputs.x.index_select(0, plan.tokens[: at_pre.shape[0]])
        first = grouped_gemm.outer(kind.backend, at_pre, gathered, plan.ends)
        found = found._replace(first=first)
    if "first_bias" in needs:
        found = found._replace(first_bias=grouped_gemm.sums(kind.backend, at_pre, plan.ends))
    if "x" in needs:
        at_gathered = grouped_gemm.times(kind.backend, at_pre, plan.ends, inputs.first)
        found = found._replace(x=combine(at_gathered, plan))
    return found


def _in_dtype_of_x(inputs: Inputs) -> Inputs:
    """Return the inputs with matrices and biases in the dtype of x.

    Under autocast they differ; cast here, the copies are gone when forward or backward is over.
    """
    cast = [None if tensor is None else tensor.to(inputs.x.dtype) for tensor in inputs]
    return Inputs(*cast)._replace(weights_of=inputs.weights_of)  # type: ignore[arg-type]


def combine(rows: Tensor, plan: RoutePlan) -> Tensor:
    """Return the sum over each token's slots of their rows, [T, d]; uses up `rows` [R, d].

    A gather of each token's rows added up in the order of its slots, in float32: no atomics, so
    the same bits every time.
    """
    tokens = plan.places.shape[0]
    if not rows.shape[0]:
        return rows.new_zeros(tokens, rows.shape[1])
    if not plan.dropped:
        return functional.embedding_bag(plan.places, rows, mode="sum")
    if rows.shape[0] < plan.pairs.shape[0]:
        kept = plan.places < rows.shape[0]
        ends = kept.sum(1).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        return functional.embedding_bag(plan.places[kept], rows, starts, mode="sum")
    rows.masked_fill_(~plan.live[:, None], 0)
    return functional.embedding_bag(plan.places, rows, mode="sum")


def _of_slots(rows: Tensor, plan: RoutePlan) -> Tensor:
    """Return values of the rows [R] as values of the slots, [T, K], 0 for dropped pairs."""
    if plan.dropped:
        rows = rows.masked_fill(~plan.live[: rows.shape[0]], 0)
    out = rows.new_zeros(plan.pairs.shape[0])
    return out.index_copy_(0, plan.pairs[: rows.shape[0]], rows).view(plan.places.shape)


def _bias_of_rows(bias: Tensor, plan: RoutePlan, rows: int) -> Tensor:
    return bias.index_select(0, grouped_gemm.expert_of_rows(plan.ends, rows))


def _rows(plan: RoutePlan, kind: Kind) -> int:
    """Return R; looks at the plan only where that does not stall a device."""
    if kind.compact and plan.dropped and plan.ends.device.type == "cpu":
        return int(plan.ends[-1])
    return plan.pairs.shape[0]
