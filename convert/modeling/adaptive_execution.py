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

try:
    from adaconvert.kernels import dispatch
except ImportError:
    _installed: Any = None
else:
    _installed = dispatch

from .adaptive_batch import batch
from .adaptive_compiled import COMPILED_LIMIT, compiles, gather, gather_limit, is_small
from .adaptive_decode import Decoder, batch_step, decode_step
from .adaptive_gather import (
    ExpertWeights,
    unrecorded,
)
from .adaptive_layout import check_rows, pack, prepare, rows_of
from .adaptive_many import dense, grouped, plainly, union

__all__ = [
    "Decoder",
    "ExpertWeights",
    "decode_step",
    "gathered_pairs",
    "pack",
    "prepare",
    "run_experts",
    "run_routed",
]

#: interface of `adaconvert.kernels.dispatch` this file calls; another one is not used.
KERNELS_API = 1
#: tokens that are run one by one; with more of them the matrices are read once for all.
GATHER_TOKENS = 4
#: share of the matrices, summed over the tokens, up to which gathering wins: compiled (one token of
#: a small network has a higher limit, `gather_limit`), uncompiled.
GATHER_LIMIT = (COMPILED_LIMIT, 0.4)
#: (tokens at least, share of the experts touched at most) for which the union wins.
UNION = ((64, 0.4), (8, 0.2))
#: share of the (token, expert) pairs, on one thread and on several, tokens and width for which
#: grouped float32 products win.
GROUPED_LIMIT, GROUPED_TOKENS, GROUPED_WIDTH = (0.25, 0.15), 64, 16


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
        The output [T, d] and how many (token, neuron) pairs were really computed; an output matrix
        that is run whole for few neurons counts as the pairs it would be of all matrices.
    """
    whole = mask is None and weights_per_expert is None
    if mask is None:
        mask = x.new_ones(x.shape[0], weights.count, dtype=torch.bool)
    kernel = _kernel(x, weights, mask, selected)
    if kernel is not None and path is None:
        named = {field.name: getattr(weights, field.name) for field in fields(weights)}
        out = kernel(x, mask, gated=gated, weights_per_expert=weights_per_expert, **named)
        return out, _neurons(weights, _counts(mask, selected))
    simple = weights_per_expert is None and _inference(x, weights)
    if simple and x.shape[0] > 1:
        check_rows(weights.down)
    if path == "gather" or (path is None and simple and 0 < x.shape[0] <= GATHER_TOKENS):
        counts = _counts(mask, selected)
        if path == "gather" or _gather_pays(x, weights, counts, gated):
            out = _gather(x, weights, mask, gated)
            return out, gathered_pairs(weights, counts, gate_known=gated is not None)
    chosen = path or (_batch_path(x, weights, mask, selected) if simple else "dense")
    if chosen == "union":
        return union(x, weights, mask, gated)
    if chosen == "grouped":
        return grouped(x, weights, mask, gated)
    if simple and not whole and x.shape[0] > 1:
        return batch(x, weights, mask, gated, plainly), x.shape[0] * weights.up.shape[0]
    return dense(x, weights, None if whole else mask, gated, weights_per_expert)


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
    return batch_step(x, decoder, rule, number, plainly)


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
        least = max(least, _grouped_limit())
    return int(number) > least * weights.count


def _kernel(x: Tensor, weights: ExpertWeights, mask: Tensor, selected: int | None) -> Any:
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
        selected=selected,
        glu=weights.gate is not None,
        activation=weights.activation,
        grad=torch.is_grad_enabled(),
    )


def _inference(x: Tensor, weights: ExpertWeights) -> bool:
    """Return whether this call only computes: plain CPU tensors of one dtype, nothing recorded."""
    if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or not unrecorded():
        return False
    return weights.up.dtype == x.dtype and weights.ordinary


def _counts(mask: Tensor, selected: int | None) -> list[int]:
    """Return how many experts each token runs; waits for a device where that is not known."""
    return mask.sum(dim=1).tolist() if selected is None else [selected] * len(mask)


def _neurons(weights: ExpertWeights, counts: list[int]) -> int:
    return len(counts) * weights.shared + sum(counts) * weights.width


def gathered_pairs(weights: ExpertWeights, counts: list[int], *, gate_known: bool = False) -> int:
    """Return the pairs computed for tokens that gather, as `run_experts` counts them.

    Args:
        counts: how many experts each token runs.
        gate_known: the router has run the gate (`up` of a network without).
    """
    pairs = _neurons(weights, counts)
    if rows_of(weights.down) is not None:
        return pairs
    matrices = 1 + (weights.gate is not None) + (not gate_known)
    return pairs + (len(counts) * weights.up.shape[0] - pairs) // matrices


def _gather_pays(
    x: Tensor, weights: ExpertWeights, counts: list[int], gated: Tensor | None
) -> bool:
    share = _neurons(weights, counts) / weights.up.shape[0]
    matrices = (weights.up, weights.up if weights.gate is None else weights.gate)
    if any(matrix.stride(1) != 1 for matrix in matrices):
        return False
    limit = gather_limit(weights) if len(counts) == 1 else GATHER_LIMIT[0]
    if share > limit or (weights.count in counts and not is_small(weights)):
        return False
    return share <= GATHER_LIMIT[1] or compiles(x, weights, gated)


def _batch_path(x: Tensor, weights: ExpertWeights, mask: Tensor, selected: int | None) -> str:
    tokens, experts = mask.shape
    if tokens < UNION[-1][0]:
        return "dense"
    if selected is not None and selected > experts * max(_grouped_limit(), UNION[0][1]):
        return "dense"
    # largest values of bytes are many times faster than `any` of booleans
    touched = int(torch.count_nonzero(mask.view(torch.uint8).amax(dim=0))) / experts
    if any(tokens >= least and touched <= most for least, most in UNION):
        return "union"
    if tokens < GROUPED_TOKENS or not _groupable(x, weights):
        return "dense"
    share = int(torch.count_nonzero(mask)) / mask.numel()
    return "grouped" if share <= _grouped_limit() else "dense"


def _grouped_limit() -> float:
    return GROUPED_LIMIT[torch.get_num_threads() > 1]


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


# -- few tokens


def _gather(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    if x.shape[0] == 1:
        return gather(x, weights, mask[0], gated)
    outs = []
    for token in range(len(x)):
        part = None if gated is None else gated[token : token + 1]
        outs.append(gather(x[token : token + 1], weights, mask[token], part))
    return torch.cat(outs)
