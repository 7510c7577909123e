"""Which files of a folder belong to the checkpoint, and whether they are as they were written.

Everything beside the weights is read once: the bytes that are checked are the bytes that are sent.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from adaconvert.errors import SourceError, VerificationError
from adaconvert.export.hub_secrets import faults, own_places, remarks
from adaconvert.io.adapter_files import ADAPTER_CONFIG
from adaconvert.io.card_file import CARD, is_edited
from adaconvert.io.header import read_header
from adaconvert.io.layout import ShardRecord, digest_order, shard_digest, shard_digest_of_file
from adaconvert.io.manifest import MANIFEST_FILE, read, records
from adaconvert.io.names import check_relative_file, escape, listing
from adaconvert.io.regular import open_regular, pread_exact, read_whole
from adaconvert.progress import bar

#: a file beside the weights that is larger is none; the largest tokenizers have 40 MB.
MAX_SIDE_FILE: Final = 256 << 20
#: a folder of staging, beside its destination.
_PARTIAL: Final = ".adaconvert-partial"
_SHOWN: Final = 8
#: file -> what to do about what must not be published in it.
_HINTS: Final = {
    CARD: "Remove it.",
    "adapter_config.json": "Write the adapters again with --base ORG/NAME.",
}

_KINDS = (
    (re.compile(r"checkpoint-\d+(/.*)?"), "is a checkpoint of a training run"),
    (re.compile(r"(optimizer|scheduler|scaler|rng_state|trainer_state|training_args).*"), None),
    (re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|npz|npy|distcp)"), "may hold pickled objects"),
    (re.compile(r".*\.log|logs?(/.*)?|runs(/.*)?|wandb(/.*)?|.*tfevents.*"), "is a log"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file of the checkpoint.

    Attributes:
        name: inside the checkpoint.
        path: on disk.
        nbytes: its size.
        content: all of it; None for weights, which are read when they are sent.
        identity: size, time of the last change in nanoseconds and inode.
    """

    name: str
    path: Path
    nbytes: int
    content: bytes | None
    identity: tuple[int, int, int]

    def changed(self) -> bool:
        """Tell whether the weights were written to since they were checked."""
        try:
            return self.content is None and _identity(self.path.stat()) != self.identity
        except OSError:
            return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a folder holds.

    Attributes:
        manifest: content of adaconvert.json.
        parts: the files of the checkpoint, by name.
        left_out: why each other entry of the folder is not published, by name.
        edited_card: the owner changed README.md.
        notes: what the user should know.
    """

    manifest: Mapping[str, object]
    parts: tuple[Part, ...]
    left_out: Mapping[str, str]
    edited_card: bool
    notes: tuple[str, ...]


def read_contents(
    folder: Path, *, whole: bool, allow_unverified: bool = False, progress: bool = False
) -> Contents:
    """Return the files of a checkpoint that is complete, unchanged and fit to be published.

    Args:
        folder: what adaconvert wrote.
        whole: read and hash all weights; otherwise their sizes and headers.
        allow_unverified: accept a checkpoint that was written with --no-verify.
        progress: show a progress bar on a terminal.

    Raises:
        SourceError: adaconvert did not write it.
        VerificationError: it was not verified, is incomplete, was altered, or holds secrets.
        ResourceError: a file may not be read.
    """
    label = escape(folder.name or folder.resolve().name)
    manifest = _manifest(folder, label)
    if not allow_unverified:
        _check_verified(manifest, label)
    written = records(manifest)
    side = cast("dict[str, str]", manifest["files"])
    _check_names([*side, *written])
    sides, problems = _side_parts(folder, side)
    weights = _weight_parts(folder, written, problems)
    problems += _weight_problems(weights, written, whole, progress)
    if problems:
        raise _altered(label, problems)
    parts = sorted([*sides, *weights], key=lambda part: part.name)
    _check_secrets(parts, own_places(folder))
    edited = is_edited(folder, manifest)
    notes = [f"{CARD} was edited since it was written; it is taken as it is"] if edited else []
    notes += [note for part in parts for note in remarks(part.name, part.content or b"")]
    return Contents(
        manifest=manifest,
        parts=tuple(parts),
        left_out=_left_out(folder, {part.name for part in parts}),
        edited_card=edited,
        notes=tuple(notes),
    )


def _manifest(folder: Path, label: str) -> dict[str, object]:
    if not folder.is_dir():
        raise SourceError(
            "is a file" if folder.exists() else "no such folder",
            where=label,
            expected="the folder of a checkpoint adaconvert wrote",
        )
    if folder.name.endswith(_PARTIAL):
        hint = "Finish it: run the command that writes it again, with --resume."
        raise SourceError("is an unfinished output", where=label, hint=hint)
    if not os.path.lexists(folder / MANIFEST_FILE):
        hint = "Push it with `hf upload`, or convert it first."
        message = f"was not written by adaconvert: it holds no {MANIFEST_FILE}"
        raise SourceError(message, where=label, hint=hint)
    return read(folder)


def _check_verified(manifest: Mapping[str, object], label: str) -> None:
    # a training run is held to loading and to finite weights; there is nothing it could equal
    if manifest["verification"] is None and "training" not in manifest:
        raise VerificationError(
            "was not verified when it was written",
            where=label,
            hint="Convert it again without --no-verify, or publish it as it is with "
            "--allow-unverified.",
        )


def _check_names(names: list[str]) -> None:
    """Return only when every listed name is one of a checkpoint's files."""
    for name in names:
        check_relative_file(name, MANIFEST_FILE)
        reason = _foreign(name)
        if reason is not None:
            raise VerificationError(f"lists '{escape(name)}', which {reason}", where=MANIFEST_FILE)
    described = "config.json" in names or ADAPTER_CONFIG in names
    if CARD not in names or not described:
        missing = CARD if CARD not in names else "config.json"
        raise VerificationError(f"lists no {missing}", where=MANIFEST_FILE)


