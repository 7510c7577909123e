"""Budgets of null experts while a model is trained: what blocks spend, what moves their biases.

The bias of a block is set once by the quantiles of the first step's margins where it is far off,
and moved after every step by `methods.budget.BudgetController`, which is where published and own
parts are told apart. The last step leaves it at the mean of what each of the steps of the last
quarter would have set. That, and ramps of the targets, are ours.

Shapes: B sequences, S positions, T = B S tokens, J choices of a token, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from adaconvert.methods.budget import WIDTH, BudgetController, Quantiles, slope_at
from adaconvert.train.health import LayerHealth
from adaconvert.train.routing_config import RAMP, Routing
from adaconvert.train.routing_sites import NullRouter, find_routers
from adaconvert.train.shards import is_sharded

#: tokens of the first step whose margins are kept.
_KEPT: Final = 65536
#: part of a run after which biases are noted, if the ramp has ended.
_SETTLING: Final = 0.75


@dataclass
class _Seen:
    """What one block did since the last step.

    Attributes:
        sums: [3] tokens, real experts they ran, and margins within the window around the bias.
        margins: [N, J] each, of the first step that has tokens alone.
    """

    sums: Tensor | None = None
    margins: list[Tensor] = field(default_factory=list)


class Budgets:
    """Holds the budgets of the blocks of a model while it is trained.

    Args:
        routers: those with null experts.
        goals: as `goals.goals_of` gives them.
        settings: ramp and rate.
    """

    def __init__(
        self, routers: Sequence[NullRouter], goals: Mapping[str, float], settings: Routing
    ) -> None:
        self.routers = tuple(routers)
        self._settings = settings
        self._goals = [goals.get(router.path, math.nan) for router in routers]
        self._ramp = RAMP if settings.ramp is None else settings.ramp
        self._starts: list[float] | None = None if self._ramp else list(self._goals)
        self._place = {router.path: index for index, router in enumerate(routers)}
        self._control = BudgetController(targets=self._goals, rate=settings.null_rate)
        self._slopes = [0.0] * len(self.routers)
        self._seen = [_Seen() for _ in routers]

    @property
    def asked(self) -> bool:
        """Return whether a block has a budget."""
        return any(map(math.isfinite, self._goals))

    @property
    def moves(self) -> bool:
        """Return whether a null bias is moved."""
        return self._settings.null_rate > 0 and self.asked

    def holds(self, router: NullRouter) -> bool:
        """Return whether the bias of a block is moved, and so not trained."""
        goal = self._goals[self._place[router.path]]
        return self._settings.null_rate > 0 and math.isfinite(goal)

    def target(self, router: NullRouter) -> float | None:
        """Return the share a block is to spend now; None where none is known."""
        target = self._control.targets[self._place[router.path]]
        known = self._starts is not None and math.isfinite(target)
        return target if known else None

    @torch.no_grad()
    def see(self, router: NullRouter, margins: Tensor, real: Tensor, here: Tensor) -> None:
        """Take note of the tokens of a micro-batch.

        Args:
            router: of the block.
            margins: [T, J].
            real: [T, n] bool, the real experts that ran.
            here: [T] bool, tokens that are no padding.
        """
        place = self._place[router.path]
        if not math.isfinite(self._goals[place]):
            return
        seen, held = self._seen[place], self.holds(router)
        inside = torch.zeros_like(here)
        if held:
            distance = (margins[:, router.min_real :] - router.null_bias).abs()
            inside = (distance < WIDTH * self._slopes[place]).sum(dim=-1)
        # what is chosen by an index would make an accelerator wait
        sums = torch.stack([here.sum(), (real.sum(dim=-1) * here).sum(), (inside * here).sum()])
        sums = sums.float()
        seen.sums = sums if seen.sums is None else seen.sums + sums
        if held and not self._control.updates and sum(map(len, seen.margins)) < _KEPT:
            seen.margins.append(margins[here])

    @torch.no_grad()
    def step_done(self, reduce: Callable[[Tensor], Tensor], step: int, steps: int) -> None:
        """Move the targets, and by them the biases, for the next step.

        Nothing begins before there are tokens.

        Args:
            reduce: sums a tensor over processes.
            step, steps: that was done, from 0, of how many.
        """
        if not self.asked:
            return
        device = self.routers[0].null_bias.device
        rows = [s.sums if s.sums is not None else torch.zeros(3, device=device) for s in self._seen]
        sums = reduce(torch.stack(rows)).tolist()
        self._advance(sums, reduce, step, steps)
        self._seen = [_Seen() for _ in self.routers]
        if step + 1 == steps:
            self._settle()

    def _advance(
        self, sums: list[list[float]], reduce: Callable[[Tensor], Tensor], step: int, steps: int
    ) -> None:
        """Move the targets and biases.

        Args:
            sums: [L][3], `_Seen.sums` over all processes.
            reduce, step, steps: as for `step_done`.
        """
        if not self._control.updates and not any(tokens for tokens, _, _ in sums):
            return
        pairs = list(zip(self.routers, sums, strict=True))
        units = [tokens * router.top_k for router, (tokens, _, _) in pairs]
        shares = [_over(row[1], unit) for row, unit in zip(sums, units, strict=True)]
        if not self._control.updates:
            shares = self._begun(shares, reduce)
        else:
            inside = [_over(row[2], unit) for row, unit in zip(sums, units, strict=True)]
            self._slopes = [_slope(*pair) for pair in zip(self._slopes, inside, strict=True)]
        if self.moves and step >= max(_SETTLING, self._ramp) * steps:
            biases = [_number(router.null_bias) for router in self.routers]
            self._control.note(biases, shares, self._slopes)
        self._control.aim(self._targets((step + 1) / (self._ramp * steps or 1.0)))
        deltas = self._control.update(shares, self._slopes)
        for router, delta in zip(self.routers, deltas, strict=True):
            if delta:
                router.null_bias.add_(delta)

    def _settle(self) -> None:
        """Leave the biases at what was noted."""
        for router, bias in zip(self.routers, self._control.settled(), strict=True):
            if math.isfinite(bias):
                router.null_bias.fill_(bias)

    def _begun(self, shares: list[float], reduce: Callable[[Tensor], Tensor]) -> list[float]:
        """Return what is spent once biases that were far off are set; ramps begin there."""
        if self._starts is None:
            pairs = zip(shares, self._goals, strict=True)
            self._starts = [s if math.isfinite(s + goal) else goal for s, goal in pairs]
            self._control = BudgetController(targets=self._starts, rate=self._settings.null_rate)
        if not self.moves:
            return shares
        return [self._set(index, share, reduce) for index, share in enumerate(shares)]

    def _set(self, index: int, share: float, reduce: Callable[[Tensor], Tensor]) -> float:
        """Return the share a block spends after its bias was set, if it was far off; the slope of
        its quantiles is known from then on."""
        router, target = self.routers[index], self._control.targets[index]
        if not (math.isfinite(share) and math.isfinite(target)):
            return share
        bias = router.null_bias
        facts = torch.zeros(5, device=bias.device)
        if sum(map(len, self._seen[index].margins)):
            margins = torch.cat(self._seen[index].margins)
            found = Quantiles(margins, router.top_k, min_real=router.min_real)
            low, high = (found.bias(end) for end in reversed(found.reach))
            slope = float(slope_at(margins, target, router.top_k, min_real=router.min_real))
            facts = facts.new_tensor([1.0, found.bias(target), low, high, slope])
        # every process has its own tokens, and all are to set the same
        count, wanted, low, high, slope = reduce(facts).tolist()
        self._slopes[index] = slope / count
        beyond = not low / count <= float(bias) <= high / count
        if not beyond and abs(share - target) <= self._control.clip:
            return share
        bias.fill_(wanted / count)
        return target

    def _targets(self, done: float) -> list[float]:
        """Return the targets at a part of the ramp."""
        starts = self._goals if self._starts is None else self._starts
        part = min(done, 1.0) if self._ramp else 1.0
        return [a + (b - a) * part for a, b in zip(starts, self._goals, strict=True)]

    def to_json(
        self, layers: Sequence[LayerHealth], held: Sequence[float] | None = None
    ) -> list[dict[str, Any]]:
        """Return target and bias, as they are now, and share of every block whose null experts
        compete; every process is to call.

        "measured" says what the share is of: "validation", the held-out text after training, or
        "last steps", training text before the biases were moved for the last time.

        Args:
            layers: over the last steps.
            held: share of every block on held-out text, None without any.
        """
        last = {layer.layer: layer.share for layer in layers if layer.share is not None}
        spent = [last.get(router.layer) for router in self.routers] if held is None else held
        rows = zip(self.routers, self._goals, spent, strict=True)
        return [
            {
                "layer": router.layer,
                "target": goal if math.isfinite(goal) else None,
                "bias": _number(router.null_bias),
                "share": None if share is None else round(share, 4),
                "measured": "last steps" if held is None else "validation",
            }
            for router, goal, share in rows
            if router.site.adaptive_spec["select"]["rule"] == "null"
        ]

    # -- what a checkpoint keeps

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON data; biases are kept with the weights."""
        control = self._control.state()
        return {"starts": self._starts, "slopes": self._slopes, "control": control}

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self._starts, self._slopes = kept["starts"], list(kept["slopes"])
        self._control.restore(kept["control"])


