"""What is measured on text: quality, cost, and settings with a guarantee."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaconvert.api.paths import PathLike

if TYPE_CHECKING:
    from adaconvert.evaluate.calibration_result import CalibrationResult
    from adaconvert.evaluate.report import Evaluation


def evaluate(checkpoint: PathLike, **options: Any) -> Evaluation:
    """Return how good a checkpoint is and what it costs; its weights are not changed.

    Args:
        checkpoint: folder, hub-cache snapshot or hub id; adaptive, Mixture-of-Experts or dense.
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

    return evaluate_checkpoint(str(checkpoint), EvaluateOptions(**options))


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
            or `max_loss_increase` and `confidence`, and others.

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

    settings = CalibrationSettings.of([str(where) for where in data], options)
    return run(checkpoint, settings, destination=destination, overwrite=overwrite)
