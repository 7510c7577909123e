"""Masks for some of the tokens of a pass, made from those the whole pass has.

Shapes: B sequences, S positions of a pass, P positions before it, C tokens that run a block, K = P
+ S positions of a mask (of a static cache, all it has room for).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adaptive_checks import AdaptiveConfigError


def check_mask(mask: Any, path: str) -> None:
    """Refuse what is neither a mask over pairs nor None.

    Raises:
        AdaptiveConfigError: it is another kind of mask, such as one of flash attention.
    """
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 4):
        raise AdaptiveConfigError(
            f"{path}: tokens that skip a block need attention of kind sdpa or eager, found a mask "
            f"of kind {type(mask).__name__}"
            + (f" {list(mask.shape)}" if isinstance(mask, Tensor) else "")
        )


def of_queries(
    mask: Tensor | None, index: Tensor, size: int, before: int, covered: int
) -> Tensor | None:
    """Return the mask of some tokens to all positions, [B, 1, C, K]; None if they see all.

    Args:
        mask: [B or 1, 1, S, K] of the whole pass, None where it is causal.
        index: [B, C] positions of the tokens in the pass.
        size: S.
        before: P.
        covered: K.
    """
    if mask is None:
        if size == 1:
            return None
        places = torch.arange(covered, device=index.device)
        return (places <= before + index[..., None])[:, None]
    batch = len(index)
    wide = mask.expand(batch, *mask.shape[1:])
    at = index[:, None, :, None].expand(-1, wide.shape[1], -1, wide.shape[-1])
    return wide.gather(2, at)


def among(mask: Tensor | None, index: Tensor, valid: Tensor, *, whole: bool) -> Tensor | None:
    """Return the mask of some tokens to one another, [B, 1, C, C]; None where it is causal.

    Args:
        mask: [B or 1, 1, S, S] of the whole pass, None where it is causal.
        index: [B, C] positions of the tokens, ascending as far as they are valid.
        valid: bool [B, C] which of them count.
        whole: all are valid.
    """
    count = index.shape[1]
    if mask is None:
        if whole:
            return None
        rows = torch.ones(count, count, dtype=torch.bool, device=index.device).tril()
        made = rows & valid[:, None, None, :]
        # whose output nobody wants sees itself, so that its gradient is a number
        return made | torch.eye(count, dtype=torch.bool, device=index.device)
    seen = of_queries(mask, index, mask.shape[2], 0, mask.shape[3])
    assert seen is not None
    at = index[:, None, None, :].expand(-1, seen.shape[1], count, -1)
    pairs = seen.gather(3, at)
    if whole:
        return pairs
    own = torch.eye(count, dtype=torch.bool, device=index.device)
    hidden = ~valid[:, None, None, :] & ~own
    if pairs.dtype == torch.bool:
        return (pairs & ~hidden) | (own & ~valid[:, None, :, None])
    low = torch.finfo(pairs.dtype).min
    return pairs.masked_fill(hidden, low).masked_fill(own & ~valid[:, None, :, None], 0.0)


def without(mask: Tensor | None, run: Tensor, dtype: torch.dtype, *, added: bool) -> Tensor:
    """Return the mask in which tokens that skip are seen by themselves alone, [B, 1, S, S].

    Args:
        mask: [B or 1, 1, S, S], None where it is causal.
        run: bool [B, S] which tokens run.
        dtype: of a mask that is added to scores.
        added: whether to make such a one where there is none.
    """
    size = run.shape[1]
    own = torch.eye(size, dtype=torch.bool, device=run.device)
    seen = run[:, None, None, :] | own
    if mask is None:
        causal = torch.ones(size, size, dtype=torch.bool, device=run.device).tril()
        both = seen & causal
        if not added:
            return both
        return torch.zeros_like(both, dtype=dtype).masked_fill(~both, torch.finfo(dtype).min)
    if mask.dtype == torch.bool:
        return mask & seen
    return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def visible(mask: Tensor) -> Tensor:
    """Return how many positions each query of a mask sees, int64 [B, C]."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return shown[:, 0].sum(-1)