def _foreign(name: str) -> str | None:
    """Return why a file is no part of a published checkpoint, whoever lists it."""
    if any(part.startswith(".") for part in name.split("/")):
        return "is hidden"
    for pattern, reason in _KINDS:
        if pattern.fullmatch(name):
            return reason or "is training state"
    return None


def _left_out(folder: Path, known: set[str]) -> dict[str, str]:
    found = {}
    for entry in sorted(os.listdir(folder)):
        inside = any(name.startswith(f"{entry}/") for name in known)
        if entry not in known and not inside:
            kind = "is a folder" if (folder / entry).is_dir() else None
            found[entry] = _foreign(entry) or kind or f"is not listed in {MANIFEST_FILE}"
    return found


def _side_parts(folder: Path, side: Mapping[str, str]) -> tuple[list[Part], list[str]]:
    parts, problems = [], []
    for name, digest in sorted({**side, MANIFEST_FILE: ""}.items()):
        try:
            part = _part(folder, name, read_whole(folder / name, escape(name), MAX_SIDE_FILE))
        except SourceError as error:
            problems.append(f"{escape(name)} {_missing(folder / name) or error.message}")
            continue
        parts.append(part)
        if name in (MANIFEST_FILE, CARD):
            # `read` checked the one; the other belongs to whoever owns the checkpoint
            continue
        if hashlib.sha256(part.content or b"").hexdigest() != digest:
            problems.append(f"{escape(name)} differs from its hash in {MANIFEST_FILE}")
    return parts, problems


def _weight_parts(
    folder: Path, written: Mapping[str, ShardRecord], problems: list[str]
) -> list[Part]:
    parts = []
    for name in sorted(written):
        try:
            parts.append(_part(folder, name, None))
        except SourceError as error:
            problems.append(f"{escape(name)} {_missing(folder / name) or error.message}")
    return parts


def _missing(path: Path) -> str | None:
    return None if os.path.lexists(path) else "is missing"


