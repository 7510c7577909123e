"""The documented Python API: `convert`, `d2dmoe`, `unmoefy`, `inspect`, `inspect_activations`,
`plan`, `verify`, `evaluate`, `finetune`, `calibrate`.

Each returns an object with `to_json()` (plain data) and `lines()` (text for people); each raises an
`AdaconvertError` whose message says what, where, expected, found and what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.inspection import Inspection, inspect_source
from adaconvert.reports import ConversionResult, PlanReport

if TYPE_CHECKING:
    from adaconvert.activations import ActivationReport
    from adaconvert.evaluate.calibration_result import CalibrationResult
    from adaconvert.evaluate.report import Evaluation
    from adaconvert.methods.d2dmoe.result import D2dmoeResult
    from adaconvert.train.result import FinetuneResult
    from adaconvert.verification.report import VerificationReport

__all__ = [
    "calibrate",
    "convert",
    "d2dmoe",
    "evaluate",
    "finetune",
    "inspect",
    "inspect_activations",
    "plan",
    "unmoefy",
    "verify",
]

PathLike = str | Path


def convert(
    *sources: PathLike,
    destination: PathLike,
    method: str = "upcycle",
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = True,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    memory: str | int | None = None,
    probe: PathLike | None = None,
    allow_nonfinite: bool = False,
    keep_config: tuple[str, ...] = (),
    ignore_unindexed: bool = False,
    progress: bool = False,
    **options: object,
) -> ConversionResult:
    """Return once `destination` holds the converted checkpoint, whole and verified.

    Args:
        sources: one checkpoint (folder, hub-cache snapshot or hub id), or several to mix.
        destination: folder that must not exist, or be empty, unless `overwrite`.
        method: registered name of the method.
        overwrite: replace a folder adaconvert wrote; it stays in place until the new one is
            complete.
        resume: continue a killed run of the same plan from its last complete shard.
        verify: reload the result and hold it to its exactness class before it gets its name.
        max_shard_size: cap of a shard in bytes, or text with a unit such as "5GB" or "500MiB".
        revision: branch, tag or commit of hub ids.
        memory: bytes verification may take; larger models are compared block by block.
        probe: text file to compare on instead of the shipped text.
        allow_nonfinite: accept NaN and infinities in source tensors; recorded in the manifest.
        keep_config: further config.json keys of the source to carry over.
        ignore_unindexed: leave out tensors the source's index does not list instead of refusing
            them.
        progress: show progress bars on a terminal.
        options: the method's own options: fields of `methods.upcycle.config.UpcycleConfig` or
            `methods.moefy.config.MoefyConfig`.

    Raises:
        OptionError: an option is wrong or the method does not support the source (exit code 2).
        SourceError: a source is damaged or incomplete (3).
        OutputConflictError: the destination is taken (4).
        VerificationError: the result is not what its class promises; nothing is left behind (5).
        ResourceError: disk, memory or permissions do not suffice (6).
    """
    from adaconvert.conversion import RunSettings, run

    settings = RunSettings(
        destination=Path(destination),
        overwrite=overwrite,
        resume=resume,
        verify=verify,
        max_shard_size=max_shard_size,
        revision=revision,
        memory=memory,
        probe=None if probe is None else Path(probe),
        allow_nonfinite=allow_nonfinite,
        keep_config=(keep_config,) if isinstance(keep_config, str) else tuple(keep_config),
        ignore_unindexed=ignore_unindexed,
        progress=progress,
    )
    return run([str(s) for s in sources], method, options, settings)


def unmoefy(source: PathLike, destination: PathLike, **settings: Any) -> ConversionResult:
    """Return once `destination` holds the dense model an adaptive checkpoint was made of.

    Args:
        source: a checkpoint `moefy` or `d2dmoe` made, trained since or not.
        destination: as for `convert`.
        settings: keyword arguments of `convert` about how it runs.

    Raises:
        SourceError: the source holds no split networks (3); otherwise as `convert`.
    """
    return convert(source, destination=destination, method="unmoefy", **settings)


def plan(
    *sources: PathLike,
    method: str = "upcycle",
    revision: str | None = None,
    max_shard_size: str | int = "5GB",
    keep_config: tuple[str, ...] = (),
    ignore_unindexed: bool = False,
    **options: object,
) -> PlanReport:
    """Return what a conversion would write, need and promise; reads headers and config only.

    Args and errors as for `convert`.
    """
    from adaconvert.conversion import prepare_run

    prepared = prepare_run(
        [str(s) for s in sources], method, options, revision, keep_config, ignore_unindexed
    )
    return PlanReport.of(prepared.planned, max_shard_size)


def inspect(source: PathLike, *, revision: str | None = None) -> Inspection:
    """Return what a checkpoint is: family, sizes, costs, dtypes, ties and problems; reads no
    weights.

    Raises:
        SourceError: it cannot be read as a checkpoint at all (3).
    """
    return inspect_source(str(source), revision=revision)


def verify(
    *checkpoints: PathLike,
    memory: str | int | None = None,
    probe: PathLike | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> VerificationReport:
    """Return the comparison of a converted checkpoint with its sources.

    Args:
        checkpoints: the source or sources, then the converted checkpoint.
        memory: bytes the comparison may take; larger models are compared block by block.
        probe: text file to compare on instead of the shipped text.
        revision: branch, tag or commit of hub ids.
        progress: show progress bars on a terminal.

    Raises:
        VerificationError: it differs from what its manifest and class promise; `report` is attached
            (5).
    """
    from adaconvert.proof import verify_existing

    return verify_existing(
        [str(c) for c in checkpoints],
        memory=memory,
        probe=None if probe is None else Path(probe),
        revision=revision,
        progress=progress,
    )


def evaluate(checkpoint: PathLike, **options: Any) -> Evaluation:
    """Return how good a checkpoint is and what it costs; it is not changed.

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
        data: text files, folders or hub data sets.
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


