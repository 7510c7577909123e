"""A checkpoint folder, opened: every promise the rest of the package relies on has been checked.

No weight is read and nothing is written. Everything taken from files is escaped before it is shown.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.header import ShardHeader, read_shard_header
from adaconvert.io.hub import resolve
from adaconvert.io.index import INDEX_FILE, Index
from adaconvert.io.names import escape, listing
from adaconvert.io.source_config import CONFIG_FILE, SourceConfig, read_config
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.io.weight_files import check_against_index, find_weights

_WRAPPERS = {
    "base_model.model.": "a peft model saved unmerged: call merge_and_unload, then save_pretrained",
    "module.": "a model saved inside DataParallel or DDP: save model.module instead",
    "_orig_mod.": "a model saved inside torch.compile: save model._orig_mod instead",
}
_PACKED = (".qweight", ".qzeros", ".weight_packed", ".SCB", ".absmax", ".quant_map")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A checkpoint that has been opened for reading.

    Attributes:
        root: its folder.
        label: hub id or folder name; never a path, so outputs may carry it.
        revision: commit of the hub, None for a plain folder.
        config: config.json without keys that load code or tell secrets.
        raw_config: config.json as read.
        tensors: every tensor by name, ordered by shard and offset.
        files: the shards, sorted.
        shards: header and file identity of every shard, in the order of `files`.
        unindexed: stored tensors left out because the index does not name them.
        notes: what the user should know.
        fingerprint: sha256 over config, shard names, sizes and header digests; no weight enters it.
        side_files: every other regular file at the top level.
    """

    root: Path
    label: str
    revision: str | None
    config: dict[str, object] = field(repr=False)
    raw_config: dict[str, object] = field(repr=False)
    tensors: dict[str, TensorRef] = field(repr=False)
    files: tuple[str, ...]
    shards: tuple[ShardHeader, ...] = field(repr=False)
    unindexed: tuple[str, ...]
    notes: tuple[str, ...]
    fingerprint: str
    side_files: tuple[str, ...]

    @staticmethod
    def open(
        where: str | Path, *, revision: str | None = None, ignore_unindexed: bool = False
    ) -> Source:
        """Return the checkpoint at `where`, a folder or a hub id, after checking it as a whole.

        Args:
            where: folder, snapshot folder of the hub cache, or hub id.
            revision: branch, tag or commit of a hub id.
            ignore_unindexed: leave tensors out that the index does not name, instead of refusing.

        Raises:
            SourceError: the checkpoint is damaged, incomplete, quantised or of another kind.
            OptionError: `where` or `revision` is not of the right form.
            ResourceError: a file may not be read, or the hub cannot be reached.
        """
        root, label, commit = resolve(where, revision)
        names = _entries(root, label)
        weights = find_weights(root, names)
        config = read_config(root)
        shards = tuple(read_shard_header(root / file, file) for file in weights.files)
        _check_single_owner(shards)
        unindexed = _unindexed(weights.index, shards, ignore_unindexed)
        tensors = _merge(shards, frozenset(unindexed))
        _check_names(tensors)
        side_files, other = _side_files(root, names, weights.files)
        notes = _notes(config, weights.notes, tensors, weights.index, unindexed, other)
        if commit is not None and revision is None and str(where) == label:
            notes = (f"no revision given, commit {commit} is used; pin it with --revision", *notes)
        return Source(
            root=root,
            label=label,
            revision=commit,
            config=config.clean,
            raw_config=config.raw,
            tensors=tensors,
            files=weights.files,
            shards=shards,
            unindexed=unindexed,
            notes=notes,
            fingerprint=_fingerprint(config.raw, shards),
            side_files=side_files,
        )

    def path(self, relative: str) -> Path:
        """Return where the file `relative` of this checkpoint lies."""
        return self.root / relative

    def assert_unchanged(self) -> None:
        """Return only when every shard is still the file that was opened.

        Raises:
            SourceError: one was replaced, rewritten or removed.
        """
        for shard in self.shards:
            try:
                status = os.stat(self.path(shard.file))
            except OSError as error:
                raise changed(shard.file, "no such file any more") from error
            check_identity(shard, status)