def _part(folder: Path, name: str, content: bytes | None) -> Part:
    path = folder / name
    with open_regular(path, escape(name)) as (_, status):
        return Part(
            name=name,
            path=path,
            nbytes=status.st_size if content is None else len(content),
            content=content,
            identity=_identity(status),
        )


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return (status.st_size, status.st_mtime_ns, status.st_ino)


def _weight_problems(
    weights: list[Part], written: Mapping[str, ShardRecord], whole: bool, progress: bool
) -> list[str]:
    problems: list[str] = []
    total = sum(part.nbytes for part in weights) if whole else 0
    with bar(total, "checking", enabled=progress and whole) as shown:
        for part in weights:
            try:
                problems += _shard_problems(part, written[part.name], whole)
            except SourceError as error:
                problems.append(f"{escape(part.name)} {error.message}")
            shown.update(part.nbytes)
    return problems


def _shard_problems(part: Part, record: ShardRecord, whole: bool) -> Iterator[str]:
    """Yield how a shard differs from its record; without `whole`, as far as its header tells."""
    name = escape(part.name)
    if part.nbytes != record.nbytes:
        yield f"{name} has {part.nbytes} bytes, {record.nbytes} were written"
        return
    hashes = record.tensors
    if whole:
        digest, hashes = shard_digest_of_file(part.path)
    else:
        digest = _digest_by_header(part, record)
    if digest == record.digest:
        return
    changed = sorted(key for key in record.tensors if hashes.get(key) != record.tensors[key])
    tensors = f": {listing(changed, 3)}" if changed else ""
    yield f"{name} differs from its hash in {MANIFEST_FILE}{tensors}"


def _digest_by_header(part: Part, record: ShardRecord) -> str:
    """Return the digest of a shard whose tensors are taken to be the recorded ones."""
    where = escape(part.name)
    refs = digest_order(read_header(part.path, part.name)[0].values())
    with open_regular(part.path, where) as (descriptor, _):
        length = int.from_bytes(pread_exact(descriptor, 8, 0, where), "little")
        header = pread_exact(descriptor, 8 + length, 0, where)
    return shard_digest(header, [record.tensors.get(ref.name, "") for ref in refs])


def _altered(label: str, problems: list[str]) -> VerificationError:
    more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return VerificationError(
        f"is not the checkpoint that was written: {'; '.join(problems[:_SHOWN])}{more}",
        where=label,
        hint="Restore the files, or write the checkpoint again; `adaconvert verify` names every "
        "difference.",
    )


def _check_secrets(parts: list[Part], places: tuple[bytes, ...]) -> None:
    for part in parts:
        found = faults(part.name, part.content or b"", places)
        if found:
            raise VerificationError(
                f"{' and '.join(found)}: it must not be published",
                where=escape(part.name),
                hint=_HINTS.get(
                    part.name, "Remove it from the source, and write the checkpoint again."
                ),
            )
        # a link could be turned to any file of this machine, and only the card may differ
        if part.name == CARD:
            _check_card(part)


def _check_card(part: Part) -> None:
    if stat.S_ISLNK(part.path.lstat().st_mode) and part.path.resolve().parent.name != "blobs":
        raise VerificationError("is a link", where=CARD, expected="a file of the checkpoint")
    fault = card_fault(part.content or b"")
    if fault is not None:
        raise VerificationError(
            fault,
            where=CARD,
            expected="YAML between two lines '---' at its start",
            hint="Correct it, or make it anew with `adaconvert card`.",
        )


def card_fault(content: bytes) -> str | None:
    """Return why the hub would not understand a model card, None when it would."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return "is not UTF-8 text"
    if re.match(r"---\r?\n.*?\r?\n---\r?(\n|\Z)", text, re.DOTALL) is None:
        return "has no front matter"
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    # a YAML parser and the checks of several keys, which raise what they like
    except Exception as error:
        line = str(error).split("\n", 1)[0]
        return f"has front matter that is not valid: {escape(line)}"
    return None
