"""The plan of a run: every stage with its size and what is there of it, before anything is done."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from adaconvert.arch.registry import describe
from adaconvert.conversion import prepare_run
from adaconvert.dtypes import BY_CONFIG_NAME, BY_NAME
from adaconvert.io.fs import free_bytes
from adaconvert.io.layout import Target
from adaconvert.io.source import Source
from adaconvert.methods.molora.adapter_source import is_adapter_folder, open_adapters
from adaconvert.methods.planned import Planned
from adaconvert.recipe.model import SOURCE, Stage
from adaconvert.recipe.options import CONVERT
from adaconvert.recipe.render import options_line
from adaconvert.recipe.verbs import MAKES_CHECKPOINT, MAKES_REPOSITORY
from adaconvert.reports import PlanReport
from adaconvert.running import arguments, texts
from adaconvert.running.job import Job
from adaconvert.running.stand_in import write_stand_in
from adaconvert.running.state import STARTED, State
from adaconvert.units import human_bytes

#: what a stage is about to be.
UNCHANGED: Final = "unchanged"
RESUME: Final = "to resume"
TO_DO: Final = "to do"
SKIPPED: Final = "left out"
CONVERSIONS: Final = (
    *("upcycle", "moefy", "unmoefy", "d2dmoe", "adamoe", "molora", "early-exit", "depth"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage before it runs.

    Attributes:
        name, verb, inputs: of the stage.
        status: `UNCHANGED`, `RESUME`, `TO_DO` or `SKIPPED`.
        does: what it will do, in a few words.
        disk: bytes it writes, 0 for next to none.
        kept: bytes of checkpoints to resume from; they go when it is done.
        memory: bytes it needs, None when that is not known.
        flops: of its training, 0 when it trains nothing.
        exactness: of its result, '' when its verb promises none.
        notes: what the user should know.
        warnings: what will keep the stage from being done.
        report: the plan of a conversion.
    """

    name: str
    verb: str
    inputs: tuple[str, ...]
    status: str
    does: str
    disk: int = 0
    kept: int = 0
    memory: int | None = None
    flops: int = 0
    exactness: str = ""
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    report: PlanReport | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON data."""
        return {
            "name": self.name,
            "verb": self.verb,
            "from": list(self.inputs),
            "status": self.status,
            "does": self.does,
            "disk_bytes": self.disk,
            "temporary_bytes": self.kept,
            "memory_bytes": self.memory,
            "training_flops": self.flops,
            "exactness": self.exactness or None,
            "notes": list(self.notes),
            "warnings": list(self.warnings),
            "plan": None if self.report is None else self.report.to_json(),
        }

    def lines(self) -> list[str]:
        """Return the plan as text."""
        held = "has" if self.status == UNCHANGED else "writes"
        sizes = [f"{held} {human_bytes(self.disk)}"] if self.disk else []
        if self.kept and self.status in (TO_DO, RESUME):
            sizes += [f"keeps up to {human_bytes(self.kept)} to resume from"]
        sizes += [f"needs {human_bytes(self.memory)} of memory"] if self.memory else []
        sizes += [f"trains for {self.flops:.2g} FLOPs"] if self.flops else []
        sizes += [self.exactness] if self.exactness else []
        head = f"{self.name:<12} {self.status:<10} {self.verb} {' + '.join(self.inputs)}"
        tail = f": {self.does}" if self.does else ""
        rows = [f"{head}{tail}"]
        if sizes:
            rows.append(f"{'':<24}{', '.join(sizes)}")
        told = [f"warning: {text}" for text in self.warnings]
        told += [f"note: {text}" for text in self.notes]
        return [*rows, *(f"{'':<24}{text}" for text in told)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The plan of a run.

    Attributes:
        recipe: name and title.
        source: label of the source.
        destination, work: folders.
        stages: in order.
        free: bytes free where the work folder lies, None when unknown.
        missing: names of texts that are still to be given.
    """

    recipe: tuple[str, str]
    source: str
    destination: Path
    work: Path
    stages: tuple[StagePlan, ...]
    free: int | None
    missing: tuple[str, ...] = ()

    @property
    def disk(self) -> int:
        """Return the bytes that stages still to run write."""
        return sum(stage.disk for stage in self.stages if stage.status in (TO_DO, RESUME))

    @property
    def peak(self) -> int:
        """Return the most bytes that are there at a time of what stages still to run write."""
        written, most = 0, 0
        for stage in self.stages:
            if stage.status in (TO_DO, RESUME):
                written += stage.disk
                most = max(most, written + stage.kept)
        return most

    def to_json(self) -> dict[str, object]:
        """Return the plan as JSON data."""
        return {
            "recipe": self.recipe[0],
            "title": self.recipe[1],
            "source": self.source,
            "destination": self.destination.name,
            "disk_bytes": self.disk,
            "peak_bytes": self.peak,
            "free_bytes": self.free,
            "missing": list(self.missing),
            "stages": [stage.to_json() for stage in self.stages],
        }

    def lines(self) -> list[str]:
        """Return the plan as text."""
        name, title = self.recipe
        free = "" if self.free is None else f"; {human_bytes(self.free)} are free"
        rows = [f"{name}: {title}", f"from {self.source} to {self.destination}", ""]
        rows += [line for stage in self.stages for line in stage.lines()]
        most = f", at most {human_bytes(self.peak)} at a time" if self.peak > self.disk else ""
        rows += ["", f"writes {human_bytes(self.disk)} in {self.work}{most}{free}"]
        rows += [f"note: data.{name} is still to be given" for name in self.missing]
        return rows


