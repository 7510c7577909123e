"""Training of blocks that tokens may skip: what runs at a step, what is lost, what is left.

"skip" (FlexiDepth 2503.23798, Router-Tuning 2410.13184): every token computes every block, and a
straight-through mask mixes, so that a router learns what running would have changed. Mixture-of-
depths (2404.02258): a block's gate teaches its router, and a predictor learns beside it who the
best were (section 3.5 there). Within a budget the best tokens of each sequence run, fewer at every
step of a ramp. What decides afterwards, and on held-out text all along, are thresholds, see
`depth_budget`.

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
from adaconvert.train.depth_budget import (
    Price,
    share_above,
    share_for,
    threshold_for,
    tilted,
    within,
)
from adaconvert.train.depth_config import DEPTH_FIT
from adaconvert.train.depth_ranks import Ranked, Ranks
from adaconvert.train.parts import is_depth

#: tokens of a block that are kept of a step.
_KEPT = 1024
#: share of a ramp over which nothing changes yet, so that routers and prices know something before
#: they decide; our choice, as is the next.
_LOOKING = 0.2
#: how far the share of a block can move in as many steps as the usual ramp has.
_TILT = 2.0
_RAMP = 0.5
#: tokens that thresholds are set on, to twice as many, at most and as a part of the run; in so many
#: rounds, each of which goes so far towards what it finds.
_SAMPLE = 8192
_PART = 20
_ROUNDS = 4
_DAMPED = 0.7
#: share of a block's tokens that runs where none is to; one token of a sequence then does.
_LEAST = 1e-6
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
        self._blocks = {
            path: block
            for path, block in model.adaptive_depth().items()
            if block.adaptive_layer["select"]["rule"] == "threshold"
        }
        specs = {path: block.adaptive_layer for path, block in self._blocks.items()}
        self.is_mod = any(spec["kind"] == "mod" for spec in specs.values())
        self._predicts = any(spec["predictor"] is not None for spec in specs.values())
        self.thresholds = {p: float(s["select"]["threshold"]) for p, s in specs.items()}
        compute, bf16 = config.depth.compute, config.precision == "bf16"
        share, self._bend = None, 0.0
        if compute is not None:
            share, self._bend = share_for(model, list(specs), compute, bf16=bf16)
        self._goals: dict[str, float | None] = {
            path: (spec["capacity"] if share is None else share) for path, spec in specs.items()
        }
        self._steps = config.total_steps
        self._start: float | None = 1.0 if self.is_mod else None
        self._ranks = Ranks({})
        # what runs at this step, of each block
        self._shares: dict[str, float] = {}
        self._prices = {path: Price() for path in specs}
        self._kept: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in specs}
        # sequences of the whole run, evenly spaced, and how many there were
        self._rows: list[dict[str, Tensor]] = []
        self._every, self._seen = 1, 0
        self._bf16, self._is_settled = bf16, False
        tokens = config.total_steps * config.step_tokens
        self._room = max(min(_SAMPLE, tokens // _PART) // config.seq_len, 1)
        if self.holds and self._start is not None:
            self._shares = self._targets(0)
        self._train()

    @property
    def holds(self) -> bool:
        """Return whether a budget is held; else thresholds stay as they are."""
        return all(goal is not None for goal in self._goals.values())

    def begin(self, ranked: Mapping[str, Ranked]) -> None:
        """Take over what a fit knows, before the first step: shares and thresholds are at once what
        the first step asks for. Where it knows some of the blocks alone, all of them go on
        running every token until the ramp.

        Args:
            ranked: by path.
        """
        ranks = Ranks(ranked)
        if set(ranked) != set(self.thresholds):
            self.thresholds |= ranks.thresholds({})
        else:
            self._ranks, self._start = ranks, 1.0
            self._shares = self._divided(self._targets(0), 0)
            self.thresholds |= ranks.thresholds(self._shares)
        self._train()

    @property
    def _ramp(self) -> float:
        """Return the steps over which skipping grows."""
        usual = 0.0 if self._ranks else _RAMP
        return self._steps * (usual if self._settings.ramp is None else self._settings.ramp)

    def _targets(self, step: int) -> dict[str, float]:
        """Return what is to run at a step, counted from 0: of each block of mixture-of-depths, of
        others on average."""
        ramp = self._ramp
        part = min(max(step / ramp - _LOOKING, 0.0) / (1 - _LOOKING), 1.0) if ramp else 1.0
        start = 1.0 if self._start is None else self._start
        return {p: start + (float(g or 0.0) - start) * part for p, g in self._goals.items()}

    # -- a micro-batch

    def _train(self) -> None:
        """Let the next passes run what training runs: of each sequence the best, so that a step
        runs what it is to, whatever changed since the thresholds were set."""
        if self._shares:
            shares = {path: max(share, _LEAST) for path, share in self._shares.items()}
            self._model.set_depth("capacity", capacity=shares)
        else:
            self._model.set_depth("threshold", threshold=dict(self.thresholds))

    @contextmanager
    def causal(self) -> Iterator[None]:
        """Let passes inside the body decide as the written model would."""
        self._settle()
        with self._model.set_depth("threshold", threshold=dict(self.thresholds)):
            yield

    @contextmanager
    def collecting(self, fed: Mapping[str, Any], share: Tensor) -> Iterator[Parts]:
        """Yield what a pass inside the body loses besides, known after it: name -> (factor, mean
        over the micro-batch).

        Args:
            fed: what the model gets.
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
        for row in _rows(fed):
            self._sample(row)
        for path, one in found.items():
            self._keep(path, one)
        if self.is_mod:
            parts |= self._predicted(found)
        elif self.holds:
            parts |= self._priced(found, share)
        missed = [one.missed.mean() for one in found.values() if _has(one.missed)]
        if missed:
            parts["missed"] = (self._settings.adapter, torch.stack(missed).mean())

    def _sample(self, row: dict[str, Tensor]) -> None:
        """Keep a sequence now and then, more and more rarely."""
        if self._seen % self._every == 0:
            self._rows.append(row)
        self._seen += 1
        if len(self._rows) > 2 * self._room:
            self._rows, self._every = self._rows[::2], 2 * self._every

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
        factor = self._settings.predictor
        if factor is None:
            factor = float(self._predicts)
        return {"predictor": (factor, loss), "predicted": (0.0, agrees)}

    def _priced(self, found: Mapping[str, Any], share: Tensor) -> Parts:
        """Return what running costs at the prices of the steps before, for its gradient alone."""
        costs = []
        for path, one in found.items():
            if not _has(one.soft) or not one.soft.requires_grad:
                continue
            costs.append(self._prices[path].value * one.soft.mean())
            slopes = (one.soft * (1 - one.soft)).detach() / one.soft.numel()
            self._prices[path].watch(one.scores, slopes, share)
        if not costs:
            return {}
        cost = torch.stack(costs).sum()
        mean = sum(price.value for price in self._prices.values()) / len(self._prices)
        # it says nothing about the model, only where its gradient points
        return {"budget": (1.0, cost - cost.detach()), "price": (0.0, cost.new_tensor(mean))}

    # -- a step

    def step_done(self, step: int) -> None:
        """Move shares and thresholds for the next step.

        Args:
            step: that was done, from 0.
        """
        self._is_settled = False
        for price in self._prices.values():
            price.step_done()
        if self.holds and any(self._kept.values()):
            self._move(step)
            self._train()
        self._kept = {path: [] for path in self._kept}

    @torch.no_grad()
    def _move(self, step: int) -> None:
        logits = {}
        for path, kept in self._kept.items():
            if not kept:
                continue
            router = self._blocks[path].depth.router
            # as the router is now: what it said before the step is about to be stale
            logits[path] = router.deciding(torch.cat([inputs for inputs, _ in kept]))
        if self._start is None:
            before = {path: torch.cat([found for _, found in self._kept[path]]) for path in logits}
            self._start = share_above(before, self.thresholds)
        self._shares = self._divided(self._targets(step + 1), step)
        self.thresholds |= {
            path: threshold_for(values, self._shares[path]) for path, values in logits.items()
        }

    @torch.no_grad()
    def _settle(self) -> None:
        """Set the thresholds so that each block runs its share of training text where they decide:
        whom one block leaves out changes what the next ones see, so it takes rounds."""
        if self._is_settled or not (self.holds and self._shares and self._rows):
            return
        self._is_settled = True
        was_training = self._model.training
        self._model.eval()
        for _ in range(_ROUNDS):
            held = self._model.set_depth("threshold", threshold=dict(self.thresholds))
            with held, self._model.collect("depth") as seen:
                for fed in self._rows:
                    device = self._model.device
                    with torch.autocast(device.type, torch.bfloat16, enabled=self._bf16):
                        given = {name: value.to(device) for name, value in fed.items()}
                        self._model(**given, use_cache=False)
            for path in self.thresholds:
                found = [
                    one.logits if one.predicted is None else one.predicted for one in seen[path]
                ]
                wanted = threshold_for(torch.cat(found), self._shares[path])
                self.thresholds[path] += _DAMPED * (wanted - self.thresholds[path])
        self._model.train(was_training)

    def _divided(self, targets: dict[str, float], step: int) -> dict[str, float]:
        """Return what of each block is to run, so that all together meet the target: shares move
        from blocks where running is worth less to those where it is worth more.

        Args:
            targets: as `_targets` gives them.
            step: that was done, from 0.
        """
        target = sum(targets.values()) / len(targets)
        if self.is_mod or target >= 1:
            return targets
        known = self._shares or targets
        if self._ranks:
            known = self._ranks.followed(known, target)
        left = (self._steps - step) / max(self._steps - self._ramp, 1.0)
        prices = {path: price.value for path, price in self._prices.items()}
        most = _TILT / max(_RAMP * self._steps, 1.0)
        return within(tilted(known, prices, most * min(left, 1.0)), target, self._bend)

    # -- what is kept

    def to_json(self) -> dict[str, Any]:
        """Return what the written model decides by, after training: thresholds, and capacities by
        path."""
        self._settle()
        found: dict[str, Any] = {"thresholds": dict(self.thresholds)}
        if self.is_mod and self._settings.compute is not None:
            found["capacities"] = {path: float(goal or 0.0) for path, goal in self._goals.items()}
        return found

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs, as JSON data."""
        return {
            "thresholds": self.thresholds,
            "start": self._start,
            "shares": self._shares,
            "prices": {path: price.state() for path, price in self._prices.items()},
            "rows": [{k: v.tolist() for k, v in fed.items()} for fed in self._rows],
            "every": self._every,
            "seen": self._seen,
            "settled": self._is_settled,
            "ranks": self._ranks.state(),
        }

    def restore(self, kept: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.thresholds = dict(kept["thresholds"])
        self._start, self._shares = kept["start"], dict(kept["shares"])
        self._is_settled = bool(kept["settled"])
        for path, price in self._prices.items():
            price.restore(kept["prices"][path])
        self._rows = [{k: torch.tensor(v) for k, v in fed.items()} for fed in kept["rows"]]
        self._every, self._seen = kept["every"], kept["seen"]
        self._ranks = Ranks.restored(kept["ranks"])
        self._train()


def _rows(fed: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Return what a model is fed, sequence by sequence."""
    count = len(fed["input_ids"])
    tensors = {name: value.cpu() for name, value in fed.items() if isinstance(value, Tensor)}
    return [{k: v[row : row + 1].clone() for k, v in tensors.items()} for row in range(count)]


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
    if chosen and any(".router." in name for name in learning):
        return DepthTraining(model, config)
    asked = [one for one in config.depth.asked if one != DEPTH_FIT]
    if asked:
        raise OptionError(
            "no router of a block is trained",
            where=asked[0],
            hint="Give --train depth, or --train all.",
        )
    if chosen:
        # which tokens are the best of a sequence would be another model than the stored one
        values = {path: slot["select"]["threshold"] for path, slot in chosen.items()}
        model.set_depth("threshold", threshold=values)
    return None
