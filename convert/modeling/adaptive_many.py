"""All of a feed-forward network, or the part some token selected, for many tokens at once.

Shapes: T tokens, d hidden size, f neurons, E experts, m = `width` neurons of an expert, n neurons
of the part that runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive_gather import ExpertWeights, plain, selected_rows, unrecorded, weighted_rows
from .adaptive_layout import neuron_major, rows_of

#: integers as wide as a dtype: multiplied by 0 they are zero whatever number they stood for.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


def plainly(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    return dense(x, weights, mask, gated, None)[0]


def dense(
    x: Tensor,
    weights: ExpertWeights,
    mask: Tensor | None,
    gated: Tensor | None,
    factors: Tensor | None,
) -> tuple[Tensor, int]:
    hidden = _hidden(x, weights, gated, weights.gate, weights.up)
    if mask is not None:
        hidden = _masked(hidden, mask, factors, weights.shared, fresh=hidden is not gated)
    return _project(hidden, weights), hidden.numel()


def _hidden(
    x: Tensor,
    weights: ExpertWeights,
    gated: Tensor | None,
    gate: Tensor | None,
    up: Tensor,
    rows: Tensor | None = None,
) -> Tensor:
    """Return the hidden units [T, n]; of some rows of the matrices when `rows` says which."""

    def bias(whole: Tensor | None) -> Tensor | None:
        return whole if whole is None or rows is None else whole[rows]

    if gated is None:
        first = (up, weights.up_bias) if gate is None else (gate, weights.gate_bias)
        gated = weights.activation(functional.linear(x, first[0], bias(first[1])))
    if gate is None:
        return gated
    other = functional.linear(x, up, bias(weights.up_bias))
    if torch.is_grad_enabled() or gated.dtype != other.dtype:
        return gated * other
    return other.mul_(gated)


def _masked(
    hidden: Tensor, mask: Tensor, factors: Tensor | None, shared: int, *, fresh: bool
) -> Tensor:
    """Return the hidden units with those of unselected experts zero, even where they are not
    finite; in place where nothing is recorded and `fresh` says that nobody else holds them."""
    bits = _BITS.get(hidden.dtype)
    if fresh and factors is None and bits is not None and not torch.is_grad_enabled():
        # 3-14 times faster than `masked_fill_`
        routed = hidden[:, shared:] if shared else hidden
        parts = torch.unflatten(routed.view(bits), -1, (mask.shape[1], -1))
        parts.mul_(mask.to(bits).unsqueeze(-1))
        return hidden
    parts = torch.unflatten(hidden[:, shared:], -1, (mask.shape[1], -1))
    parts = parts.masked_fill(mask.logical_not().unsqueeze(-1), 0)
    if factors is not None:
        parts = parts * factors.to(hidden.dtype).unsqueeze(-1)
    routed = parts.flatten(1)
    return torch.cat([hidden[:, :shared], routed], dim=-1) if shared else routed


def _project(hidden: Tensor, weights: ExpertWeights) -> Tensor:
    """Return the output of all hidden units, [T, f] -> [T, d].

    One bfloat16 token through a neuron-major matrix goes as a weighted sum of rows: there `linear`
    reaches 0.7-0.8 of its speed on the stock layout, the sum 1.0-1.7.
    """
    down = weights.down
    one = len(hidden) == 1 and hidden.dtype == torch.bfloat16 == down.dtype
    if one and unrecorded() and plain(weights) and neuron_major(down):
        rows = torch.arange(down.shape[1])
        out = weighted_rows(down.t(), rows, hidden[0], torch.get_num_threads())
        return _add(out, weights.down_bias)
    return functional.linear(hidden, down, weights.down_bias)


def _add(out: Tensor, bias: Tensor | None) -> Tensor:
    return out if bias is None else out + bias


def union(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None
) -> tuple[Tensor, int]:
    touched = mask.any(dim=0)
    rows = selected_rows(touched, weights.width, weights.shared)
    gate = None if weights.gate is None else weights.gate[rows]
    hidden = _hidden(
        x, weights, None if gated is None else gated[:, rows], gate, weights.up[rows], rows
    )
    if hidden.shape[1] > weights.shared:
        hidden = _masked(hidden, mask[:, touched], None, weights.shared, fresh=True)
    down = rows_of(weights.down)
    if down is not None:
        out = _add(hidden @ down[rows], weights.down_bias)
    else:
        out = functional.linear(hidden, weights.down[:, rows], weights.down_bias)
    return out, hidden.numel()


def grouped(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None
) -> tuple[Tensor, int]:
    expert, token = mask.t().nonzero(as_tuple=True)
    ends = mask.sum(dim=0).cumsum(0).to(torch.int32)
    shared, width = weights.shared, weights.width

    def matrices(rows: Tensor) -> Tensor:
        return torch.unflatten(rows[shared:], 0, (-1, width))

    def product(matrix: Tensor) -> Tensor:
        return functional.grouped_mm(taken, matrices(matrix).transpose(1, 2), offs=ends)

    taken = x.index_select(0, token)
    if gated is None:
        first = weights.activation(product(weights.up if weights.gate is None else weights.gate))
    else:
        first = torch.unflatten(gated[:, shared:], -1, (-1, width))[token, expert]
    hidden = first if weights.gate is None else first * product(weights.up)
    down = rows_of(weights.down)
    assert down is not None
    parts = functional.grouped_mm(hidden, matrices(down), offs=ends)
    out = _always(x, weights, gated).index_add_(0, token, parts)
    return out, hidden.numel() + x.shape[0] * shared


def _always(x: Tensor, weights: ExpertWeights, gated: Tensor | None) -> Tensor:
    """Return what every token gets whatever is selected, [T, d]: shared neurons and bias."""
    front = slice(0, weights.shared)
    if not weights.shared:
        out = x.new_zeros(x.shape[0], weights.down.shape[0])
        return out if weights.down_bias is None else out + weights.down_bias
    gate = None if weights.gate is None else weights.gate[front]
    part = None if gated is None else gated[:, front]
    hidden = _hidden(x, weights, part, gate, weights.up[front], torch.arange(weights.shared))
    return functional.linear(hidden, weights.down[:, front], weights.down_bias)
