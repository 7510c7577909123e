"""The plan of a routing in two kernels around one running sum (K0), in Triton.

A stable counting sort: each block of pairs counts its experts; the running sum over (expert, block)
says where a block's pairs of an expert begin; a pair's place is that plus its rank among the
earlier pairs of its block and expert. No atomics on memory, no host synchronisation, and the plan
is that of `plan.sort_pairs` to the bit.

Shapes: T tokens, K slots, E experts, P = T*K pairs, B blocks of pairs. A pair of no expert counts
as one of expert E.

Source: counting sort from per-block histograms as in Satish et al. 2009, "Designing Efficient
Sorting Algorithms for Manycore GPUs", section 4, with one digit.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: most experts a block counts at once.
MOST = 4095
#: pairs of a block, of which all are compared with all.
_BLOCK = 128


@triton.jit
def _experts(experts_of, pairs, total, EXPERTS: tl.constexpr):
    """Return the expert of each pair, EXPERTS for one of none or beyond the last pair."""
    # compared in int64, because EXPERTS need not fit in the type of the indices
    inside = pairs < total
    found = tl.load(experts_of + pairs, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (found >= 0) & (found < EXPERTS), found, EXPERTS).to(tl.int32)


@triton.jit
def _count(
    experts_of,
    counts,
    total,
    EXPERTS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Pairs of each expert in each block, [E + 1, B]; grid (B,)."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    if REVERSE:
        block = blocks - 1 - block
    pairs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # what is beyond the last pair counts as dropped in the last block, after which nothing begins
    found = tl.histogram(_experts(experts_of, pairs, total, EXPERTS), BINS)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins.to(tl.int64) * blocks + block, found, mask=bins <= EXPERTS)


@triton.jit
def _place(
    experts_of,
    upto,
    pairs_at,
    tokens_at,
    places,
    live,
    ends,
    total,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """The fields of the plan from the running sum of the counts, [E + 1, B]; grid (B,)."""
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    if REVERSE:
        block = blocks - 1 - block
    numbers = tl.arange(0, BLOCK)
    pairs = block.to(tl.int64) * BLOCK + numbers
    known = pairs < total
    experts = _experts(experts_of, pairs, total, EXPERTS)
    earlier = (experts[:, None] == experts[None, :]) & (numbers[:, None] > numbers[None, :])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    cell = experts.to(tl.int64) * blocks + block
    # the sum up to the cell before is where this one begins
    place = tl.load(upto + cell - 1, mask=known & (cell > 0), other=0) + rank
    count = tl.load(upto + tl.full([], EXPERTS, tl.int64) * blocks - 1)
    tl.store(pairs_at + place, pairs, mask=known)
    tl.store(tokens_at + place, pairs // SLOTS, mask=known)
    tl.store(places + pairs, place.to(tl.int64), mask=known)
    tl.store(live + pairs, pairs < count, mask=known)
    if block == 0:
        bins = tl.arange(0, BINS)
        last = (bins.to(tl.int64) + 1) * blocks - 1
        inside = bins < EXPERTS
        tl.store(ends + bins, tl.load(upto + last, mask=inside, other=0), mask=inside)


def refuses(facts: dict[str, Any]) -> str | None:
    """Return why the kernels cannot plan a call of these facts, None when they can."""
    if facts.get("experts", 0) > MOST:
        return f"{facts['experts']} experts are more than {MOST}"
    if facts.get("tokens", 0) * facts.get("slots", 0) >= 2**31:
        return "2^31 pairs or more"
    return None


def route_plan(
    experts_of: Tensor, experts: int, *, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `plan.sort_pairs` does; `reverse` starts the last program first.

    Args:
        experts_of: [T, K] integers.
        experts: E.
        reverse: shows in a test that no program waits for another.
    """
    total = experts_of.numel()
    flat = experts_of.contiguous()
    device = flat.device
    pairs = torch.empty(total, dtype=torch.int64, device=device)
    tokens, places = (
        torch.empty_like(pairs),
        torch.empty(flat.shape, dtype=torch.int64, device=device),
    )
    live = torch.empty(total, dtype=torch.bool, device=device)
    if not total:
        return pairs, tokens, torch.zeros(experts, dtype=torch.int32, device=device), places, live
    ends = torch.empty(experts, dtype=torch.int32, device=device)
    blocks = triton.cdiv(total, _BLOCK)
    counts = torch.empty(experts + 1, blocks, dtype=torch.int32, device=device)
    constants = {
        "EXPERTS": experts,
        "REVERSE": reverse,
        "BLOCK": _BLOCK,
        "BINS": triton.next_power_of_2(experts + 1),
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(flat):
        _count[(blocks,)](flat, counts, total, **constants)
        upto = counts.view(-1).cumsum(0, dtype=torch.int32)
        out = (pairs, tokens, places, live, ends)
        _place[(blocks,)](flat, upto, *out, total, SLOTS=flat.shape[1], **constants)
    return pairs, tokens, ends, places, live
