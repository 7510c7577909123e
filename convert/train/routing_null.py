"""What a block with null experts chose, and the loss that balances its experts.

Shapes: B sequences, S positions, T = B S tokens, n real and M null experts, J choices by margin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaconvert.train import losses
from adaconvert.train.routing_sites import NullRouter


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """What a block chose.

    Attributes:
        has_nulls: the rule lets null experts compete; else M is 0 below.
        logits: [T, n + M], the bias in those of null experts.
        plain: [T, n + M], without it.
        real: [T, n] bool, real experts that run.
        margins: [T, J].
    """

    has_nulls: bool
    logits: Tensor
    plain: Tensor
    real: Tensor
    margins: Tensor


def choice_of(router: NullRouter, x: Tensor, select: Mapping[str, Any]) -> Choice:
    """Return what a block chooses, with gradients.

    Args:
        router: of the block.
        x: [T, d] or [B, S, d], what the block receives.
        select: rule and value.
    """
    found = router.site.adaptive_decide(x.reshape(-1, x.shape[-1]), select)
    real = torch.zeros_like(found.logits, dtype=torch.bool).scatter(-1, found.order, found.kept)
    bias = select.get("bias", router.null_bias)
    if not isinstance(bias, Tensor):
        bias = found.logits.new_tensor(bias)
    has_nulls = select["rule"] == "null"
    null = found.null_logits[:, : None if has_nulls else 0]
    shifted = null + bias.to(null)
    return Choice(
        has_nulls=has_nulls,
        logits=torch.cat([found.logits, shifted], dim=-1),
        plain=torch.cat([found.logits, null], dim=-1),
        real=real,
        margins=found.margins.detach(),
    )


def balance_of(
    router: NullRouter,
    choice: Choice,
    probabilities: Tensor,
    counts: Tensor,
    mask: Tensor,
    target: float | None,
) -> Tensor:
    """Return the balance loss of each sequence, [B]; see `losses.null_balance`.

    Without a target real experts are balanced among each other: each sequence's own share of null
    choices is what they are to get.

    Args:
        router: of the block.
        choice: what it chose.
        probabilities: [B, S, n + M].
        counts: [B, n] uses of real experts.
        mask: [B, S] 1.0 for real tokens.
        target: share the block is to spend.
    """
    counts = counts.to(probabilities.dtype)
    if not choice.has_nulls:
        return losses.balance(probabilities, counts, mask)
    slots = mask.sum(dim=1).to(counts) * router.slots
    nulls = probabilities.shape[-1] - router.experts
    used = counts.sum(dim=-1)
    # which null experts were chosen matters to nobody
    each = ((slots - used).clamp_min(0) / max(nulls, 1))[:, None].expand(-1, nulls)
    share = used / (used + each.sum(dim=-1)).clamp_min(1.0)
    if target is not None:
        share = share.new_tensor(min(target * router.top_k / router.slots, 1.0))
    return losses.null_balance(
        probabilities,
        torch.cat([counts, each], dim=-1),
        mask,
        experts=router.experts,
        share=share,
    )
