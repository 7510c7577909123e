"""`evaluate`: load, read, score, count, time, run tasks, report; weights are never changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.errors import AdaconvertError, OptionError, ResourceError
from adaconvert.evaluate import classify, results, speed
from adaconvert.evaluate.compute import Compute, estimated, relative_to
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.evaluate.perplexity import Variant, score_texts
from adaconvert.evaluate.record import check_recordable, keep
from adaconvert.evaluate.report import Evaluation, Result
from adaconvert.evaluate.settings import STORED, check_settings, settings_of
from adaconvert.evaluate.tasks import Tasks, find_tasks, run_tasks
from adaconvert.io.names import escape
from adaconvert.io.report_file import check_report, write_report
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    from adaconvert.data.tokens import TokenBlocks
    from adaconvert.io.source import Source

REFERENCE = "reference"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER = "ForSequenceClassification"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that is ready to run.

    Attributes:
        source: its files.
        model: transformers model on its device.
        kind: "causal" or "classifier".
    """

    source: Source
    model: Any
    kind: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What data gave.

    Attributes:
        results: one for each variant.
        data: facts of the data, for the report.
        sample: token ids to measure speed on.
        lengths: length of a text -> how many were measured.
        notes: what the reader should know.
    """

    results: list[Result]
    data: dict[str, object]
    sample: tuple[int, ...]
    lengths: Mapping[int, int]
    notes: tuple[str, ...] = ()


def evaluate_checkpoint(checkpoint: str, options: EvaluateOptions) -> Evaluation:
    """Return quality, cost and speed of a checkpoint at every setting asked for.

    Args:
        checkpoint: folder, hub-cache snapshot or hub id; adaptive, Mixture-of-Experts or dense.
        options: what to measure.

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
    if options.record:
        check_recordable(checkpoint)
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
        notes=(*measured.notes, *_stale_notes(loaded.source)),
    )
    if options.out is not None:
        write_report(Path(options.out), evaluation.to_json())
    if options.record and not keep(checkpoint, evaluation):
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


def load(where: str, options: EvaluateOptions, device: str) -> Loaded:
    """Return a checkpoint ready to run; no code of it runs.

    Raises:
        OptionError: it is of a kind that is not measured.
        SourceError: it is damaged.
    """
    from adaconvert.io.source import Source
    from adaconvert.modeling.loading import load_model

    source = Source.open(where, revision=options.revision)
    kind = _kind(source.raw_config)
    with quiet():
        model = load_model(source.root, dtype=options.dtype, device=device, use_safetensors=True)
    return Loaded(source=source, model=model, kind=kind)


def _kind(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else _CAUSAL[0]
    if name.endswith(_CAUSAL):
        return "causal"
    if name.endswith(_CLASSIFIER):
        return "classifier"
    raise OptionError(
        "models of this kind are not measured",
        where="config.json: architectures",
        expected=f"...{', ...'.join((*_CAUSAL, _CLASSIFIER))}",
        found=escape(name, 80),
    )


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
    measure = _measure_texts if loaded.kind == "causal" else _measure_labelled
    measured = measure(options, loaded, reference, every)
    shapes = {
        id(one.model): _shape_costs(one, measured.lengths) for one in _both(loaded, reference)
    }
    costed = _with_costs(measured.results, [shapes[id(v.model)] for v in every])
    if options.speed:
        costed = _with_speed(costed, every, measured.sample, loaded.kind, options.progress)
    return replace(measured, results=costed)


def _both(loaded: Loaded, reference: Loaded | None) -> Iterator[Loaded]:
    yield loaded
    if reference is not None:
        yield reference


def _measure_texts(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    from adaconvert.data.text import read_documents
    from adaconvert.data.tokens import token_blocks

    assert options.data is not None
    documents = read_documents(
        options.data,
        field=options.field,
        split=options.split,
        max_documents=options.max_documents,
    )

    def cut(folder: Path, progress: bool) -> TokenBlocks:
        return token_blocks(
            documents,
            folder,
            length=options.length,
            max_tokens=options.max_tokens,
            seed=options.seed,
            progress=progress,
        )

    blocks = cut(loaded.source.root, options.progress)
    if reference is not None and not _same_tokens(cut(reference.source.root, False), blocks):
        raise OptionError(
            "cuts the text into other tokens than the checkpoint",
            where="--reference",
            hint="Compare with the model this checkpoint was made from.",
        )
    scores = score_texts(
        variants,
        blocks,
        documents.names,
        batch_size=options.batch_size,
        progress=options.progress,
    )
    lengths = blocks.weights.sum(1)
    return Measured(
        results=results.of_texts(variants, scores, documents.names),
        data={
            "name": _name(options.data),
            "documents": len(set(blocks.document.tolist())),
            "tokens": blocks.tokens,
            "blocks": len(blocks),
            "length": blocks.length,
            "digest": documents.digest,
        },
        sample=_sample(blocks),
        lengths=Counter(lengths.tolist()),
    )


def _same_tokens(one: TokenBlocks, other: TokenBlocks) -> bool:
    """Return whether blocks hold the same tokens, whatever stands where there are none."""
    if one.weights.tolist() != other.weights.tolist():
        return False
    return bool((one.ids[one.weights] == other.ids[other.weights]).all())


def _measure_labelled(
    options: EvaluateOptions,
    loaded: Loaded,
    reference: Loaded | None,
    variants: Sequence[Variant],
) -> Measured:
    assert options.data is not None
    data = classify.read_labelled(
        options.data,
        loaded.source.root,
        loaded.model.config,
        field=options.field,
        label_field=options.label_field,
        split=options.split,
        max_documents=options.max_documents,
        length=options.length,
    )
    if (
        reference is not None
        and reference.model.config.num_labels != loaded.model.config.num_labels
    ):
        raise OptionError("has another number of classes", where="--reference")
    scores = classify.score_labelled(
        variants, data, batch_size=options.batch_size, progress=options.progress
    )
    tokens = sum(len(ids) for ids in data.ids)
    return Measured(
        results=results.of_labelled(variants, scores, data.names),
        data={"name": _name(options.data), "documents": len(data.ids), "tokens": tokens},
        sample=max(data.ids, key=len),
        lengths=Counter(map(len, data.ids)),
        notes=(f"{data.cut} texts were cut to fit the model",) if data.cut else (),
    )


def _name(data: object) -> str:
    return escape(str(data).rstrip("/").rsplit("/", 1)[-1])


def _sample(blocks: TokenBlocks) -> tuple[int, ...]:
    """Return the real tokens of the longest block."""
    row = int(blocks.weights.sum(1).argmax())
    return tuple(int(i) for i in blocks.ids[row][blocks.weights[row]])


def _shape_costs(loaded: Loaded, lengths: Mapping[int, int]) -> Compute | None:
    """Return the costs of a stock checkpoint; an adaptive one has counted them itself."""
    if hasattr(loaded.model, "account"):
        return None
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
    sample: Sequence[int],
    kind: str,
    progress: bool,
) -> list[Result]:
    speeds = speed.measure(variants, sample, decode=kind == "causal", progress=progress)
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
