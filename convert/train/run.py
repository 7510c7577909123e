"""One fine-tune from start to end: open, pack, train, write, check, commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert import __version__
from adaconvert.arch.exits import exits_of
from adaconvert.arch.trunk import trunk_of, with_trunk
from adaconvert.errors import (
    InterruptedRunError,
    OptionError,
    OutputConflictError,
    TrainingError,
    VerificationError,
)
from adaconvert.export.card import write_card
from adaconvert.io import manifest
from adaconvert.io.adapter_files import ADAPTER_WEIGHTS
from adaconvert.io.commit import Staging, already_committed
from adaconvert.io.destination import Destination
from adaconvert.io.digest import DigestPool
from adaconvert.io.fs import FileSystem
from adaconvert.io.source import Source
from adaconvert.io.writer import parse_size
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.molora.view import standing, viewed
from adaconvert.methods.sources import Described, check_ties, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train import adapter_folder, checks, export
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_stream import Data, data_of
from adaconvert.train.dry_run import FinetunePlan, plan_of
from adaconvert.train.exit_classifier_checks import is_exit_classifier
from adaconvert.train.goals import goals_of
from adaconvert.train.ranks import Group, joined
from adaconvert.train.result import FinetuneResult, notes_of, speed_of, summary_of
from adaconvert.train.session import TRAINED, Session
from adaconvert.train.trackers import check_trackers, log_folder
from adaconvert.train.validation import Validator, hold_out
from adaconvert.train.work import Work

if TYPE_CHECKING:
    from adaconvert.train.memory_advice import Budget


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a fine-tune runs; none of it changes what comes out.

    Attributes:
        destination: folder to write.
        base: of an adapter folder, where its base is; None: where it says itself.
        overwrite: replace a folder adaconvert wrote.
        resume: go on from the last complete checkpoint of an interrupted run.
        device: "auto", "cpu" or an accelerator's name such as "cuda".
        max_shard_size: cap of a weight file.
        revision: of a hub id.
        progress: show progress bars on a terminal.
        report: takes one line per log step.
        memory: bytes, or text with a unit, training may take; None is what is free.
        dry_run: say what would be done, and do nothing.
        log_dir: folder for the files of experiment trackers; None is one beside the destination.
        fs: every call that changes the disk when the result is written.
    """

    destination: Path
    base: str | None = None
    overwrite: bool = False
    resume: bool = False
    device: str = "auto"
    max_shard_size: str | int = "5GB"
    revision: str | None = None
    progress: bool = False
    report: Callable[[str], None] = lambda line: None
    memory: str | int | None = None
    dry_run: bool = False
    log_dir: Path | None = None
    fs: FileSystem | None = field(default=None, repr=False)


def finetune(
    where: str, config: FinetuneConfig, settings: RunSettings
) -> FinetuneResult | FinetunePlan:
    """Return once the destination holds the fine-tuned checkpoint; see `api.finetune`.

    Under torchrun every process calls it, and the first one alone writes and reports.
    """
    with joined(on_cpu=settings.device == "cpu") as group, ExitStack() as held:
        config = replace(config, processes=group.size)
        if not group.is_main:
            settings = replace(settings, report=lambda line: None, progress=False)
        item = group.together(lambda: _checked(where, config, settings, held))
        config = checks.settled(config, item)
        if is_exit_classifier(item):
            from adaconvert.train.exit_classifier_run import finetune_classifier

            return finetune_classifier(item, config, settings, group)
        budget = group.on_main(lambda: _budget(item, config, settings, group))
        if settings.dry_run:
            return plan_of(config, settings.destination, budget)
        for line in budget.lines():
            settings.report(line)
        return replace(_finetuned(item, config, settings, group), memory=budget.to_json())


