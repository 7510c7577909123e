"""Which rows each expert computes: (token, expert) pairs in the order of the experts.

T tokens, K slots per token, E experts, P = T*K pairs. A pair's number is token*K + slot; its place
is where it stands in the sorted order. Pairs of no expert (null experts, another device's experts)
are dropped: they stand last and are computed by nobody.

Source: sort, cumulative counts and inverse order as in ScatterMoE, Tan et al. 2024, arXiv
2403.08245, section 3; dropping pairs in the plan instead of computing and masking them is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaconvert.kernels import dispatch, triton_support

Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutePlan:
    """The order in which pairs are computed.

    Attributes:
        pairs: [P] int64, the pair at each place; one expert's pairs are neighbours and keep their
            order, dropped pairs are last.
        tokens: [P] int64, the token at each place.
        ends: [E] int32, the end of each expert's places; the last is the number of live pairs.
        places: [T, K] int64, the place of each pair: the inverse of `pairs`.
        live: [P] bool, the place is not of a dropped pair.
        slots: K.
        dropped: False promises that no pair is dropped; True promises nothing.
    """

    pairs: Tensor
    tokens: Tensor
    ends: Tensor
    places: Tensor
    live: Tensor
    slots: int
    dropped: bool


def route_plan(experts_of: Tensor, experts: int, *, may_drop: bool = True) -> RoutePlan:
    """Return the plan of a routing, made without waiting for the device and deterministically.

    On the CPU, where looking costs nothing, `dropped` is exact whatever `may_drop` says.

    Args:
        experts_of: [T, K] integers, the expert of each slot; below 0 or from `experts` on: none.
        experts: E, at least 1.
        may_drop: False promises that every slot has an expert, and saves the masks.

    Raises:
        TypeError: `experts_of` is not of integers.
        ValueError: it is not [T, K], or E is not positive.
    """
    _check(experts_of, experts)
    if torch.compiler.is_compiling() or experts_of.is_meta:
        found = torch.ops.adaconvert.route_plan(experts_of, experts)
    else:
        found = _plan(experts_of, experts)
    pairs, tokens, ends, places, live = found
    return RoutePlan(
        pairs=pairs,
        tokens=tokens,
        ends=ends,
        places=places,
        live=live,
        slots=experts_of.shape[1],
        dropped=_drops(ends, experts_of.numel(), may_drop),
    )


def sort_pairs(experts_of: Tensor, experts: int) -> Fields:
    """Return pairs, tokens, ends, places and live of the plan, in plain torch."""
    # int64, because E need not fit in the type of the indices
    flat = experts_of.reshape(-1).to(torch.int64)
    known = (flat >= 0) & (flat < experts)
    ordered, pairs = torch.where(known, flat, experts).sort(stable=True)
    bounds = torch.arange(experts, device=flat.device)
    ends = torch.searchsorted(ordered, bounds, right=True, out_int32=True)
    order = torch.arange(flat.numel(), device=flat.device)
    tokens = pairs // max(experts_of.shape[1], 1)
    places = torch.empty_like(pairs).scatter_(0, pairs, order).view(experts_of.shape)
    return pairs, tokens, ends, places, order < ends[-1]


def _plan(experts_of: Tensor, experts: int) -> Fields:
    """Return what `sort_pairs` does, by the kernel where one is selected."""
    # a CPU has a kernel in Triton's interpreter alone, which nobody runs unasked
    if experts_of.device.type == "cpu" and dispatch.wanted() != "triton":
        return sort_pairs(experts_of, experts)
    tokens, slots = experts_of.shape
    kernel = dispatch.select(
        "route_plan",
        device=experts_of.device.type,
        capability=triton_support.capability_on(experts_of.device),
        dtype=experts_of.dtype,
        tokens=tokens,
        slots=slots,
        experts=experts,
    )
    found: Fields = (kernel or sort_pairs)(experts_of, experts)
    return found


def _fake_plan(experts_of: Tensor, experts: int) -> Fields:
    pairs = experts_of.numel()
    return (
        experts_of.new_empty(pairs, dtype=torch.int64),
        experts_of.new_empty(pairs, dtype=torch.int64),
        experts_of.new_empty(experts, dtype=torch.int32),
        experts_of.new_empty(experts_of.shape, dtype=torch.int64),
        experts_of.new_empty(pairs, dtype=torch.bool),
    )


def _check(experts_of: Tensor, experts: int) -> None:
    if experts_of.is_floating_point() or experts_of.is_complex() or experts_of.dtype == torch.bool:
        raise TypeError(f"the experts of the slots are {experts_of.dtype}; expected integers")
    if experts_of.dim() != 2:
        raise ValueError(f"the experts of the slots are {list(experts_of.shape)}; expected [T, K]")
    if experts < 1:
        raise ValueError(f"{experts} experts; expected at least one")


def _drops(ends: Tensor, pairs: int, may_drop: bool) -> bool:
    """Return whether pairs may be dropped; looks only where that does not stall a device."""
    if ends.device.type != "cpu" or torch.compiler.is_compiling():
        return may_drop
    return int(ends[-1]) < pairs


def _register() -> None:
    op = torch.library.custom_op(
        "adaconvert::route_plan",
        _plan,
        mutates_args=(),
        schema="(Tensor experts_of, int experts) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    )
    op.register_fake(_fake_plan)


_register()
