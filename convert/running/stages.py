"""The stages of a run, each a call of the public function its verb is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adaconvert.errors import InterruptedRunError, OutputConflictError
from adaconvert.io import manifest
from adaconvert.io.names import escape
from adaconvert.io.report_file import write_report
from adaconvert.recipe.model import SOURCE, Stage
from adaconvert.recipe.render import label
from adaconvert.recipe.verbs import MAKES_CHECKPOINT
from adaconvert.running import arguments, record, texts
from adaconvert.running.job import Job, tokens_of
from adaconvert.running.outline import RESUME, SKIPPED, UNCHANGED, Outline
from adaconvert.running.result import RunResult, StageResult, facts_of
from adaconvert.running.state import State, identity

#: name -> function of `adaconvert.api`; handed in, because the API is built on this package.
Calls = Mapping[str, Callable[..., Any]]


class Stages:
    """Runs the stages of one job in order.

    Args:
        job: the job.
        state: of its work folder, which this process holds.
        planned: the plan, which says what is there already.
        calls: functions of the API.
    """

    def __init__(self, job: Job, state: State, planned: Outline, calls: Calls) -> None:
        self._job = job
        self._state = state
        self._planned = planned
        self._calls = calls
        self._status = {stage.name: stage.status for stage in planned.stages}
        self._folders = {SOURCE: str(job.item.source.root)}

    def all(self) -> RunResult:
        """Return the result once every stage is done and the destination is in place."""
        found = []
        for stage in self._job.recipe.stages:
            with arguments.in_stage(stage), self._interruptible(stage):
                found.append(self._one(stage))
                if stage is self._job.final:
                    self._place(stage)
        return RunResult(
            outline=self._planned,
            stages=tuple(found),
            destination=None if self._job.final is None else self._job.destination,
        )

    def _one(self, stage: Stage) -> StageResult:
        status = self._status[stage.name]
        if status == SKIPPED:
            return _result(stage, SKIPPED, arguments.no_repo(stage), {})
        if status == UNCHANGED:
            entry = self._state.stages[stage.name]
            self._folders[stage.name] = str(self._job.work / str(entry["folder"]))
            return _result(stage, UNCHANGED, str(entry["facts"]["line"]), {})
        self._job.request.report(f"stage {stage.name}: {stage.verb}")
        name = self._job.folder(stage)
        self._begin(stage, name)
        found = self._called(stage, name, resume=status == RESUME)
        line = facts_of(stage.verb, found)
        self._folders[stage.name] = str(self._job.work / name)
        self._learn_source(stage, name)
        left = identity(self._job.work / name) if name else {}
        self._state.finish(stage.name, left, {"line": line})
        return _result(stage, "done", line, found)

    def _begin(self, stage: Stage, name: str) -> None:
        """Record that a stage starts; what an earlier run left of it under another name goes."""
        before = str(self._state.stages.get(stage.name, {}).get("folder", ""))
        key = self._job.key(stage, tokens_of(self._state))
        self._state.start(stage.name, key, name)
        if before and before != name:
            self._state.remove(self._job.work / before)

    def _called(self, stage: Stage, name: str, *, resume: bool) -> dict[str, Any]:
        """Return the result of a stage as JSON data."""
        values = arguments.values(stage, self._job, self._folders)
        if stage.verb == "evaluate":
            return self._evaluated(stage, values, name)
        if stage.verb == "push":
            return self._pushed(stage, values)
        make = {"finetune": self._tuned, "calibrate": self._calibrated}.get(
            stage.verb, self._converted
        )
        folder = self._job.work / name
        try:
            return make(stage, values, folder, resume)
        except OutputConflictError:
            if not resume:
                raise
        self._job.request.report(f"stage {stage.name}: cannot be resumed, starts again")
        return make(stage, values, folder, False)

    def _converted(
        self, stage: Stage, values: dict[str, Any], folder: Path, resume: bool
    ) -> dict[str, Any]:
        shared = {"overwrite": True, "resume": resume, "progress": self._job.request.progress}
        sources = [self._folders[name] for name in stage.inputs]
        if stage.verb in ("d2dmoe", "unmoefy"):
            with self._layers(stage, folder, resume) as own:
                done = self._calls[stage.verb](sources[0], folder, **shared, **own, **values)
        else:
            done = self._calls["convert"](
                *sources, destination=folder, method=stage.verb, **shared, **values
            )
        self._tell(done)
        return _plain(done)

    @contextmanager
    def _layers(self, stage: Stage, folder: Path, resume: bool) -> Iterator[dict[str, Any]]:
        """Yield the work folder of a method that keeps finished layers; gone once it is done."""
        if stage.verb != "d2dmoe":
            yield {}
            return
        path = folder.with_name(f"{folder.name}.layers")
        if not resume:
            self._state.remove(path)
        yield {"work": str(path)}
        self._state.remove(path)

    def _tuned(
        self, stage: Stage, values: dict[str, Any], folder: Path, resume: bool
    ) -> dict[str, Any]:
        request = self._job.request
        done = self._calls["finetune"](
            self._folders[stage.inputs[0]],
            folder,
            overwrite=True,
            resume=resume,
            progress=request.progress,
            report=request.report,
            **values,
        )
        self._tell(done)
        return _plain(done)

    def _calibrated(
        self, stage: Stage, values: dict[str, Any], folder: Path, resume: bool
    ) -> dict[str, Any]:
        data = [texts.plain(text) for text in values.pop("data")]
        done = self._calls["calibrate"](
            self._folders[stage.inputs[0]],
            *data,
            destination=folder,
            overwrite=True,
            progress=self._job.request.progress,
            **values,
        )
        self._tell(done)
        return _plain(done)

    def _evaluated(self, stage: Stage, values: dict[str, Any], name: str) -> dict[str, Any]:
        """Return one evaluation for each text; the report is in the work folder afterwards."""
        found: list[dict[str, Any]] = []
        kept = arguments.at_destination(stage, self._job)
        folder = str(self._job.destination) if kept else self._folders[stage.inputs[0]]
        for text in values.pop("data", ()) or (None,):
            data = {} if text is None else {"data": texts.plain(text)}
            done = self._calls["evaluate"](
                folder,
                progress=self._job.request.progress,
                **data,
                **values,
            )
            self._tell(done)
            shown = {} if text is None else {"name": label(texts.plain(text))}
            found.append({**shown, **_plain(done)})
        if kept:
            self._state.remember_placed(record.digest_of(self._job.destination))
        path = self._job.work / name
        self._state.remove(path)
        write_report(path, {"stage": stage.name, "results": found})
        return {"results": [_brief(evaluation) for evaluation in found]}

    def _pushed(self, stage: Stage, values: dict[str, Any]) -> dict[str, Any]:
        request = self._job.request
        done = self._calls["push"](
            arguments.folder_to_push(stage, self._job, self._folders),
            values.pop("repo"),
            progress=request.progress,
            report=request.report,
            **values,
        )
        self._tell(done)
        return _plain(done)

    def _place(self, stage: Stage) -> None:
        """The destination holds the result of a stage, the recipe, and a card that shows it."""
        folder, destination = Path(self._folders[stage.name]), self._job.destination
        recipe = self._job.recipe_text()
        if record.is_placed(folder, destination, recipe, self._state):
            return
        if record.holds(folder, destination):
            record.renew(destination, recipe)
        else:
            ours = record.is_ours(destination, self._state)
            record.place(folder, destination, recipe, overwrite=ours or self._job.request.overwrite)
        self._calls["card"](destination)
        self._state.remember_placed(record.digest_of(destination))

    def _learn_source(self, stage: Stage, name: str) -> None:
        """Keep the digest of the source's weights, which a conversion of it has computed."""
        if stage.inputs[0] != SOURCE or stage.does.makes != MAKES_CHECKPOINT:
            return
        sources: Any = manifest.peek(self._job.work / name).get("sources")
        if sources and isinstance(sources[0].get("digest"), str):
            self._state.source["digest"] = sources[0]["digest"]

    def _tell(self, done: Any) -> None:
        for line in done.lines():
            self._job.request.report(line)

    @contextmanager
    def _interruptible(self, stage: Stage) -> Iterator[None]:
        """A signal in the body says how to go on.

        Raises:
            InterruptedRunError: a signal stopped the body.
        """
        again = "without --from " if self._job.request.from_stage is not None else ""
        hint = (
            f"Run the same command {again}again to go on from there; what is finished is kept in "
            f"{escape(self._job.work.name)}."
        )
        try:
            yield
        except InterruptedRunError as error:
            error.hint = hint
            error.args = (error.describe(),)
            raise
        except KeyboardInterrupt as error:
            raise InterruptedRunError("interrupted", hint=hint) from error


def _result(stage: Stage, status: str, line: str, found: Mapping[str, Any]) -> StageResult:
    return StageResult(name=stage.name, verb=stage.verb, status=status, facts=line, result=found)


def _plain(done: Any) -> dict[str, Any]:
    """Return a result as JSON data that shares nothing with it."""
    found: dict[str, Any] = json.loads(json.dumps(done.to_json()))
    return found


def _brief(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation without its documents, which are in the report."""

    def short(row: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in row.items() if key not in ("documents", "experts")}

    reference = evaluation.get("reference")
    return {
        **evaluation,
        "reference": None if reference is None else short(reference),
        "settings": [short(row) for row in evaluation.get("settings", ())],
    }