def _checked(
    where: str, config: FinetuneConfig, settings: RunSettings, held: ExitStack
) -> Described:
    """Return the checkpoint, after every check that costs little; `held` holds what stands for an
    adapter folder."""
    for package in ("accelerate", *(["peft"] if config.adapting.rank else [])):
        checks.require(package)
    if config.adapting.four_bit:
        checks.require("bitsandbytes")
    check_trackers(config.report_to)
    config.machine.check(config.processes)
    parse_size(settings.max_shard_size)
    root, view = held.enter_context(standing(where, base=settings.base, revision=settings.revision))
    item = replace(open_source(root, revision=None if view else settings.revision), view=view)
    checks.check_source(item, config)
    checks.check_layout(item, adapter_folder.settled(config, item))
    checks.check_device(settings.device)
    if not settings.resume:
        Destination.resolve(settings.destination).check_free(overwrite=settings.overwrite)
    return item


def _budget(item: Described, config: FinetuneConfig, settings: RunSettings, group: Group) -> Budget:
    """Return what the fine-tune needs in memory, which is there."""
    from adaconvert.train.memory_advice import budget_of, room_of

    room = room_of(settings.device, memory=settings.memory, on_machine=group.on_machine)
    return budget_of(item, config, room, changed=_changed(item, config))


def _finetuned(
    item: Described, config: FinetuneConfig, settings: RunSettings, group: Group
) -> FinetuneResult:
    """Return the result, once it lies at the destination."""
    data, held = group.main_first(
        lambda: (
            data_of(config, item.source.root, progress=settings.progress),
            hold_out(config, item.source.root),
        )
    )
    facts = facts_of(item, config, data.digest)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    first = group.on_main(lambda: digest)
    group.together(lambda: _check_same_facts(digest, first))
    if settings.resume:
        found = group.on_main(lambda: _earlier(item, settings, digest))
        if found is not None:
            return found
    with opened(item, settings, group, facts, digest) as (staging, work):
        validator = Validator(config, held, settings.report)
        result = _trained(item, config, settings, data, validator, work, group)
        return group.on_main(
            lambda: _written(item, config, settings, data, work, staging, result, digest)
        )


def _check_same_facts(mine: str, first: str) -> None:
    if mine != first:
        raise OptionError(
            "this process sees another checkpoint, other data or other options than the first",
            hint="Run the same command everywhere, on a disk that every machine sees.",
        )


def _earlier(item: Described, settings: RunSettings, digest: str) -> FinetuneResult | None:
    """Return the result an earlier run of the same kind completed, None when none did."""
    found = already_committed(settings.destination, plan_digest=digest, fs=settings.fs)
    return None if found is None else _found(settings.destination, found, item)


@contextmanager
def opened(
    item: Described,
    settings: RunSettings,
    group: Group,
    facts: Mapping[str, Any],
    digest: str,
) -> Iterator[tuple[Staging | None, Work]]:
    """Yield the staging folder, None but in the first process, and the work folder of all."""
    staged: list[Staging] = []
    with ExitStack() as stack:

        def enter() -> Work:
            staging = Staging.open(
                settings.destination,
                sources=adapter_folder.read_folders(item),
                overwrite=settings.overwrite,
                plan_digest=digest,
                needed_bytes=sum(r.nbytes for r in export.own_source(item).tensors.values()),
                fs=settings.fs,
            )
            staged.append(stack.enter_context(staging))
            check_ties(item)
            whole = {**facts, "source files": _identities(item)}
            return stack.enter_context(_work(settings, whole))

        work = group.on_main(enter)
        try:
            yield (staged[0] if staged else None), work
        except KeyboardInterrupt as error:
            if group.is_main:
                # the work folder knows what to do then
                raise
            raise InterruptedRunError("interrupted") from error


def _written(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    data: Data,
    work: Work,
    staging: Staging | None,
    result: FinetuneResult,
    digest: str,
) -> FinetuneResult:
    """Return the result after it was written, checked and given its name."""
    if staging is not None:
        if item.view is None:
            write(item, config, settings, Source.open(work.path / TRAINED), staging, result)
            _check_loads(staging.path, data)
        else:
            trained = work.path / TRAINED / ADAPTER_WEIGHTS
            adapter_folder.write(
                staging, item.view, trained, config.dtype, progress=settings.progress
            )
            staging.records()
            with viewed(staging.path, base=str(item.view.base.source.root)) as written:
                _check_loads(written.root, data)
        seal(item, staging, result, digest)
    return result


