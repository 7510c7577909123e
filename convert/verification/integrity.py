"""Whether a converted checkpoint on disk is, byte for byte, the one that was written.

Every weight is read once: hashed, and looked through for NaN and infinity.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adaconvert.arch.adaptive import auto_map
from adaconvert.arch.base import TensorSpec
from adaconvert.arch.check import dtypes_of
from adaconvert.arch.registry import describe
from adaconvert.errors import AdaconvertError, ResourceError
from adaconvert.io.card_file import CARD
from adaconvert.io.deferral import in_order
from adaconvert.io.digest import TensorDigest, digest_tensor
from adaconvert.io.layout import ShardRecord, shard_digest, shard_digest_of_file
from adaconvert.io.manifest import MANIFEST_FILE, records
from adaconvert.io.names import check_relative_file, escape
from adaconvert.io.reader import open_shard
from adaconvert.io.regular import open_regular, pread_exact
from adaconvert.io.source import Source
from adaconvert.io.source_config import sanitise
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Plan
from adaconvert.progress import bar

_CHUNK = 8 << 20
#: hashing releases the GIL; more threads gain nothing on the disks we measured.
_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One thing that is not as it was written.

    Attributes:
        file: name inside the checkpoint, or what else it is about.
        tensor: name, None when it is about the whole file.
        what: what is wrong.
    """

    file: str
    tensor: str | None = None
    what: str

    def line(self) -> str:
        """Return the problem as one line, safe for a terminal."""
        tensor = f" tensor '{escape(self.tensor)}'" if self.tensor is not None else ""
        return f"{escape(self.file)}:{tensor} {self.what}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Integrity:
    """The result of an integrity check.

    Attributes:
        problems: everything that is wrong, by file.
        shards, tensors, nbytes: how much was checked.
        loadable: the files are at least a readable checkpoint of a known family, and safe to load.
        notes: what the user should know.
    """

    problems: tuple[Problem, ...]
    shards: int = 0
    tensors: int = 0
    nbytes: int = 0
    loadable: bool = False
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Tell whether nothing is wrong."""
        return not self.problems


def check(
    folder: Path,
    manifest: Mapping[str, object],
    *,
    sources: Sequence[Source] = (),
    plan: Plan | None = None,
    progress: bool = False,
    adapters: Source | None = None,
) -> Integrity:
    """Return what is wrong with the checkpoint in `folder`; reads all of it.

    Args:
        folder: the converted checkpoint.
        manifest: content of its adaconvert.json.
        sources: the checkpoints it was made from, in order, to tell whether they are the same.
        plan: the plan it was made by: then every target tensor is held to the plan's name, dtype
            and shape, and every source tensor to being used or dropped.
        progress: show a progress bar on a terminal.
        adapters: the folder opened, where it is a PEFT folder, whose configuration does not say
            what it holds; None for a checkpoint.

    Raises:
        ResourceError: a file may not be read.
    """
    written = records(manifest)
    problems = [*_files(folder, manifest, written)]
    notes = [*_source_notes(manifest, sources), *_card_notes(folder, manifest)]
    loadable = False
    try:
        target = Source.open(folder) if adapters is None else adapters
    except ResourceError:
        raise
    except AdaconvertError as error:
        problems.append(Problem(file=escape(folder.name), what=f"cannot be opened: {error}"))
        problems += _shards_one_by_one(folder, written)
        return _result(problems, written, False, notes)
    found = _digest_all(target, progress)
    problems += _shards(target, written, found)
    problems += _non_finite(target, found, _allows_non_finite(manifest))
    unfit = [] if adapters is not None else [*_described(target), *_config_keys(target)]
    loadable = not unfit
    problems += unfit
    if plan is not None:
        problems += [*_planned(target, plan, sources)]
    return _result(problems, written, loadable, notes)


def _result(
    problems: Sequence[Problem],
    written: Mapping[str, ShardRecord],
    loadable: bool,
    notes: Sequence[str],
) -> Integrity:
    return Integrity(
        problems=tuple(dict.fromkeys(sorted(problems, key=lambda p: (p.file, p.tensor or "")))),
        shards=len(written),
        tensors=sum(len(record.tensors) for record in written.values()),
        nbytes=sum(record.nbytes for record in written.values()),
        loadable=loadable,
        notes=tuple(notes),
    )


def _files(
    folder: Path, manifest: Mapping[str, object], written: Mapping[str, ShardRecord]
) -> Iterator[Problem]:
    """Yield what is wrong with the set of files and with the files that hold no weights."""
    listed = manifest.get("files")
    side = listed if isinstance(listed, dict) else {}
    for file in sorted({*side, *written}):
        try:
            check_relative_file(file, MANIFEST_FILE)
        except AdaconvertError as error:
            yield Problem(file=MANIFEST_FILE, what=str(error))
            continue
        if not os.path.lexists(folder / file):
            yield Problem(file=file, what="is missing")
        elif file == CARD:
            # the card is its owner's to edit; see `_card_notes`
            continue
        elif file in side and (what := _side_file_fault(folder / file, str(side[file]))):
            yield Problem(file=file, what=what)
    for entry in sorted(os.listdir(folder)):
        if entry not in written and entry not in side and entry != MANIFEST_FILE:
            yield Problem(file=entry, what=f"is not listed in {MANIFEST_FILE}")


def _card_notes(folder: Path, manifest: Mapping[str, object]) -> Iterator[str]:
    listed = manifest.get("files")
    if isinstance(listed, dict) and CARD in listed and os.path.lexists(folder / CARD):
        what = _side_file_fault(folder / CARD, str(listed[CARD]))
        if what is not None:
            yield f"{CARD} was edited since adaconvert wrote it"


def _side_file_fault(path: Path, expected: str) -> str | None:
    whole = hashlib.sha256()
    where = escape(path.name)
    try:
        with open_regular(path, where) as (descriptor, status):
            for start in range(0, status.st_size, _CHUNK):
                count = min(_CHUNK, status.st_size - start)
                whole.update(pread_exact(descriptor, count, start, where))
    except AdaconvertError as error:
        return f"cannot be read: {error.message}"
    return None if whole.hexdigest() == expected else f"differs from its hash in {MANIFEST_FILE}"


def _digest_all(target: Source, progress: bool) -> dict[str, TensorDigest]:
    refs = list(target.tensors.values())
    found: dict[str, TensorDigest] = {}
    with (
        ThreadPoolExecutor(_THREADS, thread_name_prefix="adaconvert-verify") as pool,
        bar(sum(ref.nbytes for ref in refs), "checking", enabled=progress) as shown,
    ):
        digests = in_order(pool, lambda ref: digest_tensor(target, ref), refs)
        for ref, digest in zip(refs, digests, strict=True):
            found[ref.name] = digest
            shown.update(ref.nbytes)
    return found


def _shards(
    target: Source, written: Mapping[str, ShardRecord], found: Mapping[str, TensorDigest]
) -> Iterator[Problem]:
    """Yield what differs between the shards on disk and what the manifest says of them."""
    for file in sorted({*target.files, *written}):
        stored = [ref for ref in target.tensors.values() if ref.file == file]
        if file not in written:
            yield Problem(file=file, what=f"is not listed in {MANIFEST_FILE}")
        elif file not in target.files:
            yield Problem(file=file, what="is no part of the checkpoint: the index leaves it out")
        else:
            hashes = {ref.name: found[ref.name].sha256 for ref in stored}
            ordered = sorted(stored, key=_offset_order)
            digest = shard_digest(_header(target, file), [hashes[ref.name] for ref in ordered])
            yield from _shard(file, written[file], digest, hashes)


def _shard(
    file: str, written: ShardRecord, digest: str, hashes: Mapping[str, str]
) -> Iterator[Problem]:
    if digest == written.digest:
        return
    different = False
    for name in sorted({*hashes, *written.tensors}):
        if name not in hashes:
            what = "is missing"
        elif name not in written.tensors:
            what = f"is not listed in {MANIFEST_FILE}"
        elif hashes[name] != written.tensors[name]:
            what = f"differs from its hash in {MANIFEST_FILE}"
        else:
            continue
        different = True
        yield Problem(file=file, tensor=name, what=what)
    if not different:
        yield Problem(
            file=file, what="has another header than was written: dtypes, shapes or order"
        )


def _offset_order(ref: TensorRef) -> tuple[int, int, str]:
    return (ref.start, ref.nbytes, ref.name)


def _header(target: Source, file: str) -> bytes:
    with open_shard(target, file) as descriptor:
        length = int.from_bytes(pread_exact(descriptor, 8, 0, escape(file)), "little")
        return pread_exact(descriptor, 8 + length, 0, escape(file))


def _shards_one_by_one(folder: Path, written: Mapping[str, ShardRecord]) -> Iterator[Problem]:
    """Yield what is wrong with each shard of a checkpoint that does not open as a whole."""
    for file, record in sorted(written.items()):
        if not os.path.lexists(folder / file):
            continue
        try:
            digest, hashes = shard_digest_of_file(folder / file)
        except AdaconvertError as error:
            yield Problem(file=file, what=error.message)
        else:
            yield from _shard(file, record, digest, hashes)


def _non_finite(
    target: Source, found: Mapping[str, TensorDigest], allowed: bool
) -> Iterator[Problem]:
    for name, digest in found.items():
        if not digest.finite and not allowed:
            values = "value" if digest.bad_count == 1 else "values"
            what = (
                f"holds {digest.bad_count} non-finite {values}, "
                f"first at flat index {digest.first_bad}"
            )
            yield Problem(file=target.tensors[name].file, tensor=name, what=what)


def _allows_non_finite(manifest: Mapping[str, object]) -> bool:
    notes = manifest.get("notes")
    return isinstance(notes, list) and any(
        str(note).startswith("non-finite values accepted") for note in notes
    )


def _described(target: Source) -> Iterator[Problem]:
    """Yield what differs between the stored tensors and what config.json implies."""
    try:
        spec = describe(target.config, target.tensors.keys())
    except AdaconvertError as error:
        yield Problem(file="config.json", what=error.describe())
        return
    expected = {tensor.name: tensor for tensor in spec.tensors}
    for name in sorted(expected.keys() | target.tensors.keys()):
        ref, wanted = target.tensors.get(name), expected.get(name)
        if ref is None:
            if wanted is not None and not wanted.optional:
                yield Problem(
                    file="config.json", tensor=name, what="is implied, but no file holds it"
                )
        elif wanted is None:
            yield Problem(file=ref.file, tensor=name, what="is no part of what config.json implies")
        else:
            yield from _fits(ref, wanted)


def _fits(ref: TensorRef, wanted: TensorSpec) -> Iterator[Problem]:
    if ref.shape != wanted.shape:
        what = f"has shape {list(ref.shape)}, config.json implies {list(wanted.shape)}"
        yield Problem(file=ref.file, tensor=ref.name, what=what)
    if ref.dtype not in dtypes_of(wanted):
        what = f"has dtype {escape(ref.dtype)}, expected one of {', '.join(dtypes_of(wanted))}"
        yield Problem(file=ref.file, tensor=ref.name, what=what)


def _config_keys(target: Source) -> Iterator[Problem]:
    for key in sanitise(target.raw_config)[1]:
        if key == "auto_map" and _is_own_auto_map(target):
            continue
        yield Problem(file="config.json", what=f"holds '{escape(key)}', which could load code")


def _is_own_auto_map(target: Source) -> bool:
    """Tell whether auto_map names the classes of the runtime in the folder and nothing else."""
    try:
        spec = describe(target.config, target.tensors.keys())
    except AdaconvertError:
        return False
    return spec.adaptive is not None and target.raw_config["auto_map"] == auto_map(spec)


def _source_notes(manifest: Mapping[str, object], sources: Sequence[Source]) -> Iterator[str]:
    listed = manifest.get("sources")
    entries = listed if isinstance(listed, list) else []
    if sources and len(entries) != len(sources):
        yield f"made from {len(entries)} sources, compared with {len(sources)}"
    for entry, source in zip(entries, sources, strict=False):
        if isinstance(entry, dict) and entry.get("fingerprint") != source.fingerprint:
            yield (
                f"{escape(source.label)} is not, file for file, the source it was made from "
                f"({escape(entry.get('label'))})"
            )


def _planned(target: Source, plan: Plan, sources: Sequence[Source]) -> Iterator[Problem]:
    """Yield what differs between the stored tensors and the plan, and what the plan leaves out."""
    expected = {tensor.name: tensor for tensor in plan.targets}
    for name in sorted(expected.keys() | target.tensors.keys()):
        ref, wanted = target.tensors.get(name), expected.get(name)
        if ref is None:
            yield Problem(file="the plan", tensor=name, what="was to be written, no file holds it")
        elif wanted is None:
            yield Problem(file=ref.file, tensor=name, what="is not in the plan")
        elif (ref.dtype, ref.shape) != (wanted.dtype, wanted.shape):
            what = f"is {ref.dtype} {list(ref.shape)}, planned {wanted.dtype} {list(wanted.shape)}"
            yield Problem(file=ref.file, tensor=name, what=what)
    if not sources:
        return
    try:
        check_plan(plan, [source.tensors for source in sources])
    except AdaconvertError as error:
        yield Problem(file="the plan", what=error.describe())
