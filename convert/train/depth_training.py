"""Training of blocks that tokens may skip: what runs at a step, what is lost, what is left.

"skip" (FlexiDepth 2503.23798, Router-Tuning 2410.13184): every token computes every block, and a
straight-through mask mixes, so that a router learns what running would have changed. Mixture-of-
depths (2404.02258): the best tokens of each sequence run, fewer at every step of the ramp, and a
predictor learns beside them who they were (section 3.5 there). What decides afterwards, and on
held-out text all along, are thresholds, see `depth_budget`.

Shapes: B sequences, S positions, T real tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.errors import OptionError
from adaconvert.methods.sources import Described
from adaconvert.modeling.adaptive_schema import routed_layers
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_budget import Price, share_above, share_for, threshold_for
from adaconvert.train.health import last_steps
from adaconvert.train.parts import is_depth

#: tokens of a block that are kept of a step.
_KEPT = 4096
#: share of a ramp over which nothing changes yet, so that routers know something before they
#: decide; our choice, as is the next.
_LOOKING = 0.2
#: how far a threshold goes towards what the tokens of one step ask for.
_FOLLOWING = 0.2
#: share that may be asked for beyond the target or below it.
_MOST = 0.3
Parts = dict[str, tuple[float, Tensor]]


class DepthTraining:
    """How the routed blocks of one model are trained.

    Args:
        model: loaded, with what is trained asking for gradients.
        config: the fine-tune.

    Attributes:
        thresholds: path -> what decides without looking ahead.
        is_mod: blocks are of mixture-of-depths.

    Raises:
        OptionError: the budget cannot be met, or nothing teaches the routers.
    """

    def __init__(self, model: Any, config: FinetuneConfig) -> None:
        self._model, self._settings = model, config.depth
        blocks = {
            path: block.adaptive_layer
            for path, block in model.adaptive_depth().items()
            if block.adaptive_layer["select"]["rule"] == "threshold"
        }
        self.is_mod = any(spec["kind"] == "mod" for spec in blocks.values())
        self.thresholds = {p: float(s["select"]["threshold"]) for p, s in blocks.items()}
        compute = config.depth.compute
        bf16 = config.precision == "bf16"
        share = None if compute is None else share_for(model, list(blocks), compute, bf16=bf16)
        self._goals: dict[str, float | None] = {
            path: (spec["capacity"] if share is None else share) for path, spec in blocks.items()
        }
        self._start: float | None = None
        self._now: dict[str, float] = {}
        self._price = Price()
        self._blocks = {path: model.adaptive_depth()[path] for path in blocks}
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in blocks}
        self._moved = False
        # how much more than the target is asked for, by path
        self._more = dict.fromkeys(blocks, 0.0)
        self._settled: list[dict[str, float]] = []
        self._steps = config.total_steps
        self._targets(0)
        self._train()

    @property
    def holds(self) -> bool:
        """Return whether a budget is held; else thresholds stay as they are."""
        return all(goal is not None for goal in self._goals.values())

    @property
    def target(self) -> float | None:
        """Return the share of pairs that is to run at this step; None without a budget."""
        return sum(self._now.values()) / len(self._now) if self._now else None

    def _targets(self, step: int) -> None:
        """Set what is to run at a step, counted from 0; nothing before it is known where ramps
        begin."""
        if not self.holds or (self._start is None and not self.is_mod):
            return
        ramp = self._settings.ramp * self._steps
        part = min(max(step / ramp - _LOOKING, 0.0) / (1 - _LOOKING), 1.0) if ramp else 1.0
        start = 1.0 if self._start is None else self._start
        self._now = {p: start + (float(g or 0.0) - start) * part for p, g in self._goals.items()}

    # -- a micro-batch

    def _train(self) -> None:
        """Let the next passes run what training runs."""
        if self.is_mod:
            self._model.set_depth("capacity", capacity=dict(self._now))
        else:
            self._model.set_depth("threshold", threshold=dict(self.thresholds))

    @contextmanager
    def causal(self) -> Iterator[None]:
        """Let passes inside the body decide as the written model does."""
        with self._model.set_depth("threshold", threshold=dict(self.thresholds)):
            yield

    @contextmanager
    def collecting(self, share: Tensor) -> Iterator[Parts]:
        """Yield what a pass inside the body loses besides, known after it: name -> (factor, mean
        over the micro-batch).

        Args:
            share: of the step's tokens, [].
        """
        parts: Parts = {}
        with self._model.collect("depth") as seen:
            yield parts
        found = {path: seen[path][-1] for path in self.thresholds if seen.get(path)}
        if not torch.is_grad_enabled() or not found:
            return
        ran = [one.run.float().mean() for one in found.values() if one.run.numel()]
        if ran:
            parts["run"] = (0.0, torch.stack(ran).mean().detach())
        for path, one in found.items():
            self._keep(path, one)
        if self.is_mod:
            parts |= self._predicted(found)
        elif self.holds:
            parts |= self._priced(found, share)
        missed = [one.missed.mean() for one in found.values() if _has(one.missed)]
        if missed:
            parts["missed"] = (self._settings.adapter, torch.stack(missed).mean())

    def _keep(self, path: str, seen: Any) -> None:
        """Keep what some tokens of a block were, evenly spaced, and what decided about them."""
        room, count = _KEPT - sum(len(logits) for _, logits in self._kept[path]), len(seen.run)
        if room > 0 and count:
            deciding = seen.logits if seen.predicted is None else seen.predicted
            which = slice(None, None, -(-count // room))
            self._kept[path].append((seen.inputs[which].clone(), deciding[which].detach()))

    def _predicted(self, found: Mapping[str, Any]) -> Parts:
        """Return how well the causal decision is learned, and how often it is right."""
        losses, right = [], []
        for path, one in found.items():
            if one.predicted is None or not one.run.numel():
                continue
            wanted = one.run.to(one.predicted.dtype)
            losses.append(functional.binary_cross_entropy_with_logits(one.predicted, wanted))
            said = one.predicted.detach() > self.thresholds[path]
            right.append((said == one.run).float().mean())
        if not losses:
            return {}
        loss, agrees = torch.stack(losses).mean(), torch.stack(right).mean()
        return {"predictor": (self._settings.predictor, loss), "predicted": (0.0, agrees)}

    def _priced(self, found: Mapping[str, Any], share: Tensor) -> Parts:
        """Return what running costs at the price of the steps before, for its gradient alone."""
        costs = []
        for path, one in found.items():
            if not one.logits.requires_grad or not one.logits.numel():
                continue
            soft = torch.sigmoid(one.logits - self.thresholds[path])
            costs.append(soft.mean())
            slopes = (soft * (1 - soft)).detach() / soft.numel()
            self._price.watch(one.scores, slopes, share)
        if not costs:
            return {}
        cost = self._price.value * torch.stack(costs).sum()
        # it says nothing about the model, only where its gradient points
        return {
            "budget": (1.0, cost - cost.detach()),
            "price": (0.0, cost.new_tensor(self._price.value)),
        }

    # -- a step

    def step_done(self, step: int) -> None:
        """Move the thresholds and targets for the next step.

        Args:
            step: that was done, from 0.
        """
        self._price.step_done()
        if self.holds:
            before, after = self._logits()
            self._move(step, before, after)
            self._train()
        self._kept = {path: [] for path in self._kept}

    @torch.no_grad()
    def _logits(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what decided about the tokens that were kept, and what would now."""
        before, after = {}, {}
        for path, kept in self._kept.items():
            router = self._blocks[path].depth.router
            deciding = router if router.predictor is None else router.predictor
            if kept:
                before[path] = torch.cat([logits for _, logits in kept])
                after[path] = deciding(torch.cat([inputs for inputs, _ in kept]))
        return before, after

    def _move(self, step: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
        """Set thresholds for what is to run after a step.

        What the step changed, of routers and of the target, is followed at once, since the same
        tokens tell it; what one step's tokens say about all of them is followed slowly. Whom blocks
        leave out changes what the next ones receive, so a threshold that fits what was seen need
        not fit what it leads to: what runs beyond or below the target is added up and taken back.

        Args:
            step: that was done, from 0.
            before, after: path -> [N] what decided about its tokens, and what would now.
        """
        if not before:
            return
        if self._start is None:
            self._start = 1.0 if self.is_mod else share_above(before, self.thresholds)
            self._targets(step)
        for path, share in self._shares(before).items():
            more = self._more[path] + _FOLLOWING * (self._now[path] - share)
            self._more[path] = min(max(more, -_MOST), _MOST)
        old = self._wanted(before)
        self._targets(step + 1)
        for path, wanted in self._wanted(after).items():
            found = self.thresholds[path] + wanted - old[path]
            self.thresholds[path] = found + (_FOLLOWING if self._moved else 1.0) * (wanted - found)
        self._moved = True
        if step >= self._steps - last_steps(self._steps):
            self._settled.append(dict(self.thresholds))
        if step + 1 == self._steps:
            count = len(self._settled)
            self.thresholds = {
                path: sum(one[path] for one in self._settled) / count for path in self.thresholds
            }

    def _shares(self, logits: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the share that runs, of each block of mixture-of-depths, else of all together."""
        if self.is_mod:
            return {path: share_above({path: v}, self.thresholds) for path, v in logits.items()}
        return dict.fromkeys(logits, share_above(logits, self.thresholds))

    def _wanted(self, logits: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the thresholds some tokens ask for, by path."""

        def share(path: str) -> float:
            target = self._now[path]
            # where all are to run no sample says that some must not
            return target if target >= 1 else min(max(target + self._more[path], 0.0), 1.0)

        if self.is_mod:
            return {path: threshold_for(found, share(path)) for path, found in logits.items()}
        pooled = torch.cat(list(logits.values()))
        return dict.fromkeys(logits, threshold_for(pooled, share(next(iter(logits)))))

    # -- what is kept

    def to_json(self) -> dict[str, Any]:
        """Return what the written model decides by: thresholds, and capacities by path."""
        found: dict[str, Any] = {"thresholds": dict(self.thresholds)}
        if self.is_mod and self._settings.compute is not None:
            found["capacities"] = {path: float(goal or 0.0) for path, goal in self._goals.items()}
        return found

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON data."""
        return {
            "thresholds": self.thresholds,
            "start": self._start,
            "moved": self._moved,
            "more": self._more,
            "now": self._now,
            "price": self._price.state(),
            "settled": self._settled,
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.thresholds = dict(kept["thresholds"])
        self._start, self._now = kept["start"], dict(kept["now"])
        self._moved, self._more = kept["moved"], dict(kept["more"])
        self._price.restore(kept["price"])
        self._settled = [dict(one) for one in kept["settled"]]
        self._train()


def _has(values: Tensor | None) -> bool:
    return values is not None and values.numel() > 0


def depth_training(model: Any, item: Described, config: FinetuneConfig) -> DepthTraining | None:
    """Return how the routed blocks of a model are trained; None where none learn, which then decide
    as they are stored.

    Args:
        model: loaded, with what is trained asking for gradients.
        item: the checkpoint.
        config: the fine-tune.

    Raises:
        OptionError: an option does not fit the blocks, or nothing teaches them.
    """
    slots = routed_layers(item.spec.adaptive or {})
    chosen = {p: s for p, s in slots.items() if s["select"]["rule"] == "threshold"}
    learning = [n for n, p in model.named_parameters() if p.requires_grad and is_depth(n)]
    if len({slot["kind"] for slot in chosen.values()}) > 1:
        raise OptionError("blocks of both kinds cannot learn together", where="--train")
    if chosen and any(".router." in name for name in learning):
        return DepthTraining(model, config)
    if config.depth.asked:
        raise OptionError(
            "no router of a block is trained",
            where=config.depth.asked[0],
            hint="Give --train depth, or --train all.",
        )
    if chosen:
        # which tokens are the best of a sequence would be another model than the stored one
        values = {path: slot["select"]["threshold"] for path, slot in chosen.items()}
        model.set_depth("threshold", threshold=values)
    return None
