"""One conversion from start to end: open, plan, stage, write, verify, commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

from adaconvert import __version__
from adaconvert.arch.null_experts import holds_nulls
from adaconvert.errors import OptionError, SourceError
from adaconvert.export.adaptive import code_files
from adaconvert.export.card import write_card
from adaconvert.export.card_facts import facts_of
from adaconvert.io import aux_files, manifest
from adaconvert.io.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from adaconvert.io.commit import Staging, already_committed
from adaconvert.io.fs import FileSystem
from adaconvert.io.source import Source
from adaconvert.io.writer import ShardLayout, index_json, layout_shards, parse_size
from adaconvert.methods.deciding import decided
from adaconvert.methods.molora.taken import Taken, standing_sources
from adaconvert.methods.planned import PlainPlan, Planned, Prepared
from adaconvert.methods.registry import Method, make_config, method_of, prepare
from adaconvert.methods.sources import (
    Described,
    check_agreement,
    check_ties,
    check_vocabulary,
    left_behind,
    open_source,
    refuse_exits,
)
from adaconvert.planning.alignment import aligned
from adaconvert.planning.digest import run_digest
from adaconvert.planning.execute import Execution, execute
from adaconvert.planning.ops import Plan
from adaconvert.proof import checked, found_complete, probe_of
from adaconvert.reports import ConversionResult, PlanReport, target_costs


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """What a run needs besides its method's options; see `api.convert`.

    `fs` is every call that changes the disk, for tests that stop a run at each of them.
    """

    destination: Path
    overwrite: bool = False
    resume: bool = False
    verify: bool = True
    max_shard_size: str | int = "5GB"
    revision: str | None = None
    memory: str | int | None = None
    probe: Path | None = None
    allow_nonfinite: bool = False
    keep_config: tuple[str, ...] = ()
    ignore_unindexed: bool = False
    progress: bool = False
    fs: FileSystem | None = None


def prepare_run(
    sources: Sequence[str],
    method: str,
    options: Mapping[str, object],
    revision: str | None = None,
    keep_config: Sequence[str] = (),
    ignore_unindexed: bool = False,
) -> Prepared:
    """Return the planned run; opens and audits the sources, reads no weights."""
    config = make_config(method, options)
    if not sources:
        raise OptionError("no source given", where="SRC")
    described = [
        open_source(where, revision=revision, ignore_unindexed=ignore_unindexed)
        for where in sources
    ]
    for item in described:
        _check_kind(item, method_of(method))
    _check_count(described, method)
    check_agreement(described)
    prepared = prepare(config, described)
    if not keep_config:
        return prepared
    planned = prepared.planned
    config_json = _kept(planned.plan.config, described[0], keep_config)
    return replace(prepared, planned=_with_config(planned, config_json))


def _with_config(planned: Planned, config: dict[str, object]) -> PlainPlan:
    """Return a plan that writes another config.json."""
    return PlainPlan(
        plan=replace(planned.plan, config=config),
        described=planned.described,
        target=planned.target,
        runtimes=planned.runtimes,
        files=planned.files,
    )


def _check_kind(item: Described, method: Method) -> None:
    """Hold a source to what a method accepts.

    Raises:
        SourceError: it is a mixture, split already, or not split at all.
    """
    where = f"{item.source.label}/config.json"
    if not method.exits:
        refuse_exits(item)
    if item.spec.num_experts and method.mixtures:
        return
    if holds_nulls(item.spec.adaptive):
        raise SourceError(
            f"is a mixture with null experts ({item.spec.model_type})",
            where=where,
            hint=f"{method.refusal} Without its null experts it is the mixture it was made of; "
            "`adaconvert adamoe --materialize` writes a stock mixture of one that has a place for "
            "them.",
        )
    if item.spec.num_experts:
        raise SourceError(
            f"is already a mixture of {item.spec.num_experts} experts ({item.spec.model_type})",
            where=where,
            hint=method.refusal,
        )
    is_adaptive = item.spec.adaptive is not None
    if method.accepts not in ("any", "adaptive" if is_adaptive else "dense"):
        what = "is already adaptive" if is_adaptive else "is a dense model"
        raise SourceError(f"{what} ({item.spec.model_type})", where=where, hint=method.refusal)


def _check_count(described: Sequence[Described], method: str) -> None:
    if len(described) > 1 and not method_of(method).several:
        raise OptionError(
            f"{method} takes one checkpoint", where="SRC", expected=1, found=len(described)
        )


def _kept(config: dict[str, object], item: Described, keys: Sequence[str]) -> dict[str, object]:
    """Return the target's config with keys of the source's carried over as they are."""
    kept = dict(config)
    for key in keys:
        if key not in item.source.config:
            raise OptionError("is not in the source's config.json", where=f"--keep-config {key}")
        if key in config:
            raise OptionError(
                "is written by the conversion and cannot be kept", where=f"--keep-config {key}"
            )
        kept[key] = item.source.config[key]
    return kept


def run(
    sources: Sequence[str], method: str, options: Mapping[str, object], settings: RunSettings
) -> ConversionResult:
    """Return once the destination is committed; see `api.convert` for the errors."""
    with standing_sources(sources, method, options, settings.revision) as taken:
        return _run(taken, method, settings)


def _run(taken: Taken, method: str, settings: RunSettings) -> ConversionResult:
    """Return once the destination is committed, of sources that are checkpoints."""
    cap = parse_size(settings.max_shard_size)
    memory = None if settings.memory is None else parse_size(settings.memory, "--memory")
    prepared = prepare_run(
        taken.sources,
        method,
        decided(taken, method, settings),
        taken.revision,
        settings.keep_config,
        settings.ignore_unindexed,
    )
    planned = prepared.planned
    opened = [d.source for d in planned.described]
    layouts = aligned(_layouts(planned, cap), planned.plan, [s.tensors for s in opened])
    report = PlanReport.of(planned, cap)
    digest = run_digest(planned.plan, cap)
    probe = probe_of(settings.probe, opened[0].root) if settings.verify else None
    found = None
    if settings.resume:
        found = already_committed(settings.destination, plan_digest=digest, fs=settings.fs)
    if found is not None:
        lines = found_complete(
            settings.destination,
            found,
            opened,
            planned.plan,
            verify=settings.verify,
            probe=probe,
            memory=memory,
            progress=settings.progress,
            base=taken.base,
        )
        return ConversionResult(
            destination=settings.destination,
            report=report,
            manifest=found,
            verification_lines=lines,
        )
    with Staging.open(
        settings.destination,
        sources=[*(source.root for source in opened), *taken.places],
        overwrite=settings.overwrite,
        resume=settings.resume,
        plan_digest=_session(digest, opened),
        needed_bytes=sum(layout.nbytes for layout in layouts),
        facts={**_facts(planned.plan, cap, opened), "keep_config": list(settings.keep_config)},
        fs=settings.fs,
    ) as staging:
        staging.kept_elsewhere = prepared.kept
        for item in planned.described:
            check_ties(item)
            check_vocabulary(item)
        fitted = prepared.fit(settings.progress)
        done = execute(
            planned.plan,
            opened,
            staging,
            layouts,
            fitted=fitted,
            allow_nonfinite=settings.allow_nonfinite,
            progress=settings.progress,
        )
        config_json = prepared.config_of(fitted) if prepared.config_of else planned.plan.config
        _write_side_files(staging, planned, config_json, layouts)
        notes = prepared.notes_of(_hashes(done)) if prepared.notes_of else []
        record = _manifest(planned.plan, planned.described, done, staging.files, digest, notes)
        proven = None
        if settings.verify:
            proven = checked(
                opened,
                staging.path,
                record,
                planned.plan,
                probe=probe,
                memory=memory,
                progress=settings.progress,
                name=settings.destination.name,
                base=taken.base,
            )
        record["verification"] = proven.record() if proven else None
        record["history"] = manifest.histories_of(
            _places(opened, taken),
            # a folder of adapters stands for more than its own weights
            None if taken.folders else done.sources,
        )
        places = (*taken.folders, Path(taken.base)) if taken.folders and taken.base else ()
        record["card"] = facts_of(opened, staging.path, after=_costs(planned), places=places)
        record = write_card(staging, record)
        for source in opened:
            source.assert_unchanged()
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
        staging.commit()
    return ConversionResult(
        destination=settings.destination,
        report=report,
        manifest=record,
        verification_lines=tuple(proven.lines()) if proven else ("not verified (--no-verify)",),
        found=tuple(notes),
    )


def _identities(sources: Sequence[Source]) -> list[str]:
    """Return what tells a source file that was rewritten from one that was not."""
    return [
        f"{source.label}/{shard.file} of {shard.size} bytes, {shard.mtime_ns}, {shard.inode}"
        for source in sources
        for shard in source.shards
    ]


def _session(digest: str, sources: Sequence[Source]) -> str:
    """Return what a run must share with an interrupted one to go on from its shards.

    The plan knows sources by their headers; weights that were rewritten since show in the files.
    """
    text = "\n".join([digest, *_identities(sources)])
    return hashlib.sha256(text.encode()).hexdigest()


def _facts(plan: Plan, cap: int, sources: Sequence[Source]) -> dict[str, object]:
    """Return what decides the bytes written, to name what differs when a run cannot be resumed."""
    return {
        **plan.options,
        "sources": list(plan.sources),
        "source files": _identities(sources),
        "max_shard_size": cap,
        "adaconvert": __version__,
    }


def _layouts(planned: Planned, cap: int) -> tuple[ShardLayout, ...]:
    """Return the shards of the result; PEFT reads one file of a name of its own."""
    if planned.folder is None:
        return layout_shards(planned.plan.targets, cap)
    (only,) = layout_shards(planned.plan.targets, None)
    return (replace(only, file=ADAPTER_WEIGHTS),)


def _costs(planned: Planned) -> dict[str, int] | None:
    """Return what a PEFT folder costs with its base; None where the result says so itself."""
    if planned.folder is None:
        return None
    return target_costs(planned).to_json()


def _places(sources: Sequence[Source], taken: Taken) -> list[tuple[Path, str]]:
    """Return folder and label of each source; of adapters, that of the adapters."""
    folders = taken.folders or tuple(source.root for source in sources)
    return [(folder, source.label) for folder, source in zip(folders, sources, strict=True)]


def _hashes(done: Execution) -> dict[str, str]:
    """Return the sha256 of every tensor that was written."""
    return {name: sha for shard in done.shards.values() for name, sha in shard.tensors.items()}


def _write_side_files(
    staging: Staging,
    planned: Planned,
    config: Mapping[str, object],
    layouts: Sequence[ShardLayout],
) -> None:
    """Write every file beside the weights: those of the first source byte for byte, then our
    own; beside adapters their configuration alone."""
    if planned.folder is not None:
        own = {ADAPTER_CONFIG: _json(planned.folder.complete(config)), **planned.files}
        for name, content in own.items():
            staging.write_file(name, content)
        return
    source = planned.described[0].source
    for name in aux_files.classify(source).copied:
        staging.copy_file(name, source.path(name))
    own = {"config.json": _json(config), **planned.files}
    if isinstance(config.get("adaptive"), dict):
        own |= code_files()
    for name, content in own.items():
        staging.write_file(name, content)
    index = index_json(layouts)
    if index is not None:
        staging.write_file("model.safetensors.index.json", index)


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _manifest(
    plan: Plan,
    described: Sequence[Described],
    done: Execution,
    files: Mapping[str, str],
    digest: str,
    found: Sequence[str],
) -> dict[str, object]:
    """Return the content of adaconvert.json, not yet verified and sealed."""
    notes = [*plan.notes, *found]
    notes += done.nonfinite
    for item in described:
        notes += [
            f"{item.source.label}: {note}" for note in (*item.source.notes, *item.audit.notes)
        ]
        notes += [
            f"{item.source.label}: {name} not copied ({reason})"
            for name, reason in sorted(left_behind(item).items())
        ]
    return manifest.build(
        method=plan.method,
        options=plan.options,
        sources=[
            {
                "label": item.source.label,
                "revision": item.source.revision,
                "fingerprint": item.source.fingerprint,
                "digest": digest_of_source,
            }
            for item, digest_of_source in zip(described, done.sources, strict=True)
        ],
        plan_digest=digest,
        exactness={"kind": plan.exactness.kind, "why": plan.exactness.why},
        shards=done.shards,
        files=files,
        dropped=[{"source": d.source, "tensor": d.tensor, "reason": d.reason} for d in plan.drops],
        notes=notes,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Return the versions of the packages the bytes and the verification depend on."""
    names = ("numpy", "safetensors", "torch", "transformers")
    return {name: metadata.version(name) for name in names}
