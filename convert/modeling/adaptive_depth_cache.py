"""Keys and values of a block that only some tokens run, in whatever cache the model has.

Every token has its place in the cache of every block, so lengths agree and crop, reorder and select
work as they are. Where nobody may attend to tokens that skipped, these have keys of one certain
number; that is how a later pass knows them, and no state is kept anywhere else.

Shapes: B sequences, S positions of a pass, C of them that run the block, K positions attended to, H
heads of keys, D size of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adaptive_checks import AdaptiveConfigError
from .adaptive_exit_cache import KeysKept

#: key of a token that skipped: exact in every floating dtype, and no product of real numbers.
ABSENT = 0.0009765625


def present(keys: Tensor) -> Tensor:
    """Return which positions have keys of tokens that ran, bool [B, K].

    Args:
        keys: [B, H, K, D].
    """
    return (keys[:, 0] != ABSENT).any(-1)


def scattered(size: int, parts: list[tuple[Tensor, Tensor]], empty: float | None) -> Tensor:
    """Return [B, H, S, D] with states at their positions.

    Args:
        size: S.
        parts: positions [B, n] and states [B, H, n, D].
        empty: what stands where no state does; None where every position has one.
    """
    states = parts[0][1]
    batch, heads, _, width = states.shape
    made = states.new_empty(batch, heads, size, width)
    if empty is not None:
        made.fill_(empty)
    for index, found in parts:
        at = index[:, None, :, None].expand(-1, heads, -1, width)
        made = made.scatter(2, at, found)
    return made


class Stand:
    """Stands in for the cache of a block: what is asked of it goes to the cache, if there is one.

    Args:
        cache: of transformers, or None.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def kept(self, keys: Tensor, values: Tensor, layer: int, args: Any, named: Any) -> Any:
        """Return the pair that the cache gives back for one, or the pair itself."""
        if self.cache is None:
            return keys, values
        return self.cache.update(keys, values, layer, *args, **named)


class Taking(Stand):
    """Takes keys and values, and ends the block."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **named: Any) -> Any:
        """Keep what a block computed, for itself alone.

        Args:
            keys, values: [B, H, n, D].
            layer: index of the block.
        """
        self.keys, self.values = keys, values
        raise KeysKept


class Merging(Stand):
    """Puts keys and values of tokens that run in order with those of tokens that do not.

    Args:
        cache: of transformers, or None.
        size: S.
        index: [B, C] positions of the tokens that run.
        rest: positions [B, S - C] and taken pair of the others, None where all run.
    """

    def __init__(
        self, cache: Any, size: int, index: Tensor, rest: tuple[Tensor, Taking] | None
    ) -> None:
        super().__init__(cache)
        self._size, self._index, self._rest = size, index, rest

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **named: Any) -> Any:
        """Return keys and values of all tokens, and of all before them.

        Args:
            keys, values: [B, H, C, D].
            layer: index of the block.
        """
        parts = [(self._index, keys, values)]
        if self._rest is not None:
            parts.append((self._rest[0], self._rest[1].keys, self._rest[1].values))
        every = [
            scattered(self._size, [(part[0], part[which]) for part in parts], None)
            for which in (1, 2)
        ]
        return self.kept(every[0], every[1], layer, args, named)


class Leaving(Stand):
    """Keeps a place, but no key, for tokens that skip.

    Args:
        cache: of transformers, or None.
        size: S.
        index: [B, C] positions of those that run, the ones behind `valid` in no order.
        valid: bool [B, C] whether they do.
        alone: nothing came before, so tokens attend to one another alone.
        mask: [B, 1, C, K] to be narrowed once keys are known, None where tokens are alone.
    """

    def __init__(
        self,
        cache: Any,
        size: int,
        index: Tensor,
        valid: Tensor,
        *,
        alone: bool,
        mask: Tensor | None,
    ) -> None:
        super().__init__(cache)
        self._size, self._index, self._valid = size, index, valid
        self._alone, self._mask = alone, mask

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **named: Any) -> Any:
        """Return keys and values of tokens that run, or of all places.

        Args:
            keys, values: [B, H, C, D].
            layer: index of the block.
        """
        if self._alone and self.cache is None:
            return keys, values
        some = self._valid[:, None, :, None]
        places = [(self._index, keys.masked_fill(~some, ABSENT))]
        written = self.kept(
            scattered(self._size, places, ABSENT),
            scattered(self._size, [(self._index, values.masked_fill(~some, 0.0))], 0.0),
            layer,
            args,
            named,
        )
        if self._alone:
            return keys, values
        assert self._mask is not None
        narrow(self._mask, present(written[0]))
        return written


def narrow(mask: Tensor, kept: Tensor) -> None:
    """Hide what is not kept, in place.

    Args:
        mask: [B, 1, C, K], boolean or added to scores.
        kept: bool [B, K].

    Raises:
        AdaptiveConfigError: the cache holds another number of positions than the mask.
    """
    if mask.shape[-1] != kept.shape[-1]:
        raise AdaptiveConfigError(
            f"a block that tokens skip attends to {kept.shape[-1]} positions, its mask has "
            f"{mask.shape[-1]}: this kind of cache cannot be masked by block"
        )
    hidden = ~kept[:, None, None, :]
    if mask.dtype == torch.bool:
        mask &= ~hidden
    else:
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
