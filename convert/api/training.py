"""What trains: a fine-tune, and the pipeline that begins with one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.api.converting import convert, plan
from adaconvert.api.paths import PathLike

if TYPE_CHECKING:
    from adaconvert.methods.d2dmoe.result import D2dmoeResult
    from adaconvert.train.dry_run import FinetunePlan
    from adaconvert.train.result import FinetuneResult


def finetune(
    source: PathLike,
    destination: PathLike,
    *,
    data: PathLike | Sequence[PathLike],
    base: PathLike | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
    progress: bool = False,
    report: Callable[[str], None] | None = None,
    memory: str | int | None = None,
    dry_run: bool = False,
    log_dir: PathLike | None = None,
    **options: Any,
) -> FinetuneResult | FinetunePlan:
    """Return once `destination` holds the fine-tuned checkpoint, whole and loading by itself.

    Under torchrun or `accelerate launch` every process calls it; the first alone writes.

    Args:
        source: checkpoint of a causal language model: dense, native mixture or adaptive, early
            exits included (`train="exits"` tunes them on a frozen trunk); or of a classifier of
            texts or images with early exits, trained on labelled data; or a PEFT folder of routed
            adapters or of a LoRA, of which adapters and routers are trained.
        destination: folder that must not exist, or be empty, unless `overwrite`.
        data: one text or several, each as "FILE" or "FILE,WEIGHT"; of a classifier "FILE" with
            `text_field` and `label_field`, or what `data.images.read_images` takes.
        base: folder or hub id of the model a PEFT folder is for; what that names itself when None.
        overwrite: replace a folder adaconvert wrote.
        resume: go on from the last complete checkpoint of an interrupted run.
        device: "auto", "cpu" or an accelerator such as "cuda".
        max_shard_size: as for `convert`.
        revision: branch, tag or commit of a hub id.
        progress: show progress bars on a terminal.
        report: takes one line per log step, and what it needs in memory before the first.
        memory: bytes training may take, or text with a unit; what is free when None.
        dry_run: only say what would be trained and what memory it needs.
        log_dir: folder for the files of experiment trackers; one beside `destination` when None.
        options: fields of `train.config.FinetuneConfig`, and those of its parts by the names of
            the command line: `activation`, `sparsity`, ... for stage 1 of D2DMoE, `lora`,
            `lora_alpha`, `lora_targets`, `load_in_4bit`, `compile`, `fsdp`, `expert_parallel`, and
            `exit_loss`, `exit_weights`, `early_exit_loss`, `layer_dropout`, ... for early exits;
            `exit_objective`, ... for those of classifiers.

    Raises:
        OptionError: options do not fit together or the model (2).
        DataError: the text is missing, damaged or too short (2).
        SourceError: the checkpoint is damaged, or neither a causal language model nor a classifier
            with exits (3).
        OutputConflictError: the destination is taken, or `resume` finds another run (4).
        TrainingError: a loss stops being finite, or routers collapsed; the last checkpoint is kept
            (5).
        VerificationError: the result does not load; nothing is left behind (5).
        ResourceError: disk, memory, permissions or a package do not suffice (6).
        InterruptedRunError: a signal stopped it; the last checkpoint is kept for `resume` (130).
    """
    from adaconvert.train.config import FinetuneConfig
    from adaconvert.train.run import RunSettings
    from adaconvert.train.run import finetune as run

    sources = [data] if isinstance(data, str | Path) else data
    config = FinetuneConfig.of([str(where) for where in sources], options)
    settings = RunSettings(
        destination=Path(destination),
        base=None if base is None else str(base),
        overwrite=overwrite,
        resume=resume,
        device=device,
        max_shard_size=max_shard_size,
        revision=revision,
        progress=progress,
        report=report or (lambda line: None),
        memory=memory,
        dry_run=dry_run,
        log_dir=None if log_dir is None else Path(log_dir),
    )
    return run(str(source), config, settings)


def d2dmoe(source: PathLike, destination: PathLike, **settings: Any) -> D2dmoeResult:
    """Return once `destination` holds the checkpoint, its experts chosen by fitted routers.

    Args:
        source: a dense checkpoint, or one that is split already.
        destination: as for `convert`.
        settings: fields of `methods.d2dmoe.config.D2dmoeConfig`, and keyword arguments of `convert`
            about how it runs; with stage 1 also those of `stage_one.OPTIONS`, and `report`.

    Raises:
        DataError: text or images are missing, damaged or do not fit the model (2); otherwise as
            `convert`, and with stage 1 as `finetune`.
    """
    from adaconvert import stage_one
    from adaconvert.methods.d2dmoe.result import D2dmoeResult

    report = settings.pop("report", None)
    stages = stage_one.Stages.of(settings)

    def split(where: PathLike, target: PathLike, **rest: Any) -> D2dmoeResult:
        done = convert(where, destination=target, method="d2dmoe", **rest)
        return D2dmoeResult.of(done)

    if stages.first is None:
        return split(source, destination, **stages.rest)
    if stages.rest["stages"]:
        # refuse what cannot be split before it is trained
        plan(source, method="d2dmoe", **stage_one.planned(stages))
    found: D2dmoeResult = stage_one.run(
        str(source),
        Path(destination),
        stages,
        str(settings["data"]),
        tune=finetune,
        convert=split,
        seed=int(settings.get("seed", 0)),
        device=str(settings.get("device", "auto")),
        report=report,
    )
    return found
