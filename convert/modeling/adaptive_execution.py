"""Feed-forward experts executed so that what is not selected costs as little as possible.

Expert e of a network with f neurons is the neurons [shared + e*m, shared + (e+1)*m); the first
`shared` neurons always run and the output bias is added once. `run_experts` picks one of four paths
from facts, not from timings, so that the same call takes the same path in every run:

- dense: everything, then the unselected hidden units are zeroed. The reference; the only path with
  gradients, and the one for other devices, autocast, tracing and tensor subclasses. Compiled where
  nothing is recorded (`adaptive_batch`).
- gather: token by token, the selected rows only. At most `GATHER_TOKENS` tokens whose selected
  neurons together are at most `GATHER_LIMIT` of the matrices.
- union: rows any token selected, masked. Prefill of tokens that share their experts.
- grouped: one product per expert over its tokens. Many tokens, float32, few experts each.

Measured on an AMD EPYC (AVX-512 with bfloat16), torch 2.13, one thread, as speed-up over `linear`,
sizes 576x1536 | 2048x8192, experts of 32, one token (scripts/bench/decode.csv, part "ffn"): gather
compiled, float32 at a half 1.5 | 1.6, at a quarter 2.1 | 3.2, bfloat16 1.8 | 2.6 and 2.3 | 4.7;
uncompiled 0.9-1.2 at a half and 1.7-2.3 at a quarter. Many tokens: part "prefill" there.

Shapes: T tokens, d hidden size, f neurons, E experts, m = `width` neurons of an expert, K selected
experts, n selected neurons.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

try:
    from adaconvert.kernels import dispatch
except ImportError:
    _installed: Any = None
else:
    _installed = dispatch

from .adaptive_batch import batch
from .adaptive_compiled import COMPILED_LIMIT, compiles, gather
from .adaptive_decode import Decoder, batch_step, decode_step
from .adaptive_gather import (
    ExpertWeights,
    plain,
    selected_rows,
    unrecorded,
    weighted_rows,
)
from .adaptive_layout import check_rows, neuron_major, pack, prepare, rows_of

__all__ = [
    "Decoder",
    "ExpertWeights",
    "decode_step",
    "pack",
    "prepare",
    "run_experts",
    "run_routed",
]

#: interface of `adaconvert.kernels.dispatch` this file calls; another one is not used.
KERNELS_API = 1
#: tokens that are run one by one; with more of them the matrices are read once for all.
GATHER_TOKENS = 4
#: share of the matrices, summed over the tokens, up to which gathering wins: compiled, uncompiled.
GATHER_LIMIT = (COMPILED_LIMIT, 0.4)
#: integers as wide as a dtype: multiplied by 0 they are zero whatever number they stood for.
_BITS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
#: (tokens at least, share of the experts touched at most) for which the union wins.
UNION = ((64, 0.4), (8, 0.2))
#: share of the (token, expert) pairs, tokens and width for which grouped float32 products win.
GROUPED_LIMIT, GROUPED_TOKENS, GROUPED_WIDTH = 0.25, 64, 16


def run_experts(
    x: Tensor,
    weights: ExpertWeights,
    mask: Tensor | None,
    *,
    gated: Tensor | None = None,
    weights_per_expert: Tensor | None = None,
    selected: int | None = None,
    path: str | None = None,
) -> tuple[Tensor, int]:
    """Return what the selected experts and the shared neurons make of each token.

    Args:
        x: [T, d].
        weights: the network's.
        mask: [T, E] bool, which experts run; None for all. A token with none gets the shared
            neurons and the output bias.
        gated: [T, f] activated gate (activated `up` of a network without gate) where the router
            has computed it already; then that matrix is not run again.
        weights_per_expert: [T, E] factor of each expert's part; one when not given.
        selected: how many experts each token runs, where the caller knows; saves counting.
        path: run this path ("dense", "gather", "union", "grouped") instead of the one that suits.

    Returns:
        The output [T, d] and how many (token, neuron) pairs were really computed.
    """
    whole = mask is None and weights_per_expert is None
    if mask is None:
        mask = x.new_ones(x.shape[0], weights.count, dtype=torch.bool)
    kernel = _kernel(x, weights, mask)
    if kernel is not None and path is None:
        named = {field.name: getattr(weights, field.name) for field in fields(weights)}
        out = kernel(x, mask, gated=gated, weights_per_expert=weights_per_expert, **named)
        return out, _neurons(weights, mask.sum(dim=1).tolist())
    simple = weights_per_expert is None and _inference(x, weights)
    if simple and x.shape[0] > 1:
        check_rows(weights.down)
    if path == "gather" or (path is None and simple and 0 < x.shape[0] <= GATHER_TOKENS):
        counts: list[int] = mask.sum(dim=1).tolist() if selected is None else [selected] * len(x)
        if path == "gather" or _gather_pays(x, weights, counts, gated):
            return _gather(x, weights, mask, gated), _neurons(weights, counts)
    chosen = path or (_batch_path(x, weights, mask, selected) if simple else "dense")
    if chosen == "union":
        return _union(x, weights, mask, gated)
    if chosen == "grouped":
        return _grouped(x, weights, mask, gated)
    if simple and not whole and x.shape[0] > 1:
        return batch(x, weights, mask, gated, _plainly), x.shape[0] * weights.up.shape[0]
    return _dense(x, weights, None if whole else mask, gated, weights_per_expert)


def run_routed(
    x: Tensor, decoder: Decoder, rule: str, number: float
) -> tuple[Tensor, Tensor] | None:
    """Return what `run_experts` would, router and selection included, as one compiled graph.

    None where that is not possible or another path may be faster; the caller scores, selects and
    calls `run_experts`.

    Args:
        x: [T, d].
        decoder: of the network.
        rule: "top-k", "dynamic-k" or "threshold", as in `adaptive_select`.
        number: k, tau or threshold.

    Returns:
        The output [T, d] and the mask of the experts that made it, bool [T, E]; of one token only
        these are computed, of several all.
    """
    if x.shape[0] == 1:
        return decode_step(x, decoder, rule, number)
    if not _runs_whole(x.shape[0], decoder.weights, rule, number):
        return None
    check_rows(decoder.weights.down)
    return batch_step(x, decoder, rule, number, _plainly)


# -- which path


def _runs_whole(tokens: int, weights: ExpertWeights, rule: str, number: float) -> bool:
    """Return whether the rule alone says that all of the network runs, whatever is selected."""
    if rule != "top-k":
        # few tokens that share few experts gather
        return GATHER_TOKENS < tokens < UNION[-1][0]
    neurons = weights.shared + int(number) * weights.width
    if tokens <= GATHER_TOKENS:
        return tokens * neurons > GATHER_LIMIT[0] * weights.up.shape[0]
    least = max([most for start, most in UNION if tokens >= start], default=0.0)
    if tokens >= GROUPED_TOKENS:
        least = max(least, GROUPED_LIMIT)
    return int(number) > least * weights.count


def _kernel(x: Tensor, weights: ExpertWeights, mask: Tensor) -> Any:
    """Return an installed kernel for this call; none on the CPU, whose paths are in this file."""
    if x.device.type == "cpu" or _installed is None or _installed.API_VERSION != KERNELS_API:
        return None
    if weights.down.shape[0] != x.shape[1]:
        # kernels are told one width for what comes in and goes out
        return None
    return _installed.select(
        "expert_ffn",
        device=x.device.type,
        dtype=x.dtype,
        tokens=x.shape[0],
        hidden=x.shape[1],
        neurons=weights.up.shape[0],
        experts=mask.shape[1],
        width=weights.width,
        shared=weights.shared,
        glu=weights.gate is not None,
        grad=torch.is_grad_enabled(),
    )


def _inference(x: Tensor, weights: ExpertWeights) -> bool:
    """Return whether this call only computes: plain CPU tensors of one dtype, nothing recorded."""
    if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or not unrecorded():
        return False
    return weights.up.dtype == x.dtype and weights.ordinary


def _neurons(weights: ExpertWeights, counts: list[int]) -> int:
    return len(counts) * weights.shared + sum(counts) * weights.width


def _gather_pays(
    x: Tensor, weights: ExpertWeights, counts: list[int], gated: Tensor | None
) -> bool:
    share = _neurons(weights, counts) / weights.up.shape[0]
    matrices = (weights.up, weights.up if weights.gate is None else weights.gate)
    if any(matrix.stride(1) != 1 for matrix in matrices):
        return False
    if share > GATHER_LIMIT[0] or weights.count in counts:
        return False
    return share <= GATHER_LIMIT[1] or compiles(x, weights, gated)


def _batch_path(x: Tensor, weights: ExpertWeights, mask: Tensor, selected: int | None) -> str:
    tokens, experts = mask.shape
    if tokens < UNION[-1][0]:
        return "dense"
    if selected is not None and selected > experts * max(GROUPED_LIMIT, UNION[0][1]):
        return "dense"
    # largest values of bytes are many times faster than `any` of booleans
    touched = int(torch.count_nonzero(mask.view(torch.uint8).amax(dim=0))) / experts
    if any(tokens >= least and touched <= most for least, most in UNION):
        return "union"
    if tokens < GROUPED_TOKENS or not _groupable(x, weights):
        return "dense"
    share = int(torch.count_nonzero(mask)) / mask.numel()
    return "grouped" if share <= GROUPED_LIMIT else "dense"


def _groupable(x: Tensor, weights: ExpertWeights) -> bool:
    """Return whether `grouped_mm` is fast and takes these matrices (rows of 16-byte multiples)."""
    item, down = x.element_size(), rows_of(weights.down)
    rows = (weights.up, weights.up if weights.gate is None else weights.gate)
    biased = weights.gate_bias is not None or weights.up_bias is not None
    return (
        x.dtype == torch.float32
        and weights.width >= GROUPED_WIDTH
        and not biased
        and (weights.width * item) % 16 == 0
        and all(t.stride(1) == 1 and (t.stride(0) * item) % 16 == 0 for t in rows)
        and down is not None
        and (down.stride(0) * item) % 16 == 0
        and all(t.data_ptr() % 16 == 0 for t in (*rows, down))
    )


# -- dense


def _plainly(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    return _dense(x, weights, mask, gated, None)[0]


def _dense(
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


# -- many tokens


def _union(
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


def _grouped(
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


# -- few tokens


def _gather(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        return gather(x, weights, mask[0], gated)
    outs = []
    for token in range(len(x)):
        part = None if gated is None else gated[token : token + 1]
        outs.append(gather(x[token : token + 1], weights, mask[token], part))
    return torch.cat(outs)