@dataclass(slots=True, kw_only=True)
class _Shape:
    """A checkpoint that may not exist yet: where to plan on it, and how large it is.

    Attributes:
        where: folder or hub id with its config and headers, '' until it is asked for.
        nbytes: of its weights.
        planned: what will write it.
    """

    where: str
    nbytes: int
    planned: Planned | None = None

    def at(self, scratch: Path) -> str:
        """Return where it can be planned on; a stand-in is made for one that is only planned."""
        if not self.where and self.planned is not None:
            name = f"planned-{len(list(scratch.iterdir()))}"
            self.where = str(write_stand_in(scratch / name, *_content(self.planned)))
        return self.where


def _content(planned: Planned) -> tuple[Mapping[str, object], Sequence[Target]]:
    """Return config.json and tensors of a result; adapters stand beside their base, as later stages
    run them."""
    folder = planned.folder
    if folder is None:
        return planned.plan.config, planned.plan.targets
    tensors = describe(folder.target, folder.dtypes).tensors
    stored = [
        _Stored(name=tensor.name, dtype=folder.dtypes[tensor.name], shape=tensor.shape)
        for tensor in tensors
        if tensor.name in folder.dtypes
    ]
    return folder.target, stored


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """One tensor of a stand-in."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str = ""


def outline(job: Job, state: State, statuses: Mapping[str, str]) -> Outline:
    """Return the plan of a job.

    Args:
        job: the job.
        state: of its work folder.
        statuses: of each stage.

    Raises:
        AdaconvertError: a stage cannot be done, for reasons that show before it is tried.
    """
    with tempfile.TemporaryDirectory(prefix="adaconvert-plan-") as scratch:
        planner = _Planner(job, state, statuses, Path(scratch))
        plans = tuple(planner.plan(stage) for stage in job.recipe.stages)
    missing = {name for stage in job.recipe.stages for name in texts.missing(stage, job.recipe)}
    return Outline(
        recipe=(job.recipe.name, job.recipe.title),
        source=job.item.source.label,
        destination=job.destination,
        work=job.work,
        stages=plans,
        free=free_bytes(job.work),
        missing=tuple(sorted(missing)),
    )


class _Planner:
    """Goes through the stages and knows the shape of what each leaves."""

    def __init__(self, job: Job, state: State, statuses: Mapping[str, str], scratch: Path) -> None:
        self._job = job
        self._state = state
        self._statuses = statuses
        self._scratch = scratch
        self._shapes = {SOURCE: _Shape(where=job.where, nbytes=_weights(job.item.source))}

    def plan(self, stage: Stage) -> StagePlan:
        """Return the plan of a stage; stages before it have been planned."""
        made = StagePlan(
            name=stage.name,
            verb=stage.verb,
            inputs=stage.inputs,
            status=self._statuses[stage.name],
            does=_does(stage),
        )
        if made.status == UNCHANGED:
            return self._as_it_is(stage, made)
        if stage.verb in CONVERSIONS:
            return self._conversion(stage, made)
        if stage.does.makes == MAKES_CHECKPOINT:
            return self._pass_on(stage, made)
        if stage.verb == "evaluate":
            return replace(made, memory=self._held(stage))
        if stage.does.makes == MAKES_REPOSITORY and made.status == SKIPPED:
            return replace(made, does="", notes=(arguments.no_repo(stage),))
        return made

    def _as_it_is(self, stage: Stage, made: StagePlan) -> StagePlan:
        if stage.does.makes != MAKES_CHECKPOINT:
            return made
        folder = self._job.work / str(self._state.stages[stage.name]["folder"])
        held = open_adapters(folder).source if is_adapter_folder(folder) else Source.open(folder)
        nbytes = _weights(held)
        self._shapes[stage.name] = _Shape(where=str(folder), nbytes=nbytes)
        return replace(made, disk=nbytes)

    def _conversion(self, stage: Stage, made: StagePlan) -> StagePlan:
        where = [self._shapes[name].at(self._scratch) for name in stage.inputs]
        given = {
            name: self._value(stage, name)
            for name in stage.options
            if name not in CONVERT or name in ("keep_config", "ignore_unindexed")
        }
        keep, ignore = given.pop("keep_config", ()), given.pop("ignore_unindexed", False)
        revision = self._job.revision if stage.inputs == (SOURCE,) else None
        with arguments.in_stage(stage):
            prepared = prepare_run(where, stage.verb, given, revision, keep, ignore)
        report = PlanReport.of(prepared.planned, stage.options.get("max_shard_size", "5GB"))
        self._shapes[stage.name] = _Shape(where="", nbytes=report.disk, planned=prepared.planned)
        return replace(
            made,
            disk=report.disk,
            memory=report.memory,
            exactness=report.exactness.kind,
            report=report,
        )

    def _value(self, stage: Stage, name: str) -> Any:
        """Return an option with references as they can be planned with."""
        value = stage.options[name]
        if value == "$source" or (isinstance(value, str) and value[1:] in self._shapes):
            return self._shapes[value[1:]].at(self._scratch)
        if isinstance(value, str) and value[:1] == "$":
            return (self._job.recipe.data[value[1:]] or (self._words(),))[0]
        return value

    def _words(self) -> str:
        """Return a text that stands for one that is still to be given."""
        path = self._scratch / "text.txt"
        if not path.exists():
            path.write_text("This text stands for one that is still to be given. " * 2000)
        return str(path)

    def _held(self, stage: Stage) -> int:
        """Return the bytes of every checkpoint a stage loads."""
        names = [*stage.inputs, *arguments.stages_named(stage)]
        return sum(self._shapes[name].nbytes for name in names)

    def _pass_on(self, stage: Stage, made: StagePlan) -> StagePlan:
        """Return the plan of a stage whose result has the shapes of what it goes on from."""
        before = self._shapes[stage.inputs[0]]
        nbytes = before.nbytes
        dtype = BY_CONFIG_NAME.get(str(stage.options.get("dtype", "keep")))
        if dtype is not None and stage.verb == "finetune":
            stored = self._job.item.source.tensors.values()
            usual = max(stored, key=lambda ref: ref.nbytes).dtype
            nbytes = nbytes * dtype.nbytes // BY_NAME[usual].nbytes
        self._shapes[stage.name] = replace(before, nbytes=nbytes)
        if stage.verb != "finetune":
            return replace(made, disk=nbytes, memory=self._held(stage))
        found = arguments.training(stage, self._job, before.at(self._scratch))
        return replace(
            made,
            disk=nbytes,
            does=found.words,
            kept=found.kept,
            memory=found.memory,
            flops=found.flops,
            warnings=(found.warning,) if found.warning else (),
        )


def statuses_of(
    job: Job, state: State, tokens: Mapping[str, str], *, placed: bool
) -> dict[str, str]:
    """Return what each stage is about to be.

    Args:
        job: the job.
        state: of its work folder.
        tokens: of the source and of every stage that is done and intact.
        placed: the destination is what these stages have left there.
    """
    found: dict[str, str] = {}
    again = False
    for stage in job.recipe.stages:
        again = again or stage.name == job.request.from_stage
        there = arguments.at_destination(stage, job)
        if stage.does.makes == MAKES_REPOSITORY and not stage.options.get("repo"):
            found[stage.name] = SKIPPED
            continue
        found[stage.name] = TO_DO
        if not again and (placed or not there) and _inputs_stay(stage, found):
            found[stage.name] = _status(job, state, stage, tokens)
        if there and found[stage.name] != UNCHANGED:
            # what is said there changes, so later stages that read it see something new
            placed = False
    return found


def _status(job: Job, state: State, stage: Stage, tokens: Mapping[str, str]) -> str:
    entry = state.stages.get(stage.name, {})
    if entry.get("key") != job.key(stage, tokens):
        return TO_DO
    return UNCHANGED if stage.name in tokens else _begun(entry)


def _begun(entry: Mapping[str, Any]) -> str:
    return RESUME if entry.get("status") == STARTED else TO_DO


def _inputs_stay(stage: Stage, found: Mapping[str, str]) -> bool:
    names = {*stage.inputs, *arguments.stages_named(stage)} - {SOURCE}
    return all(found.get(name) == UNCHANGED for name in names)


def _weights(source: Source) -> int:
    return sum(ref.nbytes for ref in source.tensors.values())


def _does(stage: Stage) -> str:
    """Return what a stage does, in a few words: its options."""
    return options_line(stage.options)
