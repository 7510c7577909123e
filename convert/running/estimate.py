"""What a run will take, from its plan alone: the numbers recipes call estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from adaconvert.running.outline import Outline
from adaconvert.units import human_bytes

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates that are assumed, not measured.

    Attributes:
        flops: FLOPs a second while training.
        disk: bytes a second while writing.
        words: what is assumed.
    """

    flops: float
    disk: float
    words: str


#: `cost.machine` of a recipe -> its rates.
MACHINES: Final[Mapping[str, Machine]] = {
    "one H100 with 80 GB": Machine(
        flops=0.2 * 989e12, disk=1e9, words="20 % of 989 TFLOP/s, 1 GB/s of disk"
    ),
    "one H200 with 141 GB": Machine(
        flops=0.2 * 989e12, disk=1e9, words="20 % of 989 TFLOP/s, 1 GB/s of disk"
    ),
    "a CPU of 8 cores": Machine(flops=2e11, disk=5e8, words="200 GFLOP/s, 0.5 GB/s of disk"),
}


def cost_of(plan: Outline, machine: str) -> dict[str, str]:
    """Return the `cost` of a recipe.

    Disk is what all stages write, memory the largest need of one of them; verification, which
    takes what it is given, and evaluations, whose text is not known, are not counted.

    Args:
        plan: of the recipe, on a checkpoint of the right shapes.
        machine: a name of `MACHINES`.
    """
    rates = MACHINES[machine]
    disk = sum(stage.disk for stage in plan.stages)
    memory = max((stage.memory or 0 for stage in plan.stages), default=0)
    seconds = sum(stage.flops for stage in plan.stages) / rates.flops + disk / rates.disk
    return {
        "basis": "estimate",
        "machine": machine,
        "disk": human_bytes(disk),
        "memory": human_bytes(memory),
        "time": f"about {_duration(seconds)} at {rates.words}; measuring not counted",
    }


def _duration(seconds: float) -> str:
    """Return a duration in the largest unit that gives a whole number of at least one."""
    for size, unit in ((_DAY, "days"), (_HOUR, "hours"), (_MINUTE, "minutes")):
        if seconds >= 1.5 * size:
            return f"{round(seconds / size)} {unit}"
    return f"{max(1, round(seconds / _MINUTE))} minute"
