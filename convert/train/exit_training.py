"""Training of early exits: which exits learn, from what, and what a step of it loses.

Three ways, see `Exiting`: heads alone on a frozen trunk (EE-Tuning, 2402.00518), heads and trunk
together (EE-LLM, 2312.04916), and the shared head after every block with layer dropout (LayerSkip,
2404.16710). Classifiers of confidence learn beside them from where their exit agrees with the end
(CALM, 2207.07061); no gradient of theirs reaches anything else.

Shapes: B sequences, S positions, N predicted positions, d hidden size, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaconvert.arch.exits import exits_of, places_of
from adaconvert.errors import OptionError
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.exit_heads import Heads, OwnHeads, SharedHeads, is_exit
from adaconvert.train.exit_losses import (
    Found,
    Wanted,
    confidence_loss,
    enabled_layers,
    exit_losses,
    predicted,
    skip_weights,
)
from adaconvert.train.layer_dropout import LayerTaps

#: exits of a checkpoint without any that are looked at on held-out text, at most.
_SHOWN = 8
#: (step, steps) -> place -> factor of its next-token loss, L for the end.
Schedule = Callable[[int, int], Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class ExitTraining:
    """How the exits of one model are trained.

    Attributes:
        heads: what is trained.
        schedule: factors of cross-entropies.
        kd: exit -> factor of its divergence from the end.
        classifiers: exit -> its classifier of confidence, where that learns.
        shown: exits that are looked at on held-out text.
        taps: leave blocks out, None for never.
        config: the fine-tune.
    """

    heads: Heads
    schedule: Schedule
    kd: Mapping[int, float]
    classifiers: Mapping[int, Any]
    shown: tuple[int, ...]
    taps: LayerTaps | None
    config: FinetuneConfig

    def losses(
        self, fed: Mapping[str, Any], labels: Tensor, step: int, steps: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return what a micro-batch loses, a mean over its predicted tokens, and parts of it.

        Balanced losses of classifiers are means over the micro-batch.

        Args:
            fed: what the model is fed.
            labels: [B, S].
            step, steps: counted from 0, and in all.
        """
        if self.taps is not None:
            self.taps.draw(int(labels.shape[0]), step)
        ce = dict(self.schedule(step, steps))
        ce |= dict.fromkeys(set(self.classifiers) - set(ce), 0.0)
        wanted = self._wanted(ce, compare=bool(self.classifiers))
        states, targets, found = self._found(fed, labels, wanted, self.heads.tail())
        total, told = found.total, _told(found, self.heads.layers)
        if self.taps is not None:
            # of exits that count at some steps only there is no mean over steps
            told = {name: value for name, value in told.items() if name == "lm"}
        for at, classifier in self.classifiers.items():
            state = states[at].detach().to(next(classifier.parameters()).dtype)
            said = classifier(state).squeeze(-1)
            loss = confidence_loss(said, found.agrees[at]) if len(targets) else said.sum()
            total, told[f"confidence_{at}"] = total + loss, loss.detach()
        return total, told

    def measured(
        self, fed: Mapping[str, Any], labels: Tensor
    ) -> dict[int, tuple[float, float, int]]:
        """Return place -> (summed loss, positions where it chooses as the end does, positions) of
        the end and of the exits that are shown.

        Args:
            fed: what the model is fed.
            labels: [B, S].
        """
        ce = dict.fromkeys((*self.shown, self.heads.layers), 0.0)
        with torch.no_grad():
            wanted = replace(self._wanted(ce, compare=True), kd={})
            _, targets, found = self._found(fed, labels, wanted, ())
        count = len(targets)
        return {
            at: (
                float(loss) * count,
                float(found.agrees[at].sum()) if at in found.agrees else float(count),
                count,
            )
            for at, loss in found.ce.items()
        }

    def _wanted(self, ce: Mapping[int, float], *, compare: bool) -> Wanted:
        exits = self.config.exits
        return Wanted(
            end=self.heads.layers,
            ce=ce,
            kd=self.kd,
            temperature=self.config.temperature,
            compare=compare,
            chunk=exits.chunk,
        )

    def _found(
        self, fed: Mapping[str, Any], labels: Tensor, wanted: Wanted, tail: Sequence[Any]
    ) -> tuple[dict[int, Tensor], Tensor, Found]:
        """Return place -> [N, d], labels [N] and the losses of one pass."""
        bf16 = self.config.precision == "bf16"
        places = [at for at in wanted.places if at != self.heads.layers]
        device = labels.device.type
        # a matrix that was cast without gradients would be taken from the cache with them
        with torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False):
            whole = self.heads.states(fed, places)
            states, targets = predicted(whole, labels)
            return states, targets, exit_losses(self.heads.logits, states, targets, wanted, tail)


