"""What about routed blocks can be refused before text is read or a model is loaded."""

from __future__ import annotations

from adaconvert.arch.exits import exits_of
from adaconvert.arch.routed_layers import routed_of
from adaconvert.errors import OptionError
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_config import DEPTH_FIT
from adaconvert.train.parts import DEPTH


def check_depth(item: Described, config: FinetuneConfig) -> None:
    """Return only when what is asked of routed blocks fits the checkpoint.

    Raises:
        OptionError: it does not.
    """
    slots = routed_of(item.spec.adaptive)
    chosen = [slot for slot in slots.values() if slot["select"]["rule"] == "threshold"]
    asked = config.depth.asked
    if not chosen:
        if any(slot["adapter"] is not None for slot in slots.values()):
            asked = [one for one in asked if one != DEPTH_FIT]
        if asked:
            raise OptionError(
                f"{item.source.label} has no blocks whose tokens are chosen",
                where=asked[0],
                hint="`adaconvert depth --kind skip` or `--kind mod` makes them.",
            )
        return
    kinds = {slot["kind"] for slot in chosen}
    if "--predictor-loss" in asked and "mod" not in kinds:
        raise OptionError("is for blocks of --kind mod, which look ahead", where="--predictor-loss")
    if "--adapter-loss" in asked and "skip" not in kinds:
        raise OptionError("is for blocks of --kind skip, which have them", where="--adapter-loss")
    if DEPTH_FIT in asked and "skip" not in kinds:
        raise OptionError("is for blocks of --kind skip", where=DEPTH_FIT)
    if "--depth-ramp" in asked and config.depth.compute is None and "mod" not in kinds:
        raise OptionError("does nothing without --depth-compute", where="--depth-ramp")
    if not asked and not {"all", DEPTH} & set(config.train):
        return
    _check_machine(config)
    if len(kinds) > 1:
        raise OptionError("blocks of both kinds cannot learn together", where="--train")
    if any(slot["kind"] == "mod" and not slot["gate"] for slot in chosen):
        raise OptionError(
            "blocks with --gate 0 teach their routers nothing",
            where="--train",
            hint="Make them with a --gate above 0, such as 0.2.",
        )
    exits = exits_of(item.spec.adaptive)
    if exits is not None and not config.exits.is_off:
        raise OptionError(
            "exits and routed blocks learn one after the other",
            where="--train",
            hint="--exit-weights 0 leaves the exits out.",
        )


def _check_machine(config: FinetuneConfig) -> None:
    """What holds the budget looks at every token of a step."""
    machine = config.machine
    reasons = {
        "--compile": machine.compiled,
        "--fsdp": machine.sharded,
        "--expert-parallel": machine.experts_over > 1,
        "several processes": config.processes > 1,
    }
    found = next((flag for flag, given in reasons.items() if given), None)
    if found is not None:
        raise OptionError(
            "cannot be combined with the training of blocks that tokens may skip",
            where=found,
            hint="Train them in one process.",
        )
