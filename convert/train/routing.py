"""Routers while they are trained: their losses join going back, their choices are counted.

A hook on each router sees its logits and choices. Its losses join the graph there: what the router
gives to the experts passes through a function that is the identity going forward and sends the
losses their gradient going back. A segment that is recomputed repeats the hook with the same
numbers and goes back once, so a loss is neither lost nor added twice; values and choices are
counted in the first forward pass alone, which the trainer marks.

Shapes: B sequences, S positions, T = B S tokens, E experts, K experts a token, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaconvert.modeling.adaptive_context import current
from adaconvert.modeling.adaptive_select import runs_all, select_experts
from adaconvert.train import losses
from adaconvert.train.budgets import Budgets
from adaconvert.train.health import LayerHealth
from adaconvert.train.routing_adapters import AdaptersRouter, chosen_of
from adaconvert.train.routing_config import Routing
from adaconvert.train.routing_null import balance_of, choice_of
from adaconvert.train.routing_sites import (
    AdaptiveRouter,
    AnyRouter,
    NullRouter,
    StockRouter,
    required_norms,
)
from adaconvert.train.routing_tally import (
    Joined,
    Tallies,
    Tally,
    counts_of,
    parts_of,
    replaced,
    uncompiled,
    widest,
)

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Now:
    """The present micro-batch.

    Attributes:
        weights: [B] share of the optimiser step's predicted tokens that each sequence holds.
        mask: [B, S] 1.0 for real tokens.
        scale: of gradients, which processes average.
        step, steps: the step, from 0, of how many.
    """

    weights: Tensor
    mask: Tensor
    scale: float
    step: int = 0
    steps: int = 1


class Routers:
    """Watches the routers of a model, and adds their losses to its gradients.

    Args:
        routers: as `find_routers` gives them.
        settings: factors; `balance` is a number here.
        trained: routers are trained, so what they choose at the end is judged.
        goals: share of each block with null experts that has a budget, by path.
        even_adapters: routers of adapters are balanced as well.

    Attributes:
        reduce: sums a tensor over processes.
        budgets: of the blocks with null experts.
    """

    def __init__(
        self,
        routers: Sequence[AnyRouter],
        settings: Routing,
        *,
        trained: bool = True,
        goals: Mapping[str, float] | None = None,
        even_adapters: bool = False,
    ) -> None:
        self.routers = tuple(routers)
        nulled = [router for router in routers if isinstance(router, NullRouter)]
        self.budgets = Budgets(nulled, goals or {}, settings)
        self.settings = settings
        self._trained, self._even_adapters = trained, even_adapters
        adapters = sum(isinstance(router, AdaptersRouter) for router in self.routers)
        self._balanced = len(self.routers) - (0 if even_adapters else adapters)
        self.reduce: Reduce = lambda value: value
        self._now: _Now | None = None
        self._counting = self._ending = False
        self._tallies = [Tallies() for _ in self.routers]
        self._values: dict[str, Tensor] = {}
        self._hooks = [self._attach(index) for index in range(len(self.routers))]
        if settings.kind == "bias":
            for router in self.routers:
                bias = router.bias
                if bias is not None:
                    # a step is smaller than what 16 bits resolve
                    bias.data = bias.data.float()

    @property
    def are_stock(self) -> bool:
        """Return whether the routers are those of a mixture, with null experts or without."""
        mixtures = [r for r in self.routers if not isinstance(r, AdaptersRouter)]
        return bool(mixtures) and not any(isinstance(r, AdaptiveRouter) for r in mixtures)

    @property
    def are_to_be_even(self) -> bool:
        """Return whether an uneven load is a fault: in stock mixtures, and where it is balanced."""
        return self.are_stock or bool(self.settings.balance) or self.settings.kind == "bias"

    def _attach(self, index: int) -> Any:
        router = self.routers[index]
        run = uncompiled(self._on_router)
        if isinstance(router, StockRouter):
            return router.module.register_forward_hook(
                lambda module, args, output: run(index, router, args, output)
            )
        if isinstance(router, AdaptersRouter):
            told = uncompiled(self._on_adapters)
            return router.module.register_forward_hook(
                lambda module, args, output: told(index, router, output)
            )
        see = uncompiled(self._on_nulls if isinstance(router, NullRouter) else self._on_site)
        return router.site.register_forward_hook(
            lambda module, args, kwargs, output: see(index, router, args, kwargs, output),
            with_kwargs=True,
        )

    # -- around a micro-batch

    def begin(self, *, ending: bool, **now: Any) -> None:
        """Say what the next forward and backward pass are worth.

        Args:
            ending: the step is one of the last, over which the result is judged.
            now: the fields of `_Now`.
        """
        self._now = _Now(**now)
        self._counting, self._ending = True, ending

    def pause(self) -> None:
        """Count nothing until the next micro-batch: what runs from here on is recomputation."""
        self._counting = False

    def step_done(self) -> None:
        """Move biases towards budgets, and towards an even load if that is how it is balanced."""
        if self._now is not None:
            self.budgets.step_done(self.reduce, self._now.step, self._now.steps)
        if self.settings.kind != "bias":
            return
        for router, tallies in zip(self.routers, self._tallies, strict=True):
            counts, bias = tallies.step.counts, router.bias
            if counts is not None and bias is not None:
                uses = self.reduce(counts)
                towards = (uses.mean() - uses).sign() * self.settings.rate
                bias.data += towards.reshape(bias.shape).to(bias.dtype)
            tallies.step.clear()

    # -- inside the forward pass

    def _on_router(self, index: int, router: StockRouter, args: Any, output: Any) -> Any:
        logits, chosen, weights = parts_of(output, router)
        now = self._now
        if now is None or logits.shape[:-1].numel() != now.mask.numel():
            return None
        batch, positions = now.mask.shape
        wide = losses.wide(logits.reshape(batch, positions, -1))
        probabilities = wide.softmax(dim=-1)
        if router.sigmoid:
            scores = wide.sigmoid()
            probabilities = scores / scores.sum(dim=-1, keepdim=True)
        counts = counts_of(chosen.reshape(batch, -1), now.mask, router.experts).to(wide.dtype)
        self._count(index, counts, probabilities, now.mask)
        found = {"balance": losses.balance(probabilities, counts, now.mask)}
        if self.settings.z_loss:
            found["z"] = losses.router_z(wide, now.mask)
        joined = self._join(found, weights, now)
        return None if joined is weights else replaced(output, weights, joined)

    def _on_site(
        self, index: int, router: AdaptiveRouter, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        x, now = args[0] if args else kwargs["hidden_states"], self._now
        if now is None or x.shape[:-1].numel() != now.mask.numel():
            return None
        select = _select_of(router)
        routed = not runs_all(select, router.experts)
        if not routed and not self.settings.regression:
            return None
        # the router follows the model, not the other way round
        x = x.detach().reshape(-1, x.shape[-1])
        scores = router.site.router(x)
        shape = (*now.mask.shape, router.experts)
        found = {}
        if routed:
            chosen = select_experts(scores.detach(), select).reshape(shape)
            counts = (chosen * now.mask[..., None]).sum(dim=1).to(scores.dtype)
            least = torch.finfo(scores.dtype).tiny
            shares = (scores / scores.sum(dim=-1, keepdim=True).clamp_min(least)).reshape(shape)
            self._count(index, counts, shares, now.mask)
            found["balance"] = losses.balance(shares, counts, now.mask)
        if self.settings.regression and router.predicts_norms:
            norms = required_norms(router, x).reshape(shape)
            found["regression"] = losses.regression(scores.reshape(shape), norms, now.mask)
        return self._join(found, output, now)

    def _on_nulls(
        self, index: int, router: NullRouter, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        x, now = args[0] if args else kwargs["hidden_states"], self._now
        if now is None or x.shape[:-1].numel() != now.mask.numel():
            return None
        select = _select_of(router)
        choice = choice_of(router, x, select)
        shape = (*now.mask.shape, -1)
        probabilities = choice.logits.softmax(dim=-1).reshape(shape)
        counts = (choice.real.reshape(shape) * now.mask[..., None]).sum(dim=1)
        idle = ~choice.real.any(dim=-1).reshape(now.mask.shape)
        self._count(index, counts, probabilities, now.mask, idle)
        if self._counting and choice.has_nulls:
            here = now.mask.reshape(-1) > 0
            self.budgets.see(router, choice.margins, choice.real, here)
        target = self.budgets.target(router)
        balance = balance_of(router, choice, probabilities, counts, now.mask, target)
        found = {"balance": balance}
        if self.settings.z_loss:
            found["z"] = losses.router_z(choice.plain.reshape(shape), now.mask)
        joined = self._join(found, output, now)
        return None if joined is output else joined

    def _on_adapters(self, index: int, router: AdaptersRouter, logits: Tensor) -> Any:
        now = self._now
        if now is None or not router.routes(logits, now.mask):
            return None
        likely, uses = chosen_of(router, logits, now.mask)
        self._count(index, uses, likely, now.mask)
        found = {}
        if self._even_adapters:
            found["balance"] = losses.balance(likely, uses, now.mask)
        if self.settings.z_loss:
            wide = losses.wide(logits.reshape(likely.shape))
            found["z"] = losses.router_z(wide, now.mask)
        joined = self._join(found, logits, now, times=router.blocks)
        return None if joined is logits else joined

    def _join(
        self, found: Mapping[str, Tensor], carrier: Tensor, now: _Now, *, times: int = 1
    ) -> Tensor:
        """Return `carrier`, through which the losses [B] get their gradient; counts their values.

        Args:
            found: name -> mean over each sequence.
            carrier: anything that goes on through the model.
            now: the micro-batch.
            times: how often the router is asked in a pass.
        """
        factors = self._factors()
        total = None
        for name, values in found.items():
            routers = self._balanced if name == "balance" else len(self.routers)
            value = (values * now.weights).sum() / (routers * times)
            if self._counting:
                seen = value.detach()
                self._values[name] = self._values[name] + seen if name in self._values else seen
            if factors[name] and value.requires_grad:
                part = value * (factors[name] * now.scale)
                total = part if total is None else total + part
        if total is None or not torch.is_grad_enabled():
            return carrier
        joined: Tensor = Joined.apply(carrier, total)  # type: ignore[no-untyped-call]
        return joined

    def _factors(self) -> dict[str, float]:
        settings = self.settings
        return {
            "balance": settings.balance or 0.0,
            "z": settings.z_loss,
            "regression": settings.regression,
        }

    @torch.no_grad()
    def _count(
        self,
        index: int,
        counts: Tensor,
        probabilities: Tensor,
        mask: Tensor,
        idle: Tensor | None = None,
    ) -> None:
        if not self._counting:
            return
        even = math.log(probabilities.shape[-1])
        entropy = torch.special.entr(probabilities.detach()).sum(dim=-1) / even
        wide = widest(mask.device)
        found = [mask.sum(), (entropy * mask).sum()]
        found += [] if idle is None else [(idle * mask).sum()]
        sums = torch.stack(found).to(wide)
        uses = counts.sum(dim=0).to(wide)
        tallies = self._tallies[index]
        tallies.line.add(uses, sums)
        if self.settings.kind == "bias":
            tallies.step.add(uses, sums)
        if self._ending:
            tallies.end.add(uses, sums)

    # -- what is told

    def drain(self, steps: int) -> tuple[dict[str, float], list[LayerHealth]]:
        """Return the mean of each loss and the state of each router since the last call.

        Args:
            steps: optimiser steps since then.
        """
        values = {name: float(self.reduce(v)) / steps for name, v in self._values.items()}
        found = self._health([tallies.line for tallies in self._tallies])
        self._values = {}
        for tallies in self._tallies:
            tallies.line.clear()
        return values, found

    def at_the_end(self) -> list[LayerHealth]:
        """Return the state of each router over the last steps."""
        return self._health([tallies.end for tallies in self._tallies])

    def judged(self) -> list[LayerHealth]:
        """Return the same where an uneven load is a fault of this run, else nothing."""
        moved = self._trained or bool(self.settings.balance) or self.settings.kind == "bias"
        return self.at_the_end() if moved and self.are_to_be_even else []

    def _health(self, tallies: Sequence[Tally]) -> list[LayerHealth]:
        """Return the state of every router that routed anything, from its tally."""
        found = []
        for router, tally in zip(self.routers, tallies, strict=True):
            if tally.counts is None or tally.sums is None:
                continue
            tokens, entropy, *idle = self.reduce(tally.sums).tolist()
            uses = self.reduce(tally.counts).tolist()
            whole = max(tokens, 1.0)
            spent: dict[str, Any] = {}
            if isinstance(router, AdaptersRouter):
                spent = {"site": router.path, "even": self._even_adapters}
            elif isinstance(router, NullRouter):
                spent = {"share": sum(uses) / (whole * router.top_k), "idle": idle[0] / whole}
            found.append(
                LayerHealth(
                    layer=router.layer,
                    counts=tuple(int(count) for count in uses),
                    tokens=int(tokens),
                    entropy=entropy / whole,
                    **spent,
                )
            )
        return found

    # -- what a checkpoint keeps

    def state(self) -> list[dict[str, list[float]] | None]:
        """Return what was counted of the last steps, summed over processes."""
        kept: list[dict[str, list[float]] | None] = []
        for tally in (tallies.end for tallies in self._tallies):
            if tally.counts is None or tally.sums is None:
                kept.append(None)
                continue
            counts, sums = self.reduce(tally.counts), self.reduce(tally.sums)
            kept.append({"counts": counts.tolist(), "sums": sums.tolist()})
        return kept

    def restore(self, kept: Sequence[Any], device: torch.device) -> None:
        """Go on from what `state` returned."""
        for tallies, item in zip(self._tallies, kept, strict=True):
            tallies.end.clear()
            if item is not None:
                counts, sums = (
                    torch.tensor(item[name], dtype=widest(device), device=device)
                    for name in ("counts", "sums")
                )
                tallies.end.add(counts, sums)


def _select_of(router: AdaptiveRouter | NullRouter) -> Mapping[str, Any]:
    """Return how a router of the adaptive runtime chooses now."""
    found: Mapping[str, Any] = current().select(router.path) or router.site.adaptive_spec["select"]
    return found
