"""One pass through a block that only some tokens run.

Shapes: B sequences, S positions of a pass, P positions before it, C tokens that run (the most of a
sequence), K positions of a mask, d hidden size.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adaptive_context import Call, entered
from .adaptive_depth_cache import ABSENT, Leaving, Merging, Taking, scattered
from .adaptive_depth_costs import count_block
from .adaptive_depth_masks import among, check_mask, of_queries, visible, without
from .adaptive_exit_cache import KeysKept
from .adaptive_stages import Tapped

#: squared lengths below this are none.
_TINY = 1e-12
_CACHES = ("past_key_values", "layer_past")
#: what a block is given for each position, [B or 1, S, ...], or a tuple of such.
_BY_POSITION = ("position_embeddings", "position_ids")


@dataclass(frozen=True)
class Decision:
    """Who runs a block.

    Attributes:
        run: bool [B, S].
        every: all real tokens do.
        weight: [B, S, 1] of what the block changes, None for 1.
        mixing: [B, S, 1] 1 for those that run and 0 for others, with the gradient of a sigmoid;
            None outside training.
        looked: the router was asked.
    """

    run: Tensor
    every: bool
    weight: Tensor | None = None
    mixing: Tensor | None = None
    looked: bool = True


class BlockPass:
    """One pass through one routed block.

    Args:
        block: it.
        stock: its stock forward.
        x: [B, S, d].
        given: arguments of the stock forward by name, `hidden_states` left out.
        decision: who runs.
        real: bool [B, S], None when all tokens are.
        call: the pass of the model.
    """

    def __init__(
        self,
        block: Any,
        stock: Any,
        x: Tensor,
        given: dict[str, Any],
        decision: Decision,
        real: Tensor | None,
        call: Call,
    ) -> None:
        self.block, self.stock, self.x = block, stock, x
        self.given, self.decision, self.real, self.call = given, decision, real, call
        self.spec = block.adaptive_layer
        self.keeps = self.spec["kv"] == "keep"
        self.cache_name = next((n for n in _CACHES if n in block.names()), _CACHES[0])
        self.cache: Any = given.get(self.cache_name)
        self.mask = given.get("attention_mask")

    @property
    def computes_all(self) -> bool:
        """Return whether the block computes every token and then mixes: in training of "skip", and
        in compiled code, where the number of tokens has to be known."""
        if self.decision.mixing is not None:
            return True
        return torch.compiler.is_compiling() and (self.keeps or self.cache is None)

    def all_run(self) -> Tensor:
        """Return what the block gives when every token runs it."""
        given = self.given
        before = 0 if self.keeps else self._before()
        if before:
            # tokens of earlier passes may have skipped
            return self._some(everyone=True)
        found: Tensor = self.stock(self.x, **given)
        self._count(None)
        return self._weighted(self.x, found, self.decision.weight)

    def mixed(self) -> Tensor:
        """Return the same as `some_run`, of a block that computes every token."""
        given, run, x = dict(self.given), self.decision.run, self.x
        check_mask(self.mask, self.block.adaptive_layer_path)
        if not self.keeps:
            added = getattr(self._config(), "_attn_implementation", "") == "eager"
            given["attention_mask"] = without(self.mask, run, x.dtype, added=added)
        found = self._weighted(x, self.stock(x, **given), self.decision.weight)
        self._tap(run)
        self._compare(found)
        mixing = self.decision.mixing
        if mixing is None:
            mixing = run.to(x.dtype)[..., None]
        other = self._skipped()
        self._count(None if self.keeps else visible(given["attention_mask"]))
        out: Tensor = other + mixing * (found - other)
        return out

    def _compare(self, found: Tensor) -> None:
        """Tell who collects how far the adapter is from what the block gives, [B, S, d]."""
        adapter, told = self.block.depth.adapter, self.call.collected.get("depth")
        if adapter is None or told is None or self.decision.mixing is None:
            return
        if not adapter.up.weight.requires_grad:
            return
        x = self.x.detach()
        wanted = (found.detach() - x).float()
        apart = (adapter(x).float() - wanted).square().sum(-1)
        missed = apart / wanted.square().sum(-1).clamp_min(_TINY)
        real = torch.ones_like(missed, dtype=torch.bool) if self.real is None else self.real
        missed = missed[real]
        # a second run of a segment is to keep what the first did, and tells nothing
        if not self.call.recomputing:
            kept: Any = told[self.block.adaptive_layer_path]
            kept[-1] = replace(kept[-1], missed=missed)

    def some_run(self) -> Tensor:
        """Return what the block gives, computed for the tokens that run alone."""
        return self._some(everyone=False)

    def _some(self, *, everyone: bool) -> Tensor:
        check_mask(self.mask, self.block.adaptive_layer_path)
        run = self.decision.run
        counts = run.sum(1)
        most = self.x.shape[1] if everyone else int(counts.max())
        order = (~run).long().argsort(dim=1, stable=True)
        if not most:
            self._none_run(order)
            self._count(run.new_zeros(run.shape[0], 0, dtype=torch.long))
            return self._skipped()
        index = order[:, :most]
        valid = torch.arange(most, device=index.device) < counts[:, None]
        if everyone:
            index = torch.arange(most, device=index.device).expand(run.shape[0], -1)
            valid = run
        own = _taken(self.x, index)
        given = self._given_of(index)
        if self.keeps:
            self._keep(given, index, order[:, most:])
        else:
            self._leave(given, index, valid)
        real = valid if self.real is None else valid & _taken(self.real, index)
        with entered(replace(self.call, token_mask=real)):
            found = self.stock(own, **given)
        self._tap(run, index)
        mask = given.get("attention_mask")
        self._count(None if self.keeps else self._seen(mask, valid), valid)
        weight = self.decision.weight
        found = self._weighted(own, found, None if weight is None else _taken(weight, index))
        if bool(valid.all()) and most == self.x.shape[1]:
            return found
        base = self._skipped()
        found = torch.where(valid[..., None], found, _taken(base, index))
        return base.scatter(1, index[..., None].expand_as(found), found)

    def _tap(self, run: Tensor, index: Tensor | None = None) -> None:
        """Let an exit behind the block know which tokens its network ran for, and where they are.

        Args:
            run: bool [B, S].
            index: [B, C] positions of the tokens the network was given, None for all.
        """
        stage, place = self.call.stage, self.spec["index"] + 1
        tapped = None if stage is None else stage.taps.get(place)
        if stage is None or tapped is None:
            return
        read, gave = tapped.read, tapped.gave
        if index is not None:
            size = self.x.shape[1]
            read, gave = _placed(read, index, size), _placed(gave, index, size)
        stage.taps[place] = Tapped(read, gave, run)

    # -- keys and values

    def _keep(self, given: dict[str, Any], index: Tensor, rest: Tensor) -> None:
        """Let everyone attend to all tokens, those that skip the block as well."""
        size = self.x.shape[1]
        given["attention_mask"] = of_queries(
            self.mask, index, size, self._before(), self._covered()
        )
        taken = (rest, self._taken_of(rest)) if rest.shape[1] else None
        given[self.cache_name] = Merging(self.cache, size, index, taken)

    def _leave(self, given: dict[str, Any], index: Tensor, valid: Tensor) -> None:
        """Let tokens that run attend to one another alone."""
        before, size = self._before(), self.x.shape[1]
        mask: Tensor | None
        if not before:
            mask = among(self.mask, index, valid, whole=bool(valid.all()))
        else:
            mask = of_queries(self.mask, index, size, before, self._covered())
            if mask is None:
                shape = (index.shape[0], 1, 1, self._covered())
                mask = torch.ones(shape, dtype=torch.bool, device=index.device)
        given["attention_mask"] = mask
        given[self.cache_name] = Leaving(
            self.cache, size, index, valid, alone=not before, mask=mask
        )

    def _none_run(self, order: Tensor) -> None:
        """Give tokens their places in the cache, none of which runs."""
        if self.keeps:
            taken = self._taken_of(order)
            if self.cache is not None:
                pair = [
                    scattered(self.x.shape[1], [(order, found)], None)
                    for found in (taken.keys, taken.values)
                ]
                self.cache.update(*pair, self.spec["index"])
            return
        if self.cache is None:
            return
        taken = self._taken_of(order[:, :1])
        shape = (*taken.keys.shape[:2], self.x.shape[1])
        self.cache.update(
            taken.keys.new_full((*shape, taken.keys.shape[-1]), ABSENT),
            taken.values.new_zeros(*shape, taken.values.shape[-1]),
            self.spec["index"],
        )

    def _taken_of(self, index: Tensor) -> Taking:
        """Return keys and values of tokens the block goes no further with."""
        given = {**self._given_of(index), "attention_mask": None}
        taken = given[self.cache_name] = Taking(self.cache)
        mask = None if self.real is None else _taken(self.real, index)
        with entered(replace(self.call, token_mask=mask)), suppress(KeysKept):
            self.stock(_taken(self.x, index), **given)
        return taken

    def _before(self) -> int:
        """Return P, 0 without a cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length(self.spec["index"]))

    def _covered(self) -> int:
        """Return K."""
        size = self.x.shape[1]
        if self.cache is None:
            return size
        return int(self.cache.get_mask_sizes(size, self.spec["index"])[0])

    # -- the rest

    def _given_of(self, index: Tensor) -> dict[str, Any]:
        """Return the arguments of the block for some of its tokens."""
        given = dict(self.given)
        for name in _BY_POSITION:
            found = given.get(name)
            if isinstance(found, Tensor):
                given[name] = _taken(found, index)
            elif isinstance(found, tuple | list):
                given[name] = tuple(_taken(part, index) for part in found)
        return given

    def _skipped(self) -> Tensor:
        """Return what tokens that skip hand on, [B, S, d]."""
        found: Tensor = self.block.depth.skipped(self.x)
        return found

    def _weighted(self, x: Tensor, found: Tensor, weight: Tensor | None) -> Tensor:
        return found if weight is None else x + weight * (found - x)

    def _config(self) -> Any:
        for module in self.block.modules():
            if hasattr(module, "config"):
                return module.config
        return None

    def _seen(self, mask: Tensor | None, valid: Tensor) -> Tensor:
        """Return how many positions each token that runs attends to, [B, C]."""
        if mask is not None:
            return visible(mask)
        return torch.arange(1, valid.shape[1] + 1, device=valid.device).expand_as(valid)

    def _count(self, seen: Tensor | None, valid: Tensor | None = None) -> None:
        """Tell who counts; `seen` as `_seen` gives it, None where tokens see what they did."""
        if self.call.account is None or self.call.recomputing:
            return
        run = self.decision.run
        attended = None
        if seen is not None:
            which = run if valid is None else valid
            attended = int(seen[which].sum()) if seen.shape[1] else 0
        path, looked = self.block.adaptive_layer_path, self.decision.looked
        count_block(self.call, path, self.spec, run, self.real, attended, looked=looked)


def _placed(part: Tensor, index: Tensor, size: int) -> Tensor:
    """Return [B, S, d] with the tokens of [B, C, d] at their positions, zero elsewhere."""
    where = index[..., None].expand_as(part)
    return part.new_zeros(len(part), size, part.shape[-1]).scatter(1, where, part)


def _taken(values: Tensor, index: Tensor) -> Tensor:
    """Return values of some positions, [B or 1, S, ...] -> [B, C, ...].

    Args:
        values: by position.
        index: [B, C].
    """
    wide = values.expand(index.shape[0], *values.shape[1:])
    at = index.reshape(*index.shape, *[1] * (wide.dim() - 2)).expand(-1, -1, *wide.shape[2:])
    return wide.gather(1, at)
