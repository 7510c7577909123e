"""Which tokens of a pass are real, from whatever mask the model was given.

Shapes: B sequences, S positions of a pass, P positions in the cache, K key positions of a mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def token_mask_of(
    attention_mask: Any, positions: int, *, cached: int = 0, batch: int | None = None
) -> Tensor | None:
    """Return which tokens of this pass are real, bool [B, S]; None when the mask does not say, or
    says on the CPU that all are.

    Args:
        attention_mask: [B, P + S] (or longer: a mask over a whole static cache) with 1 for real
            tokens; or over pairs, [B, 1, S, K] or [B, S, K], boolean or added to the scores: then a
            token that may not see itself is padding, which every mask transformers makes obeys; or
            a mapping from kinds of layers to such masks, as `generate` makes for static caches.
        positions: S.
        cached: P.
        batch: B, where the mask may hold one sequence for all.
    """
    mask = _one_of(attention_mask)
    if mask is None or mask.shape[-1] < positions:
        return None
    start = cached if cached + positions <= mask.shape[-1] else mask.shape[-1] - positions
    if mask.dim() == 2:
        own = mask[:, start : start + positions].to(torch.bool)
    elif mask.dim() in (3, 4) and mask.shape[-2] == positions:
        pairs = _visible(mask)
        own = pairs[..., start : start + positions].diagonal(dim1=-2, dim2=-1)
    else:
        return None
    own = own if batch is None else own.expand(batch, positions)
    # asking another device would wait for it
    if own.device.type == "cpu" and not torch.compiler.is_compiling() and bool(own.all()):
        return None
    return own


def seen_lengths(real: Tensor, attention_mask: Any, cached: int, *, causal: bool) -> Tensor:
    """Return how many positions each token of a pass sees where nothing slides, int64 [B, S].

    Args:
        real: bool [B, S] on the CPU, False for padding.
        attention_mask, cached: as in `token_mask_of`.
        causal: tokens see only what is before them.
    """
    batch, positions = real.shape
    if not causal:
        return real.sum(dim=1, keepdim=True).expand(batch, positions)
    mask = _one_of(attention_mask)
    if mask is not None and mask.dim() > 2 and mask.shape[-2] == positions:
        # shorter than what came before where a cache keeps no more than a window
        return _visible(mask).sum(dim=-1).cpu().expand(batch, positions)
    if mask is None or mask.dim() > 2 or mask.shape[-1] < cached + positions:
        return real.long().cumsum(dim=1) + cached
    own = mask[:, : cached + positions].cpu().to(torch.bool).long()
    return own.cumsum(dim=1)[:, cached:].expand(batch, positions)


def _one_of(mask: Any) -> Tensor | None:
    """Return the mask itself, or of a mapping the one that hides least."""
    if isinstance(mask, Mapping):
        found = mask.get("full_attention", next(iter(mask.values()), None))
        return found if isinstance(found, Tensor) else None
    return mask if isinstance(mask, Tensor) and mask.dim() >= 2 else None


def _visible(mask: Tensor) -> Tensor:
    """Return a mask over pairs as bool [B, S, K]."""
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    mask = mask.to(torch.bool)
    return mask.any(dim=1) if mask.dim() == 4 else mask
