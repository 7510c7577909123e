"""What is proven of a checkpoint: one that is staged, completed by an earlier run, or given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from adaconvert.errors import (
    AdaconvertError,
    OptionError,
    OutputConflictError,
    VerificationError,
)
from adaconvert.io import manifest
from adaconvert.io.digest import DigestPool
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.io.writer import parse_size
from adaconvert.methods.molora.adapter_source import is_adapter_folder, open_adapters
from adaconvert.methods.molora.parts import holds_adapters
from adaconvert.methods.molora.taken import standing_sources
from adaconvert.methods.molora.view import viewed
from adaconvert.methods.registry import method_of
from adaconvert.methods.sources import Described, open_source
from adaconvert.planning.ops import Plan
from adaconvert.verification.integrity import check

if TYPE_CHECKING:
    from adaconvert.verification.report import VerificationReport
    from adaconvert.verification.tokens import Probe


def found_complete(
    folder: Path,
    record: Mapping[str, object],
    sources: Sequence[Source],
    plan: Plan,
    *,
    verify: bool,
    probe: Probe | None,
    memory: int | None,
    progress: bool,
    base: str | None = None,
) -> tuple[str, ...]:
    """Return what is said of an output that an earlier run completed, once it is checked.

    Raises:
        OutputConflictError: it was made of other weights, or verification was skipped then and is
            asked for now.
        VerificationError: it is no longer what was written.
    """
    where = folder.name
    if _weights(sources) != _recorded(record, "digest"):
        raise OutputConflictError(
            "is complete, but was made from other weights of the source",
            where=where,
            hint="Replace it with --overwrite.",
        )
    if not verify:
        adapters = open_adapters(folder).source if is_adapter_folder(folder) else None
        found = check(folder, record, sources=sources, plan=plan, adapters=adapters)
        if found.problems:
            raise VerificationError(found.problems[0].line(), where=where)
        return ("an earlier run completed it; every byte is as written",)
    if record["verification"] is None:
        raise OutputConflictError(
            "is complete, but was not verified when it was written",
            where=where,
            hint="Run `adaconvert verify`, or replace it with --overwrite.",
        )
    report = checked(
        sources,
        folder,
        record,
        plan,
        probe=probe,
        memory=memory,
        progress=progress,
        name=where,
        base=base,
    )
    return ("an earlier run completed it", *report.lines())


def _weights(sources: Sequence[Source]) -> list[object]:
    """Return one sha256 over the weights of each source; reads them."""
    with DigestPool(sources, allow_nonfinite=True) as pool:
        return [pool.source_digest(index) for index in range(len(sources))]


def _recorded(record: Mapping[str, object], key: str) -> list[object]:
    """Return an entry of each source in a manifest."""
    sources = record["sources"]
    assert isinstance(sources, list)
    return [entry.get(key) if isinstance(entry, dict) else None for entry in sources]


def probe_of(file: Path | None, source: Path) -> Probe | None:
    """Return the tokens of a file, None for the shipped text; before anything long begins."""
    if file is None:
        return None
    from adaconvert.verification.tokens import Probe

    return Probe.from_file(file, source)


def checked(
    sources: Sequence[Source],
    folder: Path,
    record: Mapping[str, object],
    plan: Plan | None,
    *,
    probe: Probe | None,
    memory: int | None,
    progress: bool,
    name: str,
    base: str | None = None,
) -> VerificationReport:
    """Return the verification of a checkpoint that keeps its promise.

    Args:
        sources: what it was made of.
        folder: the checkpoint, or a PEFT folder.
        record: content of its adaconvert.json.
        plan: it was made by, None where that is not known.
        probe: tokens to compare on, None for the shipped text.
        memory: bytes the comparison may take.
        progress: show a progress bar.
        name: of the folder in messages.
        base: of a PEFT folder, where its base is; None for the first source, unless that holds
            adapters itself.

    Raises:
        VerificationError: it does not; the report is attached.
    """
    from adaconvert.verification.report import verify_checkpoint

    if is_adapter_folder(folder):
        report = _checked_adapters(
            sources, folder, record, plan, probe, memory, progress, base=base
        )
    else:
        report = verify_checkpoint(
            [source.root for source in sources],
            folder,
            manifest=record,
            memory=memory,
            probe=probe,
            progress=progress,
            plan=plan,
        )
    if not report.ok:
        error = VerificationError(report.problem(), where=name)
        error.report = report
        raise error
    return report


def _checked_adapters(
    sources: Sequence[Source],
    folder: Path,
    record: Mapping[str, object],
    plan: Plan | None,
    probe: Probe | None,
    memory: int | None,
    progress: bool,
    *,
    base: str | None,
) -> VerificationReport:
    """Return the verification of a PEFT folder, on its base where that is at hand."""
    from adaconvert.verification.adapters import verify_adapters

    opened = open_adapters(folder).source
    if base is None and not holds_adapters(sources[0].config):
        base = str(sources[0].root)
    with ExitStack() as stack:
        view = None
        if base is not None:
            view = stack.enter_context(viewed(folder, base=base)).root
        return verify_adapters(
            sources,
            opened,
            view,
            manifest=record,
            memory=memory,
            probe=probe,
            progress=progress,
            plan=plan,
        )


def verify_existing(
    checkpoints: Sequence[str],
    *,
    memory: str | int | None = None,
    probe: Path | None = None,
    revision: str | None = None,
    progress: bool = False,
) -> VerificationReport:
    """Return the verification of a committed checkpoint against its sources; see `api.verify`."""
    if len(checkpoints) < 2:
        raise OptionError("needs a source and a converted checkpoint", where="verify")
    size = None if memory is None else parse_size(memory, "--memory")
    *sources, target = checkpoints
    folder = Path(target)
    if not folder.is_dir():
        raise OptionError(
            "is no folder", where=escape(target), hint="Name the converted checkpoint last."
        )
    record = manifest.read(folder)
    with standing_sources(sources, str(record["method"]), {}, revision) as taken:
        described = [
            open_source(source, revision=taken.revision, ignore_unindexed=True)
            for source in taken.sources
        ]
        opened = [item.source for item in described]
        _check_made_of(record, opened, folder.resolve().name)
        return checked(
            opened,
            folder,
            record,
            _planned_again(record, described),
            probe=probe_of(probe, opened[0].root),
            memory=size,
            progress=progress,
            name=folder.resolve().name,
            base=taken.base,
        )


def _check_made_of(record: Mapping[str, object], sources: Sequence[Source], name: str) -> None:
    """Hold a result without a bound on its logits to the sources it was made of.

    Logits tell a wrong source of an exact result; only the weights' digest tells that of another.

    Raises:
        VerificationError: these are not its sources, in this order.
    """
    promise = record["exactness"]
    kind = promise.get("kind") if isinstance(promise, dict) else None
    many = len(_recorded(record, "digest")) != len(sources)
    if kind in {"exact", "exact-fp32"} and not many:
        return
    if many or _weights(sources) != _recorded(record, "digest"):
        labels = [str(label) for label in _recorded(record, "label")]
        hint = "Name its sources in their order, with their weights unchanged."
        if any(label.startswith(".") and label.endswith(".stage1") for label in labels):
            hint = (
                "It was made of what stage 1 of `d2dmoe` trained, which is not kept, and held to "
                "that when it was written. `adaconvert evaluate` compares it with any model."
            )
        raise VerificationError(
            "was not made from these sources",
            where=name,
            expected=escape(", ".join(labels)),
            found=escape(", ".join(source.label for source in sources)),
            hint=hint,
        )


def _planned_again(record: Mapping[str, object], described: Sequence[Described]) -> Plan | None:
    """Return the plan a manifest was written by, None when these are not its sources.

    With it, verification accounts for every tensor of the sources and names wrong dtypes.
    """
    options = record["options"]
    assert isinstance(options, dict)
    if _recorded(record, "fingerprint") != [d.source.fingerprint for d in described]:
        return None
    try:
        return method_of(str(record["method"])).replan(options, described)
    except (AdaconvertError, TypeError):
        # another version of adaconvert may have had other options
        return None
