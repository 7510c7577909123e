"""From a stage to the arguments of the API function its verb is, and to errors that name it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adaconvert.errors import AdaconvertError, OptionError
from adaconvert.methods.sources import Described, open_source
from adaconvert.planning.estimate import costs
from adaconvert.recipe.model import SOURCE, Stage
from adaconvert.recipe.options import CHECKPOINT, FINETUNE, TEXT_SOURCE, TEXT_SOURCES
from adaconvert.running import texts
from adaconvert.running.job import Job, process_count
from adaconvert.running.room import planned_memory
from adaconvert.train.checks import check_source, settled
from adaconvert.train.config import FinetuneConfig
from adaconvert.units import human_count


def values(stage: Stage, job: Job, folders: Mapping[str, str]) -> dict[str, Any]:
    """Return the options of a stage with texts and folders in the place of references.

    Args:
        stage: the stage.
        job: of the run.
        folders: of the source and of every stage that is done.
    """
    table = stage.does.table()
    found: dict[str, Any] = {}
    for name, value in stage.options.items():
        role = table[name].role
        found[name] = value
        if role == TEXT_SOURCES:
            found[name] = texts.expand(value, job.recipe)
        elif role == TEXT_SOURCE:
            found[name] = texts.expand((value,), job.recipe)[0]
        elif role == CHECKPOINT and value[:1] == "$":
            found[name] = folders[value[1:]]
    return found


def stages_named(stage: Stage) -> list[str]:
    """Return the stages a stage's options refer to, "source" among them."""
    table = stage.does.table()
    return [
        value[1:]
        for name, value in stage.options.items()
        if table[name].role == CHECKPOINT and value[:1] == "$"
    ]


def no_repo(stage: Stage) -> str:
    """Return what is said of a push that has nowhere to go."""
    return f"nothing is pushed; to do so: --set {stage.name}.repo=ORG/NAME"


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A fine-tune before it runs.

    Attributes:
        words: its budget.
        memory: bytes it needs.
        kept: bytes on disk of checkpoints to resume from, while it runs.
        flops: of the whole of it.
        warning: why it will be refused on this machine, '' when nothing is known to be in the way.
    """

    words: str
    memory: int
    kept: int
    flops: int
    warning: str


def training(stage: Stage, job: Job, where: str) -> Training:
    """Return what a fine-tune will take.

    Args:
        stage: the fine-tune.
        job: of the run.
        where: what it will train, with its real shapes.

    Raises:
        OptionError: an option does not fit the model.
    """
    left = ("data", "valid", *FINETUNE)
    given = {name: value for name, value in stage.options.items() if name not in left}
    sources = texts.expand(stage.options["data"], job.recipe) or ("data",)
    given["teacher"] = _planned_teacher(given.get("teacher"), job)
    with in_stage(stage):
        config = replace(FinetuneConfig.of(sources, given), processes=process_count())
        item = open_source(where)
        check_source(item, config)
        config = settled(config, item)
        tokens = config.total_steps * config.step_tokens
        words = f"{human_count(tokens)} tokens in {config.total_steps} steps"
        planned = planned_memory(stage, item, config)
        return Training(
            words=f"{words}, trains {', '.join(config.train)}",
            memory=planned.needed,
            kept=planned.kept,
            flops=tokens * _passes(config) * forward(item, config.seq_len),
            warning=planned.warning,
        )


def _planned_teacher(given: Any, job: Job) -> Any:
    """Return a teacher whose size can be told before anything runs: the source has the shapes of
    any dense one, where it is a stage that may not have run or a model that is not here."""
    if not isinstance(given, str) or Path(given).is_dir():
        return given
    return str(job.item.source.root)


def forward(item: Described, context: int) -> int:
    """Return the FLOPs of one token going forward through a checkpoint."""
    stored = {name: ref.dtype for name, ref in item.source.tensors.items()}
    return costs(item.spec, stored, context).flops


def _passes(config: FinetuneConfig) -> int:
    """Return what a training step costs in forward passes: one, and two back; one more each for
    what is computed again and for a teacher."""
    return 3 + config.checkpointing + bool(config.distill or config.distill_hidden)


@contextmanager
def in_stage(stage: Stage) -> Iterator[None]:
    """Errors of the body say which stage they are about.

    Raises:
        AdaconvertError: the same error, with the stage in front.
    """
    try:
        yield
    except AdaconvertError as error:
        where = f"stage '{stage.name}'"
        error.where = where if error.where is None else f"{where}: {error.where}"
        error.args = (error.describe(),)
        raise


def folder_to_push(stage: Stage, job: Job, folders: Mapping[str, str]) -> Path:
    """Return the folder a push sends: the destination for the last checkpoint of a run.

    Raises:
        OptionError: it would send the source itself.
    """
    name = stage.inputs[0]
    if name == SOURCE:
        raise OptionError("there is no result to push", where=f"stage '{stage.name}'")
    return job.destination if at_destination(stage, job) else Path(folders[name])


def at_destination(stage: Stage, job: Job) -> bool:
    """Return whether a stage reads the destination, or changes what is said of it there."""
    is_last = job.final is not None and stage.inputs[0] == job.final.name
    return is_last and (stage.verb == "push" or bool(stage.options.get("record")))