def _told(found: Found, layers: int) -> dict[str, Tensor]:
    """Return the parts of a loss by the names they are logged under."""
    told = {"lm" if at == layers else f"exit_{at}": value for at, value in found.ce.items()}
    return told | {f"exit_{at}_kd": value for at, value in found.kd.items()}


def exit_training(model: Any, item: Described, config: FinetuneConfig) -> ExitTraining | None:
    """Return how the exits of a model are trained; None where none are.

    Args:
        model: loaded, with what is trained asking for gradients.
        item: the checkpoint.
        config: the fine-tune.

    Raises:
        OptionError: an option does not fit the exits, or nothing that is trained reaches them.
    """
    exits = exits_of(item.spec.adaptive)
    if config.exits.skips:
        return _skipping(model, item, config, exits)
    if exits is None or config.exits.is_off:
        return None
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    frozen = all(is_exit(name) for name in learning)
    heads = OwnHeads(model)
    places = _chosen(config, heads.places)
    if frozen:
        places = [at for at in places if any(_is_of(name, at) for name in learning)]
        _check_reached(places)
    weights = config.exits.weights_of(places, heads.layers, frozen=frozen)
    uses_ce, uses_kd = config.exits.loss != "kd", config.exits.loss != "ce"
    ce = {at: weight if uses_ce else 0.0 for at, weight in weights.items()}
    if not frozen:
        ce[heads.layers] = config.lm
    return ExitTraining(
        heads=heads,
        schedule=lambda step, steps: ce,
        kd={at: weight for at, weight in weights.items() if weight} if uses_kd else {},
        classifiers=_classifiers(model, places),
        shown=tuple(places),
        taps=None,
        config=config,
    )


def _is_of(name: str, at: int) -> bool:
    return name.startswith(f"exits.{at}.")


def _classifiers(model: Any, places: Sequence[int]) -> dict[int, Any]:
    """Return the classifiers of confidence that learn."""
    heads = {at: head for at, head in model.adaptive_exits().items() if at in places}
    found = {at: head._modules.get("confidence") for at, head in heads.items()}
    return {at: c for at, c in found.items() if c is not None and c.weight.requires_grad}


def _chosen(config: FinetuneConfig, places: Sequence[int]) -> list[int]:
    """Return the exits that `--exit-layers` leaves."""
    asked = config.exits.layers
    missing = [at for at in asked or () if at not in places]
    if missing:
        raise OptionError(
            f"there is no exit after {missing[0]} blocks",
            where="--exit-layers",
            expected=f"some of {', '.join(map(str, places))}",
        )
    return [at for at in places if asked is None or at in asked]


def _check_reached(places: Sequence[int]) -> None:
    if not places:
        raise OptionError(
            "no exit has parameters that are trained",
            where="--train",
            hint="Name them: --train exits. Shared heads have none: the blocks must learn too, as "
            "with --train all --early-exit-loss 0.2 --layer-dropout 0.1 (LayerSkip).",
        )


def _skipping(
    model: Any, item: Described, config: FinetuneConfig, exits: Mapping[str, Any] | None
) -> ExitTraining:
    """Return LayerSkip's way."""
    settings = config.exits
    if exits is None:
        where = places_of(item.spec)
        blocks, tail = where.blocks, where.tail
    else:
        blocks, tail = exits["blocks"], exits["tail"]
    modules: Any = model.get_submodule(blocks)
    count = len(modules)
    if not any(p.requires_grad for p in modules.parameters()):
        raise OptionError(
            "the blocks are frozen, and only they can make a shared head fit",
            where="--early-exit-loss" if settings.scale else "--layer-dropout",
            hint="Give --train all, or --lora R.",
        )
    taps = LayerTaps(modules, settings.dropout, config.seed)
    usual = range(1, count) if exits is None else [head["at"] for head in exits["heads"]]
    places = _chosen(config, list(usual))
    heads: Heads = (
        SharedHeads(model, blocks, tail, taps, places) if exits is None else OwnHeads(model, taps)
    )

    def schedule(step: int, steps: int) -> Mapping[int, float]:
        if not settings.scale:
            return {count: config.lm}
        on = enabled_layers(settings.curriculum, settings.rotation, count, step, steps)
        found = skip_weights(count, settings.scale, on, places)
        return {at: config.lm * weight for at, weight in found.items()}

    every = -(-len(places) // _SHOWN) if exits is None and settings.layers is None else 1
    return ExitTraining(
        heads=heads,
        schedule=schedule,
        kd={},
        classifiers={},
        shown=tuple(places[every - 1 :: every]),
        taps=taps,
        config=config,
    )