def _slope(known: float, inside: float) -> float:
    """Return the slope of the quantiles around a bias, from what lies within the window there.

    Counts add up over batches and processes, which quantiles do not.

    Args:
        known: slope the window was made of.
        inside: margins in it, as a share; NaN where no token was seen.
    """
    if math.isnan(inside):
        return known
    found = 2 * WIDTH * known / inside if inside else math.inf
    return min(max(found, known / 2), known * 2)


def _number(bias: Any) -> float:
    """Return a bias, which may lie on another process."""
    whole = bias.detach()
    return float(whole.full_tensor() if is_sharded(whole) else whole)


def _over(value: float, count: float) -> float:
    return value / count if count else math.nan


@contextmanager
def realised(model: Any) -> Iterator[Callable[[], list[float]]]:
    """Yield a function that says what every block spent in the passes inside the body.

    It is the real experts a token ran over those it runs without null experts; nothing where a
    model has none, or none of them ran.
    """
    routers = [router for router in find_routers(model) if isinstance(router, NullRouter)]
    if not routers:
        yield list
        return
    with model.collect("experts_run") as runs:

        def shares() -> list[float]:
            if not all(runs.get(router.path) for router in routers):
                return []
            return [
                float(torch.cat(runs[router.path]).double().mean()) / router.top_k
                for router in routers
            ]

        yield shares
