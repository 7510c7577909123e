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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_context import current
from adaconvert.modeling.adaptive_select import runs_all, select_experts
from adaconvert.train import losses
from adaconvert.train.health import LayerHealth
from adaconvert.train.routing_config import Routing
from adaconvert.train.routing_sites import AdaptiveRouter, AnyRouter, StockRouter, expert_norms

Reduce = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Now:
    """The present micro-batch.

    Attributes:
        weights: [B] share of the optimiser step's predicted tokens that each sequence holds.
        mask: [B, S] 1.0 for real tokens.
        scale: of gradients, which processes average.
    """

    weights: Tensor
    mask: Tensor
    scale: float


@dataclass
class Tally:
    """What one router chose over some steps; all are sums over real tokens.

    Attributes:
        counts: [E] uses of each expert.
        sums: [2] tokens, and their entropies as a fraction of ln E.
    """

    counts: Tensor | None = None
    sums: Tensor | None = None

    def add(self, counts: Tensor, sums: Tensor) -> None:
        """Count a batch."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.sums = sums if self.sums is None else self.sums + sums

    def clear(self) -> None:
        """Forget everything."""
        self.counts = self.sums = None


@dataclass
class _Tallies:
    """Tallies of one router: since the last log line, the last step, and over the last steps."""

    line: Tally = field(default_factory=Tally)
    step: Tally = field(default_factory=Tally)
    end: Tally = field(default_factory=Tally)


class Routers:
    """Watches the routers of a model, and adds their losses to its gradients.

    Args:
        routers: as `find_routers` gives them.
        settings: factors; `balance` is a number here.
        trained: routers are trained, so what they choose at the end is judged.

    Attributes:
        reduce: sums a tensor over processes.
    """

    def __init__(
        self, routers: Sequence[AnyRouter], settings: Routing, *, trained: bool = True
    ) -> None:
        self.routers = tuple(routers)
        self.settings = settings
        self._trained = trained
        self.reduce: Reduce = lambda value: value
        self._now: _Now | None = None
        self._counting = self._ending = False
        self._tallies = [_Tallies() for _ in self.routers]
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
        """Return whether the routers are those of a stock mixture."""
        return all(isinstance(router, StockRouter) for router in self.routers)

    @property
    def are_to_be_even(self) -> bool:
        """Return whether an uneven load is a fault: in stock mixtures, and where it is balanced."""
        return self.are_stock or bool(self.settings.balance) or self.settings.kind == "bias"

    def _attach(self, index: int) -> Any:
        router = self.routers[index]
        run = _uncompiled(self._on_router)
        if isinstance(router, StockRouter):
            return router.module.register_forward_hook(
                lambda module, args, output: run(index, router, args, output)
            )
        see = _uncompiled(self._on_site)
        return router.site.register_forward_hook(
            lambda module, args, kwargs, output: see(index, router, args, kwargs, output),
            with_kwargs=True,
        )

    # -- around a micro-batch

    def begin(self, *, weights: Tensor, mask: Tensor, scale: float, ending: bool) -> None:
        """Say what the next forward and backward pass are worth.

        Args:
            weights, mask, scale: as in `_Now`.
            ending: the step is one of the last, over which the result is judged.
        """
        self._now = _Now(weights=weights, mask=mask, scale=scale)
        self._counting, self._ending = True, ending

    def pause(self) -> None:
        """Count nothing until the next micro-batch: what runs from here on is recomputation."""
        self._counting = False

    def step_done(self) -> None:
        """Move biases towards an even load, if that is how it is balanced."""
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
        logits, chosen, weights = _parts(output, router)
        now = self._now
        if now is None or logits.shape[:-1].numel() != now.mask.numel():
            return None
        batch, positions = now.mask.shape
        wide = losses.wide(logits.reshape(batch, positions, -1))
        probabilities = wide.softmax(dim=-1)
        if router.sigmoid:
            scores = wide.sigmoid()
            probabilities = scores / scores.sum(dim=-1, keepdim=True)
        counts = _counts(chosen.reshape(batch, -1), now.mask, router.experts).to(wide.dtype)
        self._count(index, counts, probabilities, now.mask)
        found = {"balance": losses.balance(probabilities, counts, now.mask)}
        if self.settings.z_loss:
            found["z"] = losses.router_z(wide, now.mask)
        joined = self._join(found, weights, now)
        return None if joined is weights else _replaced(output, weights, joined)

    def _on_site(
        self, index: int, router: AdaptiveRouter, args: Any, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        now = self._now
        if now is None or x.shape[:-1].numel() != now.mask.numel():
            return None
        select = current().select(router.path) or router.site.adaptive_spec["select"]
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
            norms = self._norms(router, x).reshape(shape)
            found["regression"] = losses.regression(scores.reshape(shape), norms, now.mask)
        return self._join(found, output, now)

    @staticmethod
    def _norms(router: AdaptiveRouter, x: Tensor) -> Tensor:
        norms = expert_norms(router.site, x)
        if norms is None:
            raise OptionError(
                f"the experts of {router.path} have no plain output matrix to predict",
                where="--router-regression",
                hint="Train without adapters or quantised weights, or fit routers by "
                "`adaconvert d2dmoe`.",
            )
        return norms

    def _join(self, found: Mapping[str, Tensor], carrier: Tensor, now: _Now) -> Tensor:
        """Return `carrier`, through which the losses [B] get their gradient; counts their values.

        Args:
            found: name -> mean over each sequence.
            carrier: anything that goes on through the model.
            now: the micro-batch.
        """
        weights = now.weights / len(self.routers)
        factors = self._factors()
        total = None
        for name, values in found.items():
            value = (values * weights).sum()
            if self._counting:
                seen = value.detach()
                self._values[name] = self._values[name] + seen if name in self._values else seen
            if factors[name] and value.requires_grad:
                part = value * (factors[name] * now.scale)
                total = part if total is None else total + part
        if total is None or not torch.is_grad_enabled():
            return carrier
        joined: Tensor = _Joined.apply(carrier, total)  # type: ignore[no-untyped-call]
        return joined

    def _factors(self) -> dict[str, float]:
        settings = self.settings
        return {
            "balance": settings.balance or 0.0,
            "z": settings.z_loss,
            "regression": settings.regression,
        }

    @torch.no_grad()
    def _count(self, index: int, counts: Tensor, probabilities: Tensor, mask: Tensor) -> None:
        if not self._counting:
            return
        even = math.log(counts.shape[-1])
        entropy = torch.special.entr(probabilities.detach()).sum(dim=-1) / even
        wide = _widest(mask.device)
        sums = torch.stack([mask.sum(), (entropy * mask).sum()]).to(wide)
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
            tokens, entropy = self.reduce(tally.sums).tolist()
            uses = self.reduce(tally.counts).tolist()
            found.append(
                LayerHealth(
                    layer=router.layer,
                    counts=tuple(int(count) for count in uses),
                    tokens=int(tokens),
                    entropy=entropy / max(tokens, 1.0),
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
                    torch.tensor(item[name], dtype=_widest(device), device=device)
                    for name in ("counts", "sums")
                )
                tallies.end.add(counts, sums)


class _Joined(torch.autograd.Function):
    """The identity of its first argument, whose backward pass gives the second a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return arriving, torch.ones((), dtype=dtype, device=device)


