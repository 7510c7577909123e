"""One recipe from start to end: plan everything, then run what has changed, stage by stage."""

from __future__ import annotations

from pathlib import Path

from adaconvert.io.fs import not_enough_space
from adaconvert.io.names import escape
from adaconvert.running import record
from adaconvert.running.job import Job, Request, source_identity, tokens_of
from adaconvert.running.outline import UNCHANGED, Outline, outline, statuses_of
from adaconvert.running.processes import together
from adaconvert.running.result import RunResult
from adaconvert.running.stages import Calls, Stages
from adaconvert.running.state import State


def run(request: Request, calls: Calls) -> RunResult:
    """Return once every stage of a recipe is done, or its plan; see `api.run`.

    Args:
        request: what is asked for.
        calls: functions of `adaconvert.api` by name.
    """
    job = Job.of(request)
    if request.dry_run:
        return RunResult(outline=_planned(job, State.peek(job.work)))
    return together(job.recipe, lambda shared: _run(job, shared), calls)


def _run(job: Job, calls: Calls) -> RunResult:
    request = job.request
    with State.hold(job.work) as state:
        planned = _planned(job, state)
        for line in planned.lines():
            request.report(line)
        _check_room(planned)
        if job.final is not None and not _stays(job, state, planned):
            record.check(job.destination, state, overwrite=request.overwrite)
        return Stages(job, state, planned, calls).all()


def _planned(job: Job, state: State) -> Outline:
    state.source = source_identity(job.item.source, state)
    placed = _is_placed(job, state)
    return outline(job, state, statuses_of(job, state, tokens_of(state), placed=placed))


def _is_placed(job: Job, state: State) -> bool:
    """Return whether the destination is what the last stage that makes a checkpoint has left, and
    only the recipe beside it may be another."""
    folder = _final(job, state)
    return folder is not None and record.is_untouched(folder, job.destination, state)


def _stays(job: Job, state: State, planned: Outline) -> bool:
    """Return whether the destination will not be replaced."""
    folder = _final(job, state)
    same = [stage.name for stage in planned.stages if stage.status == UNCHANGED]
    if folder is None or job.final is None or job.final.name not in same:
        return False
    return record.holds(folder, job.destination)


def _final(job: Job, state: State) -> Path | None:
    """Return the folder of the last stage that makes a checkpoint, None unless it is whole."""
    final = job.final
    if final is None or not state.is_intact(final.name):
        return None
    return job.work / str(state.stages[final.name]["folder"])


def _check_room(planned: Outline) -> None:
    """Return only when the disk holds what the stages will write, checkpoints to resume from
    included.

    Raises:
        ResourceError: it does not.
    """
    if planned.free is not None and planned.peak > planned.free:
        raise not_enough_space(
            "the disk is too small for the stages of this recipe",
            escape(planned.work.name),
            needed=planned.peak,
            free=planned.free,
            hint="Free some space, or name a folder on another disk with --work.",
        )
