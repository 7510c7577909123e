"""Conversions, and what is known of checkpoints without running them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.api.paths import PathLike
from adaconvert.inspection import Inspection, inspect_source
from adaconvert.reports import ConversionResult, PlanReport

if TYPE_CHECKING:
    from adaconvert.activations import ActivationReport
    from adaconvert.verification.report import VerificationReport


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
        options: the method's own options: fields of `methods.upcycle.config.UpcycleConfig`,
            `methods.moefy.config.MoefyConfig`, `methods.adamoe.config.AdamoeConfig`,
            `methods.molora.config.MoloraOptions`,
            `methods.early_exit.config.EarlyExitOptions` or
            `methods.depth.config.DepthOptions`.

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
    from adaconvert.methods.molora.taken import standing_sources
    from adaconvert.stage_one import Stages

    if method == "d2dmoe":
        # stage 1 leaves the shapes as they are
        options = {**Stages.of(options).rest}
    with standing_sources([str(s) for s in sources], method, options, revision) as taken:
        prepared = prepare_run(
            taken.sources, method, taken.options, taken.revision, keep_config, ignore_unindexed
        )
        return PlanReport.of(prepared.planned, max_shard_size)


def inspect(
    source: PathLike, *, revision: str | None = None, base: PathLike | None = None
) -> Inspection:
    """Return what a checkpoint is: family, sizes, costs, dtypes, ties and problems; reads no
    weights. An adapter folder of PEFT is looked at on its base.

    Args:
        source: folder, hub-cache snapshot or hub id.
        revision: branch, tag or commit of a hub id.
        base: folder or hub id of the model an adapter folder is for; what that names itself when
            None.

    Raises:
        OptionError: `base` does not go with `source` (2).
        SourceError: it cannot be read as a checkpoint at all (3).
    """
    from adaconvert.methods.molora.view import standing

    under = None if base is None else str(base)
    with standing(str(source), base=under, revision=revision) as (found, view):
        return inspect_source(found, revision=revision if view is None else None)


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


def inspect_activations(
    source: PathLike, data: PathLike, *, progress: bool = False, **options: Any
) -> ActivationReport:
    """Return how sparse the activations of a dense model's feed-forward networks are on a text,
    or on images.

    Args:
        source: a dense decoder checkpoint or classifier of images, or one that is split.
        data: text file, folder or hub data set; a folder of images or a file that lists them.
        progress: show a bar on a terminal.
        options: fields of `activations.ActivationOptions`.

    Raises:
        OptionError: the model cannot be run on either, or an option is wrong (exit code 2).
        DataError: the data are missing, damaged or do not fit the model (2).
        SourceError: the checkpoint is damaged, or computes NaN (3).
    """
    from adaconvert.activations import ActivationOptions, measure_activations

    given = ActivationOptions(**options)
    return measure_activations(str(source), str(data), given, progress=progress)