def facts_of(item: Described, config: FinetuneConfig, data: str) -> dict[str, Any]:
    """Return what decides the result; `data` is a digest of it."""
    return {
        "options": config.to_json(),
        "source": [item.source.label, item.source.fingerprint],
        "data": data,
        "adaconvert": __version__,
    }


def _identities(item: Described) -> list[str]:
    """Return what tells a source file that was rewritten from one that was not."""
    read = (
        [item.source] if item.view is None else [item.view.base.source, item.view.adapters.source]
    )
    return [
        f"{shard.file}: {shard.size} bytes, {shard.mtime_ns}, {shard.inode}"
        for source in read
        for shard in source.shards
    ]


def _found(destination: Path, record: Mapping[str, Any], item: Described) -> FinetuneResult:
    """Return the result an earlier run completed.

    Raises:
        OutputConflictError: the source's weights have changed since.
    """
    with DigestPool([item.source], allow_nonfinite=True) as pool:
        if pool.source_digest(0) != record["sources"][0]["digest"]:
            raise OutputConflictError(
                "is complete, but was made from other weights of the source",
                where=destination.name,
                hint="Replace it with --overwrite.",
            )
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
    except TrainingError as error:
        error.hint = " ".join(filter(None, [error.hint, work.kept()]))
        raise
    except KeyboardInterrupt as error:
        raise InterruptedRunError("interrupted", hint=work.hint()) from error
    finally:
        work.close(keep=keep)


def _trained(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    data: Data,
    validator: Validator,
    work: Work,
    group: Group,
) -> FinetuneResult:
    """Return the result; its model lies in the work folder."""
    session = Session(
        item=item,
        config=config,
        data=data,
        validator=validator,
        work=work,
        device=settings.device,
        report=settings.report,
        changed=_changed(item, config),
        group=group,
        logs=log_folder(Destination.resolve(settings.destination).path, settings.log_dir),
        progress=settings.progress,
    )
    chosen, curve, routing = session.train()
    notes = [*notes_of(item, config, data), *routing.pop("notes")]
    return FinetuneResult(
        destination=settings.destination,
        summary=summary_of(config, data, chosen, curve, validator.history, notes) | routing,
        speed=speed_of(curve),
        curve=curve,
    )


def _changed(item: Described, config: FinetuneConfig) -> dict[str, Any]:
    """Return the config keys the fine-tune changes."""
    from adaconvert.train.sparsify import with_activation

    return with_activation(item.source.config, item.spec, config.sparsity.activation)


def write(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    trained: Source,
    staging: Staging,
    result: FinetuneResult,
) -> None:
    """Write everything but card and manifest."""
    goals = goals_of(item.spec.adaptive, config)
    depth = result.summary.get("depth")
    content = export.config_of(item, _changed(item, config), config.dtype, goals=goals, depth=depth)
    targets = export.targets_of(item, trained, content, config.dtype)
    if exits_of(item.spec.adaptive) is not None:
        stored = {target.name: target.dtype for target in targets}
        content = with_trunk(content, trunk_of(trained, item.spec, stored))
    cap = parse_size(settings.max_shard_size)
    layouts = export.write_weights(staging, trained, targets, cap, progress=settings.progress)
    export.write_files(staging, item, content, layouts)
    staging.records()


def _check_loads(folder: Path, data: Data) -> None:
    """Return only when the written checkpoint loads by itself and computes finite logits.

    Raises:
        VerificationError: it does not.
    """
    import torch

    with quiet(), torch.inference_mode():
        model: Any = load_model(folder)
        logits = model(input_ids=data[0]["input_ids"][None]).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError("the logits of the trained model are not all finite")


def seal(item: Described, staging: Staging, result: FinetuneResult, digest: str) -> None:
    """Write card and manifest and give the result its name."""
    adapter_folder.assert_unchanged(item)
    records = staging.records()
    record = export.manifest_of(item, result.summary, records, staging, digest)
    record = write_card(staging, record)
    staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
    staging.commit()