def check_identity(shard: ShardHeader, status: os.stat_result) -> None:
    """Return only when `status` is that of the file whose header was read.

    Raises:
        SourceError: size, modification time or inode differ.
    """
    was = (shard.size, shard.mtime_ns, shard.inode, shard.device)
    now = (status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
    names = ("size", "modification time", "inode", "device")
    different = [name for name, a, b in zip(names, was, now, strict=True) if a != b]
    if different:
        raise changed(shard.file, f"another {' and '.join(different)}")


def changed(file: str, found: str) -> SourceError:
    """Return the error for a source that somebody writes to while we read."""
    return SourceError(
        "source changed while reading",
        where=escape(file),
        found=found,
        hint="Stop whatever writes to the source folder and run again.",
    )


def _entries(root: Path, label: str) -> list[str]:
    try:
        names = sorted(os.listdir(root))
    except OSError as error:
        reason = error.strerror or "unknown error"
        raise ResourceError(f"folder cannot be listed: {reason}", where=escape(label)) from error
    if not names:
        raise SourceError("the folder is empty", where=escape(label))
    return names


def _check_single_owner(shards: Sequence[ShardHeader]) -> None:
    owner: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in owner:
                raise SourceError(
                    f"tensor '{escape(name)}' is also in {escape(owner[name])}",
                    where=escape(shard.file),
                    hint="Remove the shard that is left over, or fetch the checkpoint again.",
                )
            owner[name] = shard.file


def _unindexed(
    index: Index | None, shards: Sequence[ShardHeader], ignore_unindexed: bool
) -> tuple[str, ...]:
    if index is None:
        return ()
    by_file = {shard.file: shard.tensors for shard in shards}
    return check_against_index(index, by_file, ignore_unindexed)


def _merge(shards: Sequence[ShardHeader], without: frozenset[str]) -> dict[str, TensorRef]:
    return {
        name: ref
        for shard in sorted(shards, key=lambda shard: shard.file)
        for name, ref in shard.tensors.items()
        if name not in without
    }


def _check_names(tensors: Mapping[str, TensorRef]) -> None:
    for name, ref in tensors.items():
        here = f"{escape(ref.file)}: tensor '{escape(name)}'"
        for prefix, reason in _WRAPPERS.items():
            if name.startswith(prefix):
                raise SourceError(f"name starts with '{prefix}', as in {reason}", where=here)
        if name.endswith(_PACKED):
            hint = "Dequantise it first, or start from the original float checkpoint."
            raise SourceError(
                "the checkpoint is quantised, as this name shows", where=here, hint=hint
            )


def _side_files(
    root: Path, names: Sequence[str], files: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the regular files that are no shard, index or config, and the entries left out."""
    taken = {*files, INDEX_FILE, CONFIG_FILE}
    rest = [name for name in names if name not in taken]
    side = tuple(name for name in rest if os.path.isfile(root / name))
    skip = {*side, *(file.split("/")[0] for file in files)}
    other = tuple(name for name in rest if name not in skip and not name.startswith("."))
    return side, other


def _notes(
    config: SourceConfig,
    found: Sequence[str],
    tensors: Mapping[str, TensorRef],
    index: Index | None,
    unindexed: Sequence[str],
    other: Sequence[str],
) -> tuple[str, ...]:
    notes = [*config.notes, *found]
    total = sum(ref.nbytes for ref in tensors.values())
    if index is not None and index.total_size not in (None, total):
        notes.append(
            f"{INDEX_FILE}: total_size is {index.total_size}, the tensors hold {total} bytes"
        )
    if unindexed:
        notes.append(f"left out tensors the index lacks: {listing(list(unindexed))}")
    if other:
        notes.append(f"ignored folders and special files: {listing(list(other))}")
    return tuple(notes)


def _fingerprint(config: dict[str, object], shards: Sequence[ShardHeader]) -> str:
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for shard in shards:
        digest.update(json.dumps([shard.file, shard.size, shard.sha256]).encode())
    return digest.hexdigest()
