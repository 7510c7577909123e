"""Tasks of lm-evaluation-harness, run on the model object that everything else is measured on."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from adaconvert.errors import AdaconvertError, OptionError, ResourceError
from adaconvert.evaluate.perplexity import Variant
from adaconvert.evaluate.statistics import finite
from adaconvert.io.names import escape, listing
from adaconvert.io.regular import read_text

#: resamplings for metrics without a closed form of their error; the harness's own 100,000 take
#: minutes.
_RESAMPLINGS = 1000
_YAML = (".yaml", ".yml")
_MAX_YAML = 1 << 20
_TASK_NAME = re.compile(r"^task:[ \t]*[\"']?([^\"'\n#]+?)[\"']?[ \t]*(?:#.*)?$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """One metric of one task.

    Attributes:
        task, metric: their names; the metric with its filter where that is not "none".
        value: of the metric.
        error: its standard error, None when the harness gives none.
        samples: documents of the task that were used.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int

    def to_json(self) -> dict[str, object]:
        """Return the result by name."""
        return {
            "task": self.task,
            "metric": self.metric,
            "value": finite(self.value),
            "standard_error": finite(self.error),
            "samples": self.samples,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Tasks:
    """Tasks that exist, and the harness's manager that knows them.

    Attributes:
        names: of tasks or groups.
        manager: a `TaskManager`.
        limit: documents of each task, None for all.
    """

    names: tuple[str, ...]
    manager: Any
    limit: int | None = None


def find_tasks(tasks: str | Sequence[str], limit: int | None = None) -> Tasks:
    """Return the tasks of the given names and files; nothing has run then.

    Args:
        tasks: names the harness knows, or paths of task files (.yaml).
        limit: documents of each task, None for all.

    Raises:
        ResourceError: lm_eval is not installed.
        OptionError: no such task, or a file that names none.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ResourceError(
            "not installed: --tasks runs on it",
            where="package lm_eval",
            hint="Run: pip install 'adaconvert[tasks]'",
        ) from error
    tasks = (tasks,) if isinstance(tasks, str) else tasks
    files = [Path(task).absolute() for task in tasks if task.endswith(_YAML)]
    names = [name_in(Path(task)) if task.endswith(_YAML) else task for task in tasks]
    folders = sorted({str(path.parent) for path in files})
    with _muffled():
        # indexing the harness's own tasks takes many seconds
        manager = TaskManager(
            include_path=folders or None, include_defaults=len(files) < len(tasks)
        )
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise OptionError(
            "lm_eval knows no such task",
            where="--tasks",
            found=listing(unknown, 8),
            hint="List them with `lm_eval ls tasks`, or give a task file (.yaml).",
        )
    return Tasks(names=tuple(names), manager=manager, limit=limit)


def name_in(path: Path) -> str:
    """Return the task a task file defines.

    Raises:
        OptionError: it is missing, or defines none.
    """
    where = f"--tasks {escape(path.name)}"
    text = read_text(path, where, _MAX_YAML).replace("\r\n", "\n")
    match = _TASK_NAME.search(text)
    if match is None:
        raise OptionError("defines no task", where=where, expected="a line 'task: NAME'")
    return match[1]


def run_tasks(
    variant: Variant, tokenizer: Any, tasks: Tasks, *, batch_size: int | None = None
) -> tuple[TaskResult, ...]:
    """Return every metric of every task for one model at one setting.

    Raises:
        ResourceError: the data of a task cannot be fetched.
        OptionError: a task cannot be run on this model.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        with _muffled(), variant.setting.applied(variant.model):
            # the harness guesses the kind from model_type, and does not know ours
            model = HFLM(
                pretrained=variant.model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size or 1,
            )
            found: Any = simple_evaluate(
                model=model,
                tasks=list(tasks.names),
                task_manager=tasks.manager,
                limit=tasks.limit,
                bootstrap_iters=_RESAMPLINGS,
                log_samples=False,
            )
    except AdaconvertError:
        raise
    # a task is foreign code and data, and fails as it likes
    except Exception as error:
        raise _failure(error, tasks) from error
    return tuple(_results(found))


def _results(found: Any) -> Iterator[TaskResult]:
    counts = found.get("n-samples", {})
    for task, metrics in found["results"].items():
        samples = int(counts.get(task, {}).get("effective", 0))
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            # bookkeeping of newer versions, not metrics
            if not filtered:
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            yield TaskResult(
                task=task,
                metric=metric if filtered == "none" else f"{metric} ({filtered})",
                value=float(value),
                error=float(error) if isinstance(error, int | float) else None,
                samples=samples,
            )


def _failure(error: Exception, tasks: Tasks) -> AdaconvertError:
    where = f"--tasks {listing(list(tasks.names), 4)}"
    kinds = {cls.__name__ for cls in type(error).__mro__}
    offline = {"ConnectionError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}
    if kinds & offline:
        hint = "Check the network and HF_HUB_OFFLINE, or use a task with local data."
        return ResourceError("the data of a task cannot be fetched", where=where, hint=hint)
    return OptionError(
        "cannot be run", where=where, found=f"{type(error).__name__}: {escape(error, 160)}"
    )


@contextmanager
def _muffled() -> Iterator[None]:
    """Keep the harness's log, and its bars where nobody watches, off stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    watched = sys.stderr is not None and sys.stderr.isatty()
    try:
        if watched:
            yield
        else:
            with redirect_stderr(StringIO()):
                yield
    finally:
        logger.setLevel(level)
