"""`evaluate`: load, read, score, count, time, run tasks, report; weights are never changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import AdaconvertError, OptionError, ResourceError
from adaconvert.evaluate import speed
from adaconvert.evaluate.compute import Compute, estimated, relative_to
from adaconvert.evaluate.loaded import Loaded, load
from adaconvert.evaluate.measures import MEASURES, Measured
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.evaluate.perplexity import Variant
from adaconvert.evaluate.record import check_recordable, keep
from adaconvert.evaluate.report import Evaluation, Result
from adaconvert.evaluate.settings import STORED, check_settings, settings_of
from adaconvert.evaluate.tasks import Tasks, find_tasks, run_tasks
from adaconvert.io.report_file import check_report, write_report

if TYPE_CHECKING:
    from adaconvert.io.source import Source

REFERENCE = "reference"


def evaluate_checkpoint(
    checkpoint: str, options: EvaluateOptions, *, kept_in: str | None = None
) -> Evaluation:
    """Return quality, cost and speed of a checkpoint at every setting asked for.

    Args:
        checkpoint: folder, hub-cache snapshot or hub id; adaptive, Mixture-of-Experts or dense.
        options: what to measure.
        kept_in: folder whose manifest and card keep the results where that is asked for; that of
            the checkpoint when None.

    Raises:
        OptionError: options that do not fit together or the model (exit code 2).
        DataError: the data are missing, damaged or do not fit the model (2).
        SourceError: a checkpoint is damaged, or computes NaN (3).
        OutputConflictError: `options.out` exists (4).
        ResourceError: memory, the hub or a package does not suffice (6).
    """
    options.check()
    if options.out is not None:
        check_report(Path(options.out))
    recorded = kept_in or checkpoint
    if options.record:
        check_recordable(recorded)
    settings = settings_of(options.set_compute, options.select)
    tasks = find_tasks(options.tasks, options.task_limit) if options.tasks else None
    device = options.chosen_device()
    with _memory():
        loaded = load(checkpoint, options, device)
        check_settings(settings, loaded.model)
        reference = _reference(options, loaded, device)
        variants = [Variant(label=s.label, model=loaded.model, setting=s) for s in settings]
        measured = _measure(options, loaded, reference, variants)
        found = measured.results[1:] if reference else measured.results
        if tasks is not None:
            found = _with_tasks(found, variants, loaded, tasks, options)
    evaluation = Evaluation(
        checkpoint=loaded.source.label,
        architecture=type(loaded.model).__name__,
        kind=loaded.kind,
        runtime=_runtime(loaded.model),
        data=measured.data,
        reference=measured.results[0] if reference else None,
        results=tuple(found),
        exits=measured.exits,
        notes=(*measured.notes, *_stale_notes(loaded.source), *_foreign_notes(loaded.source)),
    )
    if options.out is not None:
        write_report(Path(options.out), evaluation.to_json())
    if options.record and not keep(recorded, evaluation):
        kept = "README.md was edited and stays as it is; adaconvert.json has the results"
        evaluation = replace(evaluation, notes=(*evaluation.notes, kept))
    return evaluation


def _stale_notes(source: Source) -> tuple[str, ...]:
    """Return why the checkpoint's calibration table no longer holds, for the reader."""
    adaptive = source.raw_config.get("adaptive")
    if not isinstance(adaptive, dict) or not adaptive.get("calibration"):
        return ()
    from adaconvert.evaluate.calibration_output import stale

    try:
        reasons = stale(source.root)
    except AdaconvertError as error:
        reasons = [f"it cannot be checked ({error})"]
    return tuple(f"the calibration table does not hold: {reason}" for reason in reasons)


def _foreign_notes(source: Source) -> tuple[str, ...]:
    """Return that exits were made for other blocks, for the reader."""
    if not isinstance(source.raw_config.get("adaptive"), dict):
        return ()
    from adaconvert.arch.registry import describe
    from adaconvert.arch.trunk import foreign

    wrong = foreign(source, describe(source.config, source.tensors))
    return () if wrong is None else (wrong,)


def _reference(options: EvaluateOptions, loaded: Loaded, device: str) -> Loaded | None:
    if options.reference is None:
        return None
    plain = replace(options, revision=None)
    found = load(str(options.reference), plain, device)
    if found.kind != loaded.kind:
        raise OptionError(
            "is another kind of model", where="--reference", expected=loaded.kind, found=found.kind
        )
    return found


def _measure(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    if options.data is None:
        empty = [Result(label=v.label, setting=v.setting) for v in variants]
        return Measured(results=empty, data={}, sample=(), lengths={})
    every = list(variants)
    if reference is not None:
        first = Variant(label=REFERENCE, model=reference.model, setting=STORED, is_reference=True)
        every.insert(0, first)
    measured = MEASURES[loaded.kind](options, loaded, reference, every)
    shapes = {
        id(one.model): _shape_costs(one, measured.lengths) for one in _both(loaded, reference)
    }
    costed = _with_costs(measured.results, [shapes[id(v.model)] for v in every])
    if options.speed:
        costed = _with_speed(costed, every, measured, loaded.kind, options.progress)
    return replace(measured, results=costed)


def _both(loaded: Loaded, reference: Loaded | None) -> Iterator[Loaded]:
    yield loaded
    if reference is not None:
        yield reference


def _shape_costs(loaded: Loaded, lengths: Mapping[int, int]) -> Compute | None:
    """Return the costs of a checkpoint by its shapes, for models that do not count what they do:
    stock ones, and adaptive ones in which nothing is chosen."""
    return estimated(loaded.source, lengths, str(loaded.model.dtype))


def _with_costs(found: Sequence[Result], shapes: Sequence[Compute | None]) -> list[Result]:
    costed = [
        replace(result, compute=result.compute or shape)
        for result, shape in zip(found, shapes, strict=True)
    ]
    if costed[0].label != REFERENCE:
        return costed
    base = costed[0].compute
    return [replace(result, compute=relative_to(result.compute, base)) for result in costed]


def _with_speed(
    found: Sequence[Result],
    variants: Sequence[Variant],
    measured: Measured,
    kind: str,
    progress: bool,
) -> list[Result]:
    speeds = speed.measure(
        variants,
        measured.sample,
        pixels=measured.pixels,
        decode=kind == "causal",
        progress=progress,
    )
    return [replace(result, speed=one) for result, one in zip(found, speeds, strict=True)]


def _with_tasks(
    found: Sequence[Result],
    variants: Sequence[Variant],
    loaded: Loaded,
    tasks: Tasks,
    options: EvaluateOptions,
) -> list[Result]:
    from adaconvert.data.tokens import load_tokenizer

    if loaded.kind != "causal":
        raise OptionError("run on causal models only", where="--tasks", found=loaded.kind)
    tokenizer = load_tokenizer(loaded.source.root)
    return [
        replace(result, tasks=run_tasks(variant, tokenizer, tasks, batch_size=options.batch_size))
        for result, variant in zip(found, variants, strict=True)
    ]


def _runtime(model: Any) -> dict[str, object]:
    import torch

    threads = torch.get_num_threads() if model.device.type == "cpu" else None
    dtype = str(model.dtype).removeprefix("torch.")
    return {"dtype": dtype, "device": str(model.device), "threads": threads}


@contextmanager
def _memory() -> Iterator[None]:
    """Running out of memory is said with what helps here."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        named = type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
        if not isinstance(error, MemoryError) and not named:
            raise
        hint = "Lower --batch-size or --length, or choose a smaller --dtype."
        raise ResourceError("out of memory", hint=hint) from error