def d2dmoe(source: PathLike, destination: PathLike, **settings: Any) -> D2dmoeResult:
    """Return once `destination` holds the checkpoint, its experts chosen by fitted routers.

    Args:
        source: a dense checkpoint, or one that is split already.
        destination: as for `convert`.
        settings: fields of `methods.d2dmoe.config.D2dmoeConfig`, and keyword arguments of `convert`
            about how it runs.

    Raises:
        DataError: the text is missing, damaged or does not fit the model (2); otherwise as
            `convert`.
    """
    from adaconvert.methods.d2dmoe.result import D2dmoeResult

    done = convert(source, destination=destination, method="d2dmoe", **settings)
    return D2dmoeResult.of(done)


def inspect_activations(
    source: PathLike, data: PathLike, *, progress: bool = False, **options: Any
) -> ActivationReport:
    """Return how sparse the activations of a dense model's feed-forward networks are on a text.

    Args:
        source: a dense decoder checkpoint, or one that is split.
        data: text file, folder or hub data set.
        progress: show a bar on a terminal.
        options: fields of `activations.ActivationOptions`.

    Raises:
        OptionError: the model cannot be run on text, or an option is wrong (exit code 2).
        DataError: the text is missing, damaged or does not fit the model (2).
        SourceError: the checkpoint is damaged, or computes NaN (3).
    """
    from adaconvert.activations import ActivationOptions, measure_activations

    given = ActivationOptions(**options)
    return measure_activations(str(source), str(data), given, progress=progress)


def finetune(
    source: PathLike,
    destination: PathLike,
    *,
    data: Sequence[PathLike],
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> FinetuneResult:
    """Return once `destination` holds the fine-tuned checkpoint, whole and loading by itself.

    Args:
        source: checkpoint of a causal language model: dense, native mixture or adaptive.
        destination: folder that must not exist, or be empty, unless `overwrite`.
        data: texts, each as "FILE" or "FILE,WEIGHT".
        overwrite: replace a folder adaconvert wrote.
        resume: go on from the last complete checkpoint of an interrupted run.
        device: "auto", "cpu" or an accelerator such as "cuda".
        max_shard_size: as for `convert`.
        revision: branch, tag or commit of a hub id.
        progress: show progress bars on a terminal.
        report: takes one line per log step.
        options: fields of `train.config.FinetuneConfig`, and `activation`, `sparsity`,
            `sparsity_loss`, `sparsity_norm`, `sparsity_ramp` for stage 1 of D2DMoE.

    Raises:
        OptionError: options do not fit together or the model, or a loss stops being finite (2).
        DataError: the text is missing, damaged or too short (2).
        SourceError: the checkpoint is damaged, or no causal language model (3).
        OutputConflictError: the destination is taken, or `resume` finds another run (4).
        VerificationError: the result does not load; nothing is left behind (5).
        ResourceError: disk, memory, permissions or a package do not suffice (6).
        InterruptedRunError: a signal stopped it; the last checkpoint is kept for `resume` (130).
    """
    from adaconvert.train.config import FinetuneConfig
    from adaconvert.train.run import RunSettings
    from adaconvert.train.run import finetune as run

    config = FinetuneConfig.of([str(where) for where in data], options)
    settings = RunSettings(
        destination=Path(destination),
        overwrite=overwrite,
        resume=resume,
        device=device,
        max_shard_size=max_shard_size,
        revision=revision,
        progress=progress,
        report=report or (lambda line: None),
    )
    return run(str(source), config, settings)
