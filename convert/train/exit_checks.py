"""What about early exits can be refused before text is read or a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaconvert.arch.exits import CAUSAL, exits_of
from adaconvert.errors import OptionError
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.exit_config import Exiting


def check_exits(item: Described, config: FinetuneConfig) -> None:
    """Return only when what is asked of exits fits the checkpoint.

    Raises:
        OptionError: it does not.
    """
    exits, settings = exits_of(item.spec.adaptive), config.exits
    speaks = exits is None or exits["kind"] == CAUSAL
    if speaks and config.temperature != 1 and not config.distill and settings.loss == "ce":
        raise OptionError(
            "does nothing: no loss is a divergence from a teacher",
            where="--temperature",
            expected="--distill, or --exit-loss kd or both, with it",
        )
    if exits is None:
        _check_stock(item, settings)
    else:
        _check_adaptive(exits, config)
    if (exits is not None and not settings.is_off) or settings.skips:
        _check_machine(config)


def _check_stock(item: Described, settings: Exiting) -> None:
    asked = [] if settings.scale else [flag for flag in settings.asked if flag != "--layer-dropout"]
    if asked:
        raise OptionError(
            f"{item.source.label} has no exits",
            where=asked[0],
            hint="`adaconvert early-exit` makes them; --early-exit-loss trains a stock checkpoint "
            "so that every block can be left.",
        )
    if settings.skips and item.spec.adaptive is not None:
        raise OptionError(
            f"{item.source.label} is adaptive and has no exits",
            where="--early-exit-loss" if settings.scale else "--layer-dropout",
            hint="Give it some: `adaconvert early-exit --head shared --adaptive`.",
        )
    layers = item.spec.layers
    outside = [at for at in settings.layers or () if at >= layers]
    if outside:
        raise OptionError(
            f"there is no exit after {outside[0]} blocks",
            where="--exit-layers",
            expected=f"1 to {layers - 1}",
        )


def _check_adaptive(exits: Mapping[str, Any], config: FinetuneConfig) -> None:
    settings = config.exits
    own = [head["at"] for head in exits["heads"] if has_own(head)]
    if exits["kind"] != CAUSAL:
        return
    idle = set(settings.asked) - {"--exit-weights", "--layer-dropout"}
    if settings.is_off and idle:
        raise OptionError("does nothing with --exit-weights 0", where=min(idle))
    if settings.skips and own:
        raise OptionError(
            f"the exit after {own[0]} blocks has a head of its own",
            where="--early-exit-loss" if settings.scale else "--layer-dropout",
            hint="Those learn by --exit-loss and --exit-weights; LayerSkip is for shared heads.",
        )
    if "exits" in config.train and not own:
        raise OptionError(
            "shared heads have no tensors of their own, so with a frozen trunk nothing can learn",
            where="--train exits",
            hint="Give --train all --early-exit-loss 0.2 --layer-dropout 0.1 (LayerSkip), or make "
            "the exits by another --head.",
        )


def has_own(head: Mapping[str, Any]) -> bool:
    """Return whether an exit has tensors of its own; `head` is its entry in config.json."""
    return bool(head["own"]) or any(head[n] for n in ("map", "network", "block", "confidence"))


def _check_machine(config: FinetuneConfig) -> None:
    """Exits are trained outside the model's own forward pass, which the rest here changes."""
    machine = config.machine
    reasons = {
        "--compile": machine.compiled,
        "--fsdp": machine.sharded,
        "--expert-parallel": machine.experts_over > 1,
        "several processes": config.processes > 1,
        "--distill": bool(config.distill),
        "--distill-hidden": bool(config.distill_hidden),
    }
    found = next((flag for flag, given in reasons.items() if given), None)
    if found is None:
        return
    kd = found.startswith("--distill")
    raise OptionError(
        "cannot be combined with the training of exits",
        where=found,
        hint="Exits learn from the last layer by --exit-loss kd; --exit-weights 0 leaves them out."
        if kd
        else "Train them in one process; --exit-weights 0 leaves them out.",
    )
