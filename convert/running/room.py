"""Whether a fine-tune of a plan will find the memory it needs on this machine.

The plan warns; `finetune` itself refuses, when its turn comes and with what is free then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.methods.sources import Described
from adaconvert.recipe.model import Stage
from adaconvert.recipe.options import FINETUNE
from adaconvert.train.config import FinetuneConfig
from adaconvert.units import human_bytes

if TYPE_CHECKING:
    from adaconvert.train.memory import Need
    from adaconvert.train.memory_advice import Room


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedMemory:
    """What a fine-tune of a plan needs.

    Attributes:
        needed: bytes in each process.
        kept: bytes on disk of the checkpoints to resume from, as many as there are at a time.
        warning: why that is more than there is, and which settings need less; '' when it fits.
    """

    needed: int
    kept: int = 0
    warning: str = ""


def planned_memory(stage: Stage, item: Described, config: FinetuneConfig) -> PlannedMemory:
    """Return what a fine-tune needs, counted from config and shapes; no weight is read.

    Args:
        stage: the fine-tune.
        item: what it will train, with its real shapes.
        config: the fine-tune.

    Raises:
        OptionError: an option does not fit the model, or a size is none.
    """
    from adaconvert.train.memory_advice import need_for, passes_through, room_of, stored_bytes
    from adaconvert.train.sparsify import with_activation

    changed = with_activation(item.source.config, item.spec, config.sparsity.activation)
    need = need_for(item, config, changed=changed)
    needed = need.total
    room = room_of(
        str(stage.options.get("device", FINETUNE["device"].default)),
        memory=stage.options.get("memory"),
        on_machine=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )
    warning = ""
    if needed > room.free:
        there = f"it needs {human_bytes(needed)}, and {human_bytes(room.free)} are free on "
        there += f"{room.device}; {_advice(stage, item, config, room, changed)}"
        warning = f"will be refused here: {there}"
    elif not passes_through(item, room):
        warning = (
            f"will be refused here: the model, {human_bytes(stored_bytes(item))}, is loaded "
            f"through this machine's memory, of which {human_bytes(room.host)} are free"
        )
    return PlannedMemory(needed=needed, kept=_kept(need, config), warning=warning)


def _kept(need: Need, config: FinetuneConfig) -> int:
    """Return the bytes of the checkpoints to resume from: trained weights, which have the size of
    their gradients, and the optimizer's state."""
    from adaconvert.train.memory import spreads
    from adaconvert.train.work import KEPT

    if not config.save_steps:
        return 0
    one = sum(need.gradients.values()) + sum(need.optimizer.values())
    one *= config.processes if spreads(config) else 1
    # one more while the next is written
    return one * min(KEPT + 1, config.total_steps // config.save_steps)


def _advice(
    stage: Stage,
    item: Described,
    config: FinetuneConfig,
    room: Room,
    changed: Mapping[str, Any],
) -> str:
    """Return the settings nearest to those asked for that fit, or that nothing does."""
    from adaconvert.train.memory_advice import alternatives

    least: tuple[str, int] | None = None
    for words, needed in alternatives(item, config, changed=changed):
        if needed <= room.free:
            return f"{as_settings(stage.name, words)} needs {human_bytes(needed)}"
        if least is None or needed < least[1]:
            least = (words, needed)
    if least is None:
        return "no setting needs less"
    return f"the least is {as_settings(stage.name, least[0])} with {human_bytes(least[1])}"


def as_settings(stage: str, words: str) -> str:
    """Return options of the command line as settings of a stage: `--batch-size 1` of the stage
    "tune" is `--set tune.batch_size=1`."""
    options = [part.split() for part in f" {words}".split(" --")[1:]]
    return " ".join(
        f"--set {stage}.{name.replace('-', '_')}={' '.join(value) or 'true'}"
        for name, *value in options
    )