def _parts(output: Any, router: StockRouter) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [T, E], choices [T, K] and weights [T, K] of what a router returned.

    The order differs between architectures and versions of transformers: logits, weights, choices
    or the reverse of it.
    """
    tensors = [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple) else []
    whole = [t for t in tensors if not t.is_floating_point()]
    real = [t for t in tensors if t.is_floating_point()]
    logits = [t for t in real if t.shape[-1] == router.experts]
    if tensors and not tensors[0].is_floating_point():
        logits = logits[::-1]
    if len(whole) != 1 or len(real) != 2 or not logits:
        raise OptionError(
            f"the router {router.path} returns neither logits nor choices that are known",
            where="--balance",
            hint="Train this architecture with --balance 0 --z-loss 0 --collapse 0.",
        )
    weights = real[1] if real[0] is logits[0] else real[0]
    return logits[0], whole[0], weights


def _replaced(output: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    return tuple(new if item is old else item for item in output)


def _counts(chosen: Tensor, mask: Tensor, experts: int) -> Tensor:
    """Return how often each sequence's real tokens chose each expert, [B, S K] -> [B, E]."""
    each = chosen.shape[1] // mask.shape[1]
    real = mask.repeat_interleave(each, dim=1)
    counts = mask.new_zeros(mask.shape[0], experts)
    return counts.scatter_add_(1, chosen.long(), real)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `torch.compile` calls instead of reading it."""
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def _widest(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
