"""A run that torchrun or accelerate started several times: the first process runs the recipe, and
the others join it whenever it trains.

    torchrun --nproc-per-node 8 -m adaconvert run RECIPE SRC DST --set tune.fsdp=true

On several machines the work folder must be on a disk that all of them see; see `train.ranks`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from adaconvert.recipe.model import Recipe
from adaconvert.running.job import process_count
from adaconvert.running.result import RunResult
from adaconvert.train.ranks import Group, OtherProcessError, joined

Calls = Mapping[str, Callable[..., Any]]


def together(recipe: Recipe, lead: Callable[[Calls], RunResult], calls: Calls) -> RunResult:
    """Return what `lead` returns in the first process, in every process.

    Args:
        recipe: what is run.
        lead: runs it, with the functions it is given.
        calls: functions of the API.

    Raises:
        OtherProcessError: another process failed.
    """
    if process_count() == 1:
        return lead(calls)
    devices = [stage.options.get("device") for stage in recipe.stages if stage.verb == "finetune"]
    with joined(on_cpu="cpu" in devices) as group:
        if not group.is_main:
            return _follow(group, calls)
        result = lead({**calls, "finetune": _announced(group, calls["finetune"])})
        group.on_main(lambda: result)
        return result


def _announced(group: Group, finetune: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, which all processes call when the first one does."""

    def call(*args: Any, **given: Any) -> Any:
        order = (args, {key: value for key, value in given.items() if key not in _OWN})
        group.on_main(lambda: order)
        return finetune(*args, **given)

    return call


#: what only the first process does.
_OWN = ("report", "progress")


def _follow(group: Group, calls: Calls) -> RunResult:
    while True:
        found: Any = group.on_main(lambda: None)
        if isinstance(found, RunResult):
            return found
        args, given = found
        # the first process says what follows from its error, or ends and all with it
        with suppress(OtherProcessError):
            calls["finetune"](*args, **given)
