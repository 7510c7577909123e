"""What is measured on text: quality, cost, and settings with a guarantee."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adaconvert.api.paths import PathLike

if TYPE_CHECKING:
    from adaconvert.evaluate.calibration_result import CalibrationResult
    from adaconvert.evaluate.options import EvaluateOptions
    from adaconvert.evaluate.report import Evaluation


def evaluate(checkpoint: PathLike, *, base: PathLike | None = None, **options: Any) -> Evaluation:
    """Return how good a checkpoint is and what it costs; its weights are not changed.

    Args:
        checkpoint: folder, hub-cache snapshot or hub id; adaptive, Mixture-of-Experts or dense, or
            a PEFT folder of routed adapters or of a LoRA.
        base: folder or hub id of the model a PEFT folder is for; what that names itself when None.
        options: fields of `adaconvert.evaluate.options.EvaluateOptions`.

    Raises:
        OptionError: options that do not fit together or the model (exit code 2).
        DataError: the data are missing, damaged or do not fit the model (2).
        SourceError: a checkpoint is damaged, or computes NaN (3).
        OutputConflictError: `out` exists (4).
        ResourceError: memory, the hub or a package does not suffice (6).
    """
    from adaconvert.evaluate.options import EvaluateOptions
    from adaconvert.evaluate.run import evaluate_checkpoint
    from adaconvert.methods.molora.view import standing

    asked = EvaluateOptions(**options)
    asked.check()
    under, where = None if base is None else str(base), str(checkpoint)
    with (
        standing(where, base=under, revision=asked.revision) as (found, view),
        _reference(asked) as compared,
    ):
        revision = asked.revision if view is None else None
        settled = replace(asked, reference=compared, revision=revision)
        return evaluate_checkpoint(found, settled, kept_in=where)


@contextmanager
def _reference(options: EvaluateOptions) -> Iterator[str | None]:
    """Yield the checkpoint to compare with; an adapter folder as a checkpoint."""
    from adaconvert.methods.molora.view import standing

    if options.reference is None:
        yield None
        return
    with standing(str(options.reference)) as (found, _):
        yield found


def calibrate(
    checkpoint: PathLike,
    *data: PathLike,
    destination: PathLike | None = None,
    overwrite: bool = False,
    **options: Any,
) -> CalibrationResult:
    """Return what each setting of an adaptive checkpoint costs and loses, once that is stored.

    The table and the chosen setting go into config.json and the card; weights do not change.

    Args:
        checkpoint: folder of an adaptive checkpoint; updated as a whole or not at all.
        data: text files, folders or hub data sets; for a classifier of images, folders of images
            or files that list them.
        destination: write a calibrated copy there and leave `checkpoint` as it is.
        overwrite: replace a destination adaconvert wrote.
        options: fields of `CalibrationSettings` and `Reading` in `adaconvert.evaluate`: `budget`,
            or `max_loss_increase`, `max_disagreement`, `max_label_error` and `confidence`, and
            others.

    Raises:
        OptionError: options that do not fit together or the model, or the budget is out of reach
            (exit code 2).
        DataError: the data are missing, damaged or too few; says how many are needed (2).
        SourceError: the checkpoint is damaged, or computes NaN (3).
        OutputConflictError: it holds files adaconvert did not write, or the destination is taken
            (4).
        ResourceError: disk, memory, permissions or the hub do not suffice (6).
    """
    from adaconvert.evaluate.calibration import calibrate as run
    from adaconvert.evaluate.calibration_settings import CalibrationSettings
    from adaconvert.methods.molora.adapter_source import refuse_adapters

    refuse_adapters(checkpoint)
    settings = CalibrationSettings.of([str(where) for where in data], options)
    return run(checkpoint, settings, destination=destination, overwrite=overwrite)
