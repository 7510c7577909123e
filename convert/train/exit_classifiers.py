"""Training of the exits of classifiers of texts and images, in memory.

`finetune` does it to a checkpoint: see `exit_classifier_run`.

    model = adaconvert.load("bert-with-exits")
    tune_classifier(model, batches, steps=1000, objective=Objective(kind="weighted"))
    model.save_pretrained(...)

Shapes: B examples, C classes, N exits with the model's own end as the last, d hidden size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.errors import OptionError, TrainingError
from adaconvert.train.bounds import among, number, whole
from adaconvert.train.exit_config import OBJECTIVES
from adaconvert.train.exit_heads import never_leaving
from adaconvert.train.losses import wide
from adaconvert.train.parts import choose


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the exits of a classifier minimise.

    Attributes:
        kind: "weighted": the mean of all exits' cross-entropies, weights proportional to the blocks
            before each (PABEE, Zhou et al. 2020, 2006.04152, section 3.3); "geometric": their plain
            mean, and the cross-entropy of the chain of halting probabilities with the exit that
            does best on the example (Depth-Adaptive Transformer, Elbayad et al. 2020, 1910.10073,
            sections 3.1 and 3.2); "ponder": the expectation of the cross-entropy under that chain,
            and its divergence from a geometric prior (PonderNet, Banino et al. 2021, 2107.05407,
            equation 6). The latter two train `confidence`, whose sigmoid is the probability of
            halting at an exit that is reached; the end always halts.
        factor: of the second term.
        prior: of "ponder": probability of halting at each exit; its inverse is the mean depth in
            exits while there are many.
        cost: of "geometric": nats that an example must gain for each further exit to be worth it.
    """

    kind: str = "weighted"
    factor: float = 0.01
    prior: float = 0.3
    cost: float = 0.05

    def __post_init__(self) -> None:
        among("kind", self.kind, OBJECTIVES)
        number("factor", self.factor, 0.0)
        number("cost", self.cost, 0.0)
        number("prior", self.prior, 0.0, 1.0, open_low=True)


def halting(logits: Tensor) -> Tensor:
    """Return log-probabilities of stopping at each exit, [B, N - 1] -> [B, N].

    log p_n = log sigmoid(z_n) + sum over j < n of log(1 - sigmoid(z_j)); the last takes the rest.
    """
    stops, goes = functional.logsigmoid(logits), functional.logsigmoid(-logits)
    zero = logits.new_zeros(len(logits), 1)
    reached = torch.cat([zero, goes.cumsum(1)], dim=1)
    return torch.cat([stops, zero], dim=1) + reached


def prior_of(exits: int, chance: float) -> Tensor:
    """Return a geometric distribution over N exits, cut off and divided by its sum, [N]."""
    found = chance * (1 - chance) ** torch.arange(exits, dtype=torch.float64)
    return (found / found.sum()).float()


def classifier_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    places: Sequence[int],
    objective: Objective,
    halts: Tensor | None = None,
) -> Tensor:
    """Return the loss of a batch, [].

    Args:
        logits: [B, C] of each exit, the model's own end last.
        labels: [B].
        places: blocks before each of them.
        objective: what is minimised.
        halts: [B, N - 1] what classifiers of confidence say; not of "weighted".
    """
    each = cross_entropies(logits, labels)
    if objective.kind == "weighted":
        weights = each.new_tensor([float(at) for at in places])
        return (each * (weights / weights.sum())).sum(1).mean()
    assert halts is not None
    chain = halting(wide(halts))
    if objective.kind == "geometric":
        depth = torch.arange(len(logits), device=each.device)
        best = (each.detach() + objective.cost * depth).argmin(1)
        return each.mean() + objective.factor * functional.nll_loss(chain, best)
    prior = prior_of(len(logits), objective.prior).to(chain)
    # a chance of one never halts late
    known = prior > 0
    divergence = (chain.exp()[:, known] * (chain[:, known] - prior[known].log())).sum(1)
    return ((chain.exp() * each).sum(1) + objective.factor * divergence).mean()


