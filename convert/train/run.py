"""One fine-tune from start to end: open, pack, load, train, write, check, commit."""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adaconvert import __version__
from adaconvert.errors import (
    InterruptedRunError,
    OptionError,
    ResourceError,
    SourceError,
    VerificationError,
)
from adaconvert.io import manifest
from adaconvert.io.commit import Staging, already_committed
from adaconvert.io.destination import Destination
from adaconvert.io.fs import FileSystem
from adaconvert.io.source import Source
from adaconvert.io.writer import parse_size
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, check_ties, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train import export
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack
from adaconvert.train.parts import Chosen, choose
from adaconvert.train.work import Work

if TYPE_CHECKING:
    from adaconvert.train.sparsify import Meter
    from adaconvert.train.trainer import FinetuneTrainer

_FLOOR = "1.10"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a fine-tune runs; none of it changes what comes out.

    Attributes:
        destination: folder to write.
        overwrite: replace a folder adaconvert wrote.
        resume: go on from the last complete checkpoint of an interrupted run.
        device: "auto", "cpu" or an accelerator's name such as "cuda".
        max_shard_size: cap of a weight file.
        revision: of a hub id.
        progress: show progress bars on a terminal.
        report: takes one line per log step.
        fs: every call that changes the disk when the result is written.
    """

    destination: Path
    overwrite: bool = False
    resume: bool = False
    device: str = "auto"
    max_shard_size: str | int = "5GB"
    revision: str | None = None
    progress: bool = False
    report: Callable[[str], None] = lambda line: None
    fs: FileSystem | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """A finished fine-tune.

    Attributes:
        destination: the committed folder.
        summary: JSON data: options, counts, first and last log entry, notes; the same whenever the
            run is repeated.
        speed: tokens per second of this session, 0 when nothing was left to do.
        curve: every log entry.
    """

    destination: Path
    summary: Mapping[str, Any]
    speed: float
    curve: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        return {
            **self.summary,
            "destination": self.destination.name,
            "tokens_per_second": self.speed,
            "curve": [dict(entry) for entry in self.curve],
        }

    def lines(self) -> list[str]:
        """Return the result as text."""
        notes = [f"note: {note}" for note in self.summary["notes"]]
        speed = [f"speed       {self.speed:.0f} tokens/s"] if self.speed else []
        return [*export.facts(self.summary), *speed, *notes, f"wrote {self.destination}"]


def finetune(where: str, config: FinetuneConfig, settings: RunSettings) -> FinetuneResult:
    """Return once the destination holds the fine-tuned checkpoint; see `api.finetune`."""
    _require_accelerate()
    cap = parse_size(settings.max_shard_size)
    item = open_source(where, revision=settings.revision)
    _check_source(item, config)
    _check_device(settings.device)
    if not settings.resume:
        Destination.resolve(settings.destination).check_free(overwrite=settings.overwrite)
    data = pack(config, item.source.root, progress=settings.progress)
    facts = _facts(item, config, data)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if settings.resume:
        found = already_committed(settings.destination, plan_digest=digest, fs=settings.fs)
        if found is not None:
            return _found(settings.destination, found)
    with Staging.open(
        settings.destination,
        sources=[item.source.root],
        overwrite=settings.overwrite,
        plan_digest=digest,
        needed_bytes=sum(ref.nbytes for ref in item.source.tensors.values()),
        fs=settings.fs,
    ) as staging:
        check_ties(item)
        with _work(settings, facts) as work:
            return _run(item, config, settings, data, staging, work, digest, cap)


def _run(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    data: Packed,
    staging: Staging,
    work: Work,
    digest: str,
    cap: int,
) -> FinetuneResult:
    changed = _changed(item, config)
    done = _train(item, config, settings, data, work, changed)
    trained = Source.open(work.path / "export")
    content = export.config_of(item, changed, config.dtype)
    targets = export.targets_of(item, trained, content, config.dtype)
    layouts = export.write_weights(staging, trained, targets, cap, progress=settings.progress)
    card = export.card_of(item, done.summary)
    export.write_files(staging, item, content, layouts, card)
    _check_loads(staging.path, data)
    item.source.assert_unchanged()
    records = staging.records()
    record = export.manifest_of(item, done.summary, records, staging.files, digest)
    staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
    staging.commit()
    return done


# -- before anything long begins


def _require_accelerate() -> None:
    try:
        found = metadata.version("accelerate")
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or tuple(map(int, found.split(".")[:2])) < (1, 10):
        raise ResourceError(
            "training needs it",
            where="package accelerate",
            expected=f">= {_FLOOR}",
            found=found,
            hint=f"Run: pip install 'accelerate>={_FLOOR}'",
        )


def _check_source(item: Described, config: FinetuneConfig) -> None:
    where = f"{item.source.label}/config.json"
    endings = ("ForCausalLM", "LMHeadModel")
    if item.spec.kind != "decoder" or not item.spec.architecture.endswith(endings):
        raise SourceError(
            f"a {item.spec.architecture} is no causal language model",
            where=where,
            hint="Fine-tune other models with transformers directly.",
        )
    if item.spec.num_experts and config.sparsity.watches:
        raise OptionError(
            f"{item.spec.model_type} is a mixture of experts already",
            where="--sparsity",
            hint="Stage 1 works on dense feed-forward networks and their adaptive form.",
        )
    if item.spec.adaptive is None and (config.select is not None or config.compute is not None):
        flag = "--select" if config.select is not None else "--compute"
        raise OptionError(f"{item.source.label} is not adaptive", where=flag)


def _check_device(device: str) -> None:
    import torch

    if device in {"auto", "cpu"}:
        return
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device:
        kinds = "auto or cpu" if found is None else f"auto, cpu or {found.type}"
        raise OptionError("is not here", where="--device", expected=kinds, found=device)


def _facts(item: Described, config: FinetuneConfig, data: Packed) -> dict[str, Any]:
    """Return what decides the result."""
    shards = [f"{s.file} {s.size} {s.mtime_ns}" for s in item.source.shards]
    return {
        "options": config.to_json(),
        "source": [item.source.label, item.source.fingerprint, *shards],
        "data": data.digest,
        "adaconvert": __version__,
    }


def _found(destination: Path, record: Mapping[str, Any]) -> FinetuneResult:
    """Return the result an earlier run completed."""
    summary = {**record["training"], "options": record["options"]}
    return FinetuneResult(destination=destination, summary=summary, speed=0.0, curve=())


@contextmanager
def _work(settings: RunSettings, facts: Mapping[str, Any]) -> Iterator[Work]:
    """Yield the work folder; it stays when there is something to go on from."""
    work = Work.open(settings.destination, facts, resume=settings.resume)
    keep = True
    try:
        yield work
        keep = False
    except InterruptedRunError as error:
        error.hint = work.hint()
        raise
    except KeyboardInterrupt as error:
        raise InterruptedRunError("interrupted", hint=work.hint()) from error
    finally:
        work.close(keep=keep)


# -- training


def _changed(item: Described, config: FinetuneConfig) -> dict[str, Any]:
    """Return the config keys the fine-tune changes."""
    from adaconvert.train.sparsify import with_activation

    return with_activation(item.source.config, item.spec, config.sparsity.activation)


def _train(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    data: Packed,
    work: Work,
    changed: Mapping[str, Any],
) -> FinetuneResult:
    """Return the result, whose model lies in the work folder as transformers saves it."""
    with quiet():
        model: Any = load_model(item.source.root, **changed)
        chosen = choose(model, config.train)
        _set_precision(model, config.precision)
        meter = _prepared(model, item, config)
        # per-expert tensors of native mixtures are not put together again when Trainer resumes
        # (huggingface/transformers issue 48805), so checkpoints hold them as they are in memory
        conversions = getattr(model, "_weight_conversions", None)
        if item.spec.num_experts:
            model._weight_conversions = []
        trainer = _trainer(model, item, config, settings, data, work, chosen, meter)
        resumed = None if work.resumed is None else str(work.resumed)
        trainer.train(resume_from_checkpoint=resumed)
        trainer.check_finite()
        model._weight_conversions = conversions
        model.to("cpu").save_pretrained(work.path / "export", max_shard_size="2GB")
        curve = tuple(entry for entry in trainer.state.log_history if "loss" in entry)
        del trainer, model
        gc.collect()
    return FinetuneResult(
        destination=settings.destination,
        summary=_summary(config, data, chosen, curve, _notes(item, config, data)),
        speed=_speed(curve),
        curve=curve,
    )


def _set_precision(model: Any, precision: str) -> None:
    """Make float32 what is trained, and with "fp32" everything; nothing is rounded."""
    import torch

    halves = (torch.float16, torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dtype in halves and (parameter.requires_grad or precision == "fp32"):
            parameter.data = parameter.data.float()


def _prepared(model: Any, item: Described, config: FinetuneConfig) -> Meter | None:
    """Set selection, checkpointing and penalty; return what watches activations."""
    from adaconvert.train.sparsify import Meter, attach

    try:
        if config.select is not None:
            model.set_select(**config.select)
        if config.compute is not None:
            model.set_compute(config.compute)
    except ValueError as error:
        raise OptionError(str(error), where="--select or --compute") from error
    if config.checkpointing:
        _recompute(model)
    if not config.sparsity.watches:
        return None
    meter = Meter(config.sparsity)
    attach(model, item.spec, meter)
    return meter


def _recompute(model: Any) -> None:
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        # transformers below 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def _trainer(
    model: Any,
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    data: Packed,
    work: Work,
    chosen: Chosen,
    meter: Meter | None,
) -> FinetuneTrainer:
    from transformers import TrainerCallback, default_data_collator

    from adaconvert.train.trainer import FinetuneTrainer

    class Callback(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            trainer.start_clock()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            work.completed(state.global_step)

    args = _arguments(config, settings, work)
    trainer = FinetuneTrainer(
        config=config,
        routers=chosen.routers,
        meter=meter,
        teacher=_teacher(item, config, args.device),
        report=settings.report,
        model=model,
        args=args,
        train_dataset=data,
        data_collator=default_data_collator,
        callbacks=[Callback()],
    )
    return trainer


def _arguments(config: FinetuneConfig, settings: RunSettings, work: Work) -> Any:
    from transformers import TrainingArguments

    falling = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    args = TrainingArguments(
        output_dir=str(work.path),
        max_steps=config.total_steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        lr_scheduler_type=falling,
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        seed=config.seed,
        use_cpu=settings.device == "cpu",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=2,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    if args.n_gpu > 1:
        # several devices are torchrun's business; without it Trainer would copy the model to each
        args._n_gpu = 1
    return args


def _teacher(item: Described, config: FinetuneConfig, device: Any) -> Any:
    """Return the dense teacher on the device of the student, None without distillation."""
    if not config.distill:
        return None
    source = item if config.teacher is None else open_source(config.teacher)
    if source.spec.vocab != item.spec.vocab:
        raise OptionError(
            "reads other token ids",
            where="--teacher",
            expected=f"vocab_size {item.spec.vocab}",
            found=source.spec.vocab,
        )
    teacher: Any = load_model(source.source.root, device=str(device))
    if source.spec.adaptive is not None:
        teacher.set_select("all")
    teacher.requires_grad_(False)
    return teacher.float() if config.precision == "fp32" else teacher


# -- afterwards


def _speed(curve: tuple[Mapping[str, Any], ...]) -> float:
    """Return the median speed of the log entries, the first left out: it warms up."""
    speeds = sorted(entry["tokens_per_second"] for entry in curve[1:] or curve)
    return float(speeds[len(speeds) // 2]) if speeds else 0.0


_REPEATABLE = ("loss", "lm", "distill", "hoyer", "l1", "sparsity", "sparsity_by_layer")


def _summary(
    config: FinetuneConfig,
    data: Packed,
    chosen: Chosen,
    curve: tuple[Mapping[str, Any], ...],
    notes: list[str],
) -> dict[str, Any]:
    ends = [{k: e[k] for k in _REPEATABLE if k in e} for e in (curve[0], curve[-1])]
    return {
        "options": config.to_json(),
        "steps": config.total_steps,
        "tokens": config.total_steps * config.step_tokens,
        "passes": list(data.passes),
        "trained": chosen.trained,
        "frozen": chosen.frozen,
        "by_part": dict(chosen.by_part),
        "first": ends[0],
        "last": ends[1],
        "notes": notes,
    }


def _notes(item: Described, config: FinetuneConfig, data: Packed) -> list[str]:
    notes = []
    for source, passes in zip(config.data, data.passes, strict=True):
        if passes > 1:
            notes.append(f"{source.label} was read {passes:.1f} times")
    adaptive = item.spec.adaptive
    if adaptive is not None and adaptive.get("calibration") is not None:
        notes.append("the calibration table was dropped: it belongs to the weights before")
    if item.spec.num_experts:
        notes.append("no balance loss was used; watch the load of the experts")
    return notes


def _check_loads(folder: Path, data: Packed) -> None:
    """Return only when the written checkpoint loads by itself and computes finite logits.

    Raises:
        VerificationError: it does not.
    """
    import torch

    with quiet(), torch.inference_mode():
        model = cast("Any", load_model(folder))
        ids = torch.from_numpy(data.ids[:1].astype("int64"))
        logits = model(input_ids=ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError("the logits of the trained model are not all finite")
