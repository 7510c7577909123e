"""What `routing.router_select` computes, one token at a time: ground truth of its tests.

Written from the definition and not from the fast version; autograd differentiates it. Scores are
compared and divided as they are, so use float64 where they come near underflow.

Shapes: T tokens, E experts, N null experts, A = E + N, K slots of a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaconvert.kernels.routing import Routing
from adaconvert.kernels.routing_steps import Normalise, Scores


def router_select(
    logits: Tensor,
    *,
    top_k: int,
    normalise: Normalise,
    null: int = 0,
    tau: float | None = None,
    scores: Scores = "softmax",
    scaling: float = 1.0,
    bias: Tensor | None = None,
    counted: Tensor | None = None,
    force_real: bool = False,
) -> Routing:
    """Return what `routing.router_select` does; the arguments and sources are the same."""
    tokens, total = logits.shape
    wide = logits if logits.dtype == torch.float64 else logits.float()
    added = [0.0] * total if bias is None else bias.double().tolist()
    weights = wide.new_zeros(tokens, top_k)
    experts = torch.full((tokens, top_k), -1, dtype=torch.int64, device=logits.device)
    sums = wide.new_zeros(total)
    counts = torch.zeros(total, dtype=torch.int64, device=logits.device)
    for t, row in enumerate(wide):
        values = _scores(row, scores)
        chosen = _chosen(values, added, total - null, top_k, tau, force_real)
        pool = _pool(chosen, total, total - null, normalise)
        divisor = values.new_ones(()) if pool is None else values[pool].sum()
        for slot, expert in enumerate(chosen):
            if expert is not None and expert < total - null:
                experts[t, slot] = expert
                share = values[expert] / divisor if divisor != 0 else values[expert] * 0
                weights[t, slot] = share * scaling
        if counted is None or counted[t]:
            sums = sums + values / values.sum()
            for expert in chosen:
                if expert is not None:
                    counts[expert] += 1
    return Routing(weights=weights, experts=experts, probability_sums=sums, counts=counts)


def _scores(row: Tensor, scores: Scores) -> Tensor:
    """Return one token's scores, [A]; all NaN where there is no telling which is best."""
    if scores == "softmax":
        return row.softmax(dim=0)
    values = row.sigmoid()
    hopeless = row.isnan().any() or bool((row == -torch.inf).all())
    return values * torch.nan if hopeless else values


def _chosen(
    values: Tensor,
    added: list[float],
    experts: int,
    top_k: int,
    tau: float | None,
    force_real: bool,
) -> list[int | None]:
    """Return the expert of each slot of one token, None where tau leaves it out."""
    found = values.tolist()
    if any(math.isnan(value) for value in found):
        return list(range(top_k))

    def rank(expert: int) -> tuple[float, int]:
        return -(found[expert] + added[expert]), expert

    order = sorted(range(len(found)), key=rank)
    chosen: list[int | None] = list(order[:top_k])
    if tau is not None:
        least = tau * max(found)
        chosen = [e if i == 0 or found[e] >= least else None for i, e in enumerate(order[:top_k])]
    if force_real and not any(e is not None and e < experts for e in chosen):
        chosen[-1] = min(range(experts), key=rank)
    return chosen


def _pool(
    chosen: list[int | None], total: int, experts: int, normalise: Normalise
) -> list[int] | None:
    """Return the experts whose scores a weight is divided by, None for no division."""
    if normalise == "none":
        return None
    if normalise == "all_real":
        return list(range(experts))
    limit = total if normalise == "selected" else experts
    return [e for e in chosen if e is not None and e < limit]
