"""One fine-tune from start to end: open, pack, train, write, check, commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adaconvert import __version__
from adaconvert.errors import InterruptedRunError, OutputConflictError, VerificationError
from adaconvert.io import manifest
from adaconvert.io.commit import Staging, already_committed
from adaconvert.io.destination import Destination
from adaconvert.io.digest import DigestPool
from adaconvert.io.fs import FileSystem
from adaconvert.io.source import Source
from adaconvert.io.writer import parse_size
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, check_ties, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train import checks, export
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed, pack
from adaconvert.train.result import FinetuneResult, notes_of, speed_of, summary_of
from adaconvert.train.session import TRAINED, Session
from adaconvert.train.work import Work


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


def finetune(where: str, config: FinetuneConfig, settings: RunSettings) -> FinetuneResult:
    """Return once the destination holds the fine-tuned checkpoint; see `api.finetune`."""
    checks.require_accelerate()
    parse_size(settings.max_shard_size)
    item = open_source(where, revision=settings.revision)
    checks.check_source(item, config)
    checks.check_device(settings.device)
    if not settings.resume:
        Destination.resolve(settings.destination).check_free(overwrite=settings.overwrite)
    data = pack(config, item.source.root, progress=settings.progress)
    facts = _facts(item, config, data)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if settings.resume:
        found = already_committed(settings.destination, plan_digest=digest, fs=settings.fs)
        if found is not None:
            return _found(settings.destination, found, item)
    with Staging.open(
        settings.destination,
        sources=[item.source.root],
        overwrite=settings.overwrite,
        plan_digest=digest,
        needed_bytes=sum(ref.nbytes for ref in item.source.tensors.values()),
        fs=settings.fs,
    ) as staging:
        check_ties(item)
        with _work(settings, {**facts, "source files": _identities(item)}) as work:
            result = _trained(item, config, settings, data, work)
            _write(item, config, settings, Source.open(work.path / TRAINED), staging, result)
            _check_loads(staging.path, data)
            _seal(item, staging, result, digest)
    return result


def _facts(item: Described, config: FinetuneConfig, data: Packed) -> dict[str, Any]:
    """Return what decides the result."""
    return {
        "options": config.to_json(),
        "source": [item.source.label, item.source.fingerprint],
        "data": data.digest,
        "adaconvert": __version__,
    }


def _identities(item: Described) -> list[str]:
    """Return what tells a source file that was rewritten from one that was not."""
    return [f"{s.file}: {s.size} bytes, {s.mtime_ns}, {s.inode}" for s in item.source.shards]


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
    except KeyboardInterrupt as error:
        raise InterruptedRunError("interrupted", hint=work.hint()) from error
    finally:
        work.close(keep=keep)


def _trained(
    item: Described, config: FinetuneConfig, settings: RunSettings, data: Packed, work: Work
) -> FinetuneResult:
    """Return the result; its model lies in the work folder."""
    session = Session(
        item=item,
        config=config,
        data=data,
        work=work,
        device=settings.device,
        report=settings.report,
        changed=_changed(item, config),
    )
    chosen, curve = session.train()
    return FinetuneResult(
        destination=settings.destination,
        summary=summary_of(config, data, chosen, curve, notes_of(item, config, data)),
        speed=speed_of(curve),
        curve=curve,
    )


def _changed(item: Described, config: FinetuneConfig) -> dict[str, Any]:
    """Return the config keys the fine-tune changes."""
    from adaconvert.train.sparsify import with_activation

    return with_activation(item.source.config, item.spec, config.sparsity.activation)


def _write(
    item: Described,
    config: FinetuneConfig,
    settings: RunSettings,
    trained: Source,
    staging: Staging,
    result: FinetuneResult,
) -> None:
    """Write everything but the manifest."""
    content = export.config_of(item, _changed(item, config), config.dtype)
    targets = export.targets_of(item, trained, content, config.dtype)
    cap = parse_size(settings.max_shard_size)
    layouts = export.write_weights(staging, trained, targets, cap, progress=settings.progress)
    export.write_files(staging, item, content, layouts, export.card_of(item, result.summary))
    staging.records()


def _check_loads(folder: Path, data: Packed) -> None:
    """Return only when the written checkpoint loads by itself and computes finite logits.

    Raises:
        VerificationError: it does not.
    """
    import torch

    with quiet(), torch.inference_mode():
        model: Any = load_model(folder)
        ids = torch.from_numpy(data.ids[:1].astype("int64"))
        logits = model(input_ids=ids).logits
    if not bool(torch.isfinite(logits).all()):
        raise VerificationError("the logits of the trained model are not all finite")


def _seal(item: Described, staging: Staging, result: FinetuneResult, digest: str) -> None:
    """Write the manifest and give the result its name."""
    item.source.assert_unchanged()
    records = staging.records()
    record = export.manifest_of(item, result.summary, records, staging.files, digest)
    staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
    staging.commit()
