"""Selection rules: from scores to the set of experts a token runs.

Every token runs at least the expert with its highest score, whatever the threshold.
Shapes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def runs_all(select: Mapping[str, Any], experts: int) -> bool:
    """Return whether the rule selects every expert whatever the scores are."""
    rule = select["rule"]
    if rule == "all" or experts == 1:
        return True
    if rule == "top-k":
        return bool(select["k"] >= experts)
    if rule == "dynamic-k":
        return bool(select["tau"] <= 0)
    return bool(rule == "top-p" and select["p"] >= 1)


def select_experts(scores: Tensor, select: Mapping[str, Any]) -> Tensor:
    """Return which experts run, bool [T, E].

    Args:
        scores: [T, E], higher is better; not negative for dynamic-k and top-p.
        select: "top-k" (k highest), "dynamic-k" (score >= tau x the token's highest; D2DMoE, paper
            convention: tau 0 runs all, 1 the best alone), "threshold" (score >= threshold), "top-p"
            (fewest experts whose scores make up p of the token's sum).
    """
    rule = select["rule"]
    experts = scores.shape[-1]
    if runs_all(select, experts):
        return torch.ones_like(scores, dtype=torch.bool)
    if rule == "top-k":
        best = scores.topk(int(select["k"]), dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    highest = scores.max(dim=-1, keepdim=True)
    if rule == "dynamic-k":
        chosen = scores >= select["tau"] * highest.values
    elif rule == "threshold":
        chosen = scores >= select["threshold"]
    else:
        chosen = _smallest_prefix(scores, float(select["p"]))
    always: Tensor = chosen.scatter(-1, highest.indices, True)
    return always


def _smallest_prefix(scores: Tensor, p: float) -> Tensor:
    """Return the experts of the smallest sorted prefix whose share of the sum reaches p."""
    shares = scores / scores.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    ordered, order = shares.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < p)