def cross_entropies(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return the cross-entropy of each example at each exit, [B, N]; arguments as there."""
    return torch.stack(
        [functional.cross_entropy(wide(found), labels, reduction="none") for found in logits], dim=1
    )


def exit_predictions(
    model: Any, fed: Mapping[str, Any], places: Sequence[int]
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Return the logits of exits and of the end, and the states exits read at the first position.

    Args:
        model: a classifier with exits.
        fed: what it is fed, without labels.
        places: blocks before the exits.
    """
    states = model.exit_states(tuple(places), **fed)
    end = max(states)
    more = {k: v for k, v in fed.items() if k in ("pixel_values", "token_type_ids")}
    found = [model.exit_logits(at, states[at], **more) for at in (*places, end)]
    # what pooler or head read of a text or an image is its first position
    return found, {at: states[at][:, 0] for at in places}


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimiser step that was done.

    Attributes:
        number: counted from 1.
        loss: what was minimised.
        exits: blocks before an exit, or before the end -> its cross-entropy.
        rate: learning rate of what has no other one.
        norm: length of the gradients before they were scaled down.
        examples: in its batches.
    """

    number: int
    loss: float
    exits: Mapping[int, float]
    rate: float
    norm: float
    examples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimising:
    """How parameters move; every attribute is as for `finetune`.

    Attributes:
        lr: peak learning rate.
        rate_of: that of a parameter by its name; None for `lr` everywhere.
        weight_decay: of matrices.
        max_grad_norm: 0 leaves gradients.
        schedule: "linear", "cosine" or "constant".
        warmup: steps over which rates rise.
        optimizer: "adamw" or "sgd".
        accumulate: batches of a step.
        bf16: multiply matrices in bfloat16.
    """

    lr: float = 2e-5
    rate_of: Callable[[str], float] | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: str = "linear"
    warmup: int = 0
    optimizer: str = "adamw"
    accumulate: int = 1
    bf16: bool = False

    def optimizer_of(self, model: Any) -> torch.optim.Optimizer:
        """Return the optimiser of the parameters that ask for gradients."""
        groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rate = self.lr if self.rate_of is None else self.rate_of(name)
                decay = self.weight_decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        kind = torch.optim.AdamW if self.optimizer == "adamw" else torch.optim.SGD
        return kind(
            [
                {"params": found, "lr": rate, "weight_decay": decay}
                for (rate, decay), found in groups.items()
            ],
            lr=self.lr,
        )

    def schedule_of(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """Return what changes the learning rates after every step."""
        from transformers import get_scheduler

        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        return get_scheduler(
            name, optimizer, num_warmup_steps=self.warmup, num_training_steps=steps
        )


def tune_classifier(
    model: Any,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    objective: Objective = Objective(),
    train: Sequence[str] = ("all",),
    lr: float = 2e-5,
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    optimising: Optimising | None = None,
    done: Callable[[Step], None] = lambda step: None,
) -> list[float]:
    """Return the loss of every step; the model's exits are trained afterwards.

    Args:
        model: a classifier with exits, on its device, what is trained in float32.
        batches: arguments of the forward pass with "labels" [B]; read again when they end.
        steps: optimiser steps, one batch each unless `optimising` says more.
        objective: what is minimised.
        train: parts as for `finetune`; "exits" leaves the trunk frozen.
        lr, weight_decay, max_grad_norm: as for `finetune`; the rate falls linearly to 0.
        optimising: all of this and more, instead of these three.
        done: told of every step; the model is in training mode then.

    Raises:
        OptionError: the model is none, or lacks classifiers of confidence that the objective needs.
        TrainingError: a loss or a gradient is not finite.
    """
    whole("steps", steps, 1)
    how = optimising or Optimising(lr=lr, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
    places = places_of(model, objective)
    choose(model, train)
    optimizer = how.optimizer_of(model)
    schedule = how.schedule_of(optimizer, steps)
    tuning = _Tuning(
        model=model,
        places=places,
        ends=(*places, end_of(model)),
        objective=objective,
        how=how,
        optimizer=optimizer,
    )
    history: list[float] = []
    was_training = model.training
    model.train()
    try:
        with never_leaving(model):
            stream = _endless(batches, steps * how.accumulate)
            for number in range(1, steps + 1):
                group = list(itertools.islice(stream, how.accumulate))
                rate = float(schedule.get_last_lr()[0])
                step = tuning.step(group, number, rate)
                schedule.step()
                history.append(step.loss)
                done(step)
    finally:
        model.train(was_training)
    return history


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tuning:
    """What one step needs; `ends` are the exits in `places`, and the end."""

    model: Any
    places: Sequence[int]
    ends: Sequence[int]
    objective: Objective
    how: Optimising
    optimizer: torch.optim.Optimizer

    def step(self, group: Sequence[Mapping[str, Tensor]], number: int, rate: float) -> Step:
        """Return what one step did; an example weighs the same whichever batch it is in."""
        total = sum(len(batch["labels"]) for batch in group)
        loss, each = 0.0, torch.zeros(len(self.ends), dtype=torch.float64)
        self.optimizer.zero_grad()
        for batch in group:
            share = len(batch["labels"]) / total
            found, exits = self._backward(batch, share, number)
            loss += found * share
            each += exits * share
        learning = [p for own in self.optimizer.param_groups for p in own["params"]]
        most = self.how.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(learning, most))
        if not math.isfinite(norm):
            raise TrainingError(f"the gradient is {norm}", where=f"step {number}")
        self.optimizer.step()
        exit_losses = dict(zip(self.ends, each.tolist(), strict=True))
        return Step(
            number=number, loss=loss, exits=exit_losses, rate=rate, norm=norm, examples=total
        )

    def _backward(
        self, batch: Mapping[str, Tensor], share: float, number: int
    ) -> tuple[float, Tensor]:
        """Return the loss of a batch and the cross-entropy of each exit, [N], once gradients are
        taken."""
        labels = batch["labels"]
        fed = {name: value for name, value in batch.items() if name != "labels"}
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=self.how.bf16):
            logits, states = exit_predictions(self.model, fed, self.places)
            halts = _halts(self.model, states)
        loss = classifier_loss(logits, labels, self.ends, self.objective, halts)
        if not bool(torch.isfinite(loss)):
            raise TrainingError(f"the loss is {float(loss)}", where=f"step {number}")
        if not loss.requires_grad:
            raise OptionError("nothing that is trained changes the loss", where="train")
        torch.autograd.backward(loss * share)
        each = cross_entropies(logits, labels).detach().double().mean(0).cpu()
        return float(loss.detach()), each


def end_of(model: Any) -> int:
    """Return how many blocks a model with exits has."""
    return len(model.get_submodule(model.adaptive_runtime.exits["blocks"]))


def places_of(model: Any, objective: Objective) -> list[int]:
    """Return the exits of a classifier, the one at its end left out."""
    heads = model.adaptive_exits() if hasattr(model, "adaptive_exits") else {}
    if not heads or model.adaptive_runtime.exits["kind"] != "classifier":
        raise OptionError(
            f"a {type(model).__name__} is no classifier with exits",
            hint="`adaconvert early-exit` gives one exits; `finetune` trains those of language "
            "models.",
        )
    places = [at for at in heads if at < end_of(model)]
    blind = [at for at in places if "confidence" not in heads[at]._modules]
    if objective.kind != "weighted" and blind:
        raise OptionError(
            f"the exit after {blind[0]} blocks has no classifier of confidence, which "
            f"'{objective.kind}' trains",
            hint="`adaconvert early-exit --confidence` adds them.",
        )
    return places


def _halts(model: Any, states: Mapping[int, Tensor]) -> Tensor | None:
    """Return [B, N - 1] what the classifiers say; None where an exit has none."""
    heads = model.adaptive_exits()
    parts = {at: heads[at]._modules.get("confidence") for at in states}
    if not all(part is not None for part in parts.values()):
        return None
    return torch.cat([part(states[at]) for at, part in parts.items() if part is not None], dim=1)


def _endless(batches: Iterable[Mapping[str, Tensor]], steps: int) -> Iterator[Mapping[str, Tensor]]:
    """Yield as many batches as there are steps."""
    given = 0
    while given < steps:
        before = given
        for batch in batches:
            if given == steps:
                return
            yield batch
            given += 1
        if given == before:
            raise OptionError("there are no batches to train on", where="batches")
