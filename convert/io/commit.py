"""Outputs appear whole or not at all: they grow in a staging folder and are renamed into place.

The staging folder lies beside the destination:

    .<name>.adaconvert-partial/lock           process and host that hold it
    .<name>.adaconvert-partial/journal.jsonl  the plan, then a line per finished shard
    .<name>.adaconvert-partial/checkpoint/    what becomes <name>
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from adaconvert.errors import InterruptedRunError, OutputConflictError, SourceError
from adaconvert.io.claim import Claim, already_committed, claim
from adaconvert.io.copying import Copier, Gatherer, Span
from adaconvert.io.deferral import awaited, signals_deferred
from adaconvert.io.destination import remove_parents
from adaconvert.io.digest import hash_tensors
from adaconvert.io.fs import FileSystem, reporting, resource_error
from adaconvert.io.journal import CHECKPOINT_FOLDER, JOURNAL_FILE
from adaconvert.io.layout import ShardLayout, ShardRecord, digest_order, shard_digest
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.io.names import escape
from adaconvert.io.regular import open_regular
from adaconvert.io.writer import Digests, ShardWriter
from adaconvert.units import human_bytes

__all__ = ["Staging", "already_committed"]

logger = logging.getLogger(__name__)


class Staging:
    """An output that is being written; leaving the `with` block before `commit` undoes it.

    Attributes:
        path: folder of the growing checkpoint.
        files: sha256 of every file but the shards, by name.
        resumed: an interrupted run of the same plan finished some shards.
        kept_elsewhere: what an interrupted run has kept outside, None for nothing.
    """

    def __init__(
        self, fs: FileSystem, held: Claim, *, overwrite: bool, updating: bool, needed: int
    ) -> None:
        self.path = held.lock.folder / CHECKPOINT_FOLDER
        self.files: dict[str, str] = {}
        self.resumed = bool(held.journal.records)
        self.kept_elsewhere: Callable[[], str | None] = lambda: None
        self._fs = fs
        self._destination = held.destination
        self._lock = held.lock
        self._journal = held.journal
        self._made = held.made
        self._overwrite = overwrite
        self._updating = updating
        self._needed = needed
        self._records: dict[str, ShardRecord] = {}
        self._copier = Copier(fs)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="adaconvert-sync")
        self._pending: Future[ShardRecord] | None = None
        self._committed = False
        self._open = True

    @classmethod
    def open(
        cls,
        dst: str | Path,
        *,
        sources: Iterable[Path],
        plan_digest: str,
        overwrite: bool = False,
        resume: bool = False,
        needed_bytes: int = 0,
        facts: Mapping[str, object] | None = None,
        fs: FileSystem | None = None,
        updating: bool = False,
    ) -> Staging:
        """Return a staging folder for `dst` that this process holds, after every cheap check.

        Args:
            dst: folder the output will be; it may exist if it is empty.
            sources: folders that are read.
            plan_digest: a run is resumed only under the same plan.
            overwrite: an earlier output of adaconvert may be replaced.
            resume: shards an interrupted run finished are kept.
            needed_bytes: size of the output, 0 when unknown.
            facts: what the plan depends on, named when a resumed run differs.
            fs: the disk.
            updating: see `Destination.check_free`.

        Raises:
            OutputConflictError: the destination is taken, overlaps a source or is in use.
            ResourceError: it cannot be written, or the disk is too small.
        """
        fs = FileSystem() if fs is None else fs
        held = claim(
            fs,
            dst,
            sources=sources,
            plan_digest=plan_digest,
            overwrite=overwrite,
            resume=resume,
            needed_bytes=needed_bytes,
            facts=facts or {},
            updating=updating,
        )
        return cls(fs, held, overwrite=overwrite, updating=updating, needed=needed_bytes)

    def completed_shards(self, layouts: Sequence[ShardLayout]) -> dict[str, ShardRecord]:
        """Return the shards an interrupted run finished whose bytes still have their hash.

        Raises:
            ResourceError: a shard cannot be read.
        """
        for layout in layouts:
            record = self._journal.records.get(layout.file)
            if record is not None and self._is_intact(layout, record):
                self._records[layout.file] = record
        if self.resumed:
            logger.info("resuming: %d of %d shards are complete", len(self._records), len(layouts))
        return dict(self._records)

    def shard(self, layout: ShardLayout) -> ShardWriter:
        """Return the writer of one shard; enter it to create the file.

        Raises:
            AdaconvertError: the shard before this one could not be synced.
        """
        self._check_not_sealed(layout.file)
        return ShardWriter(self._fs, self.path, layout, self._copier, self._seal)

    def adopt(self, record: ShardRecord, source: Path, *, link: bool) -> None:
        """Take a shard of an earlier output over as it is: a second name of it, or a copy.

        Args:
            record: what its manifest says of it.
            source: where it lies, a regular file.
            link: give it a second name where the disk can; only for a source that is replaced.

        Raises:
            SourceError: it is missing, no regular file, or not of the recorded size.
            ResourceError: the disk is full or broken.
        """
        self._check_not_sealed(record.file)
        shown = escape(record.file)
        with open_regular(source, shown) as (src, status):
            if status.st_size != record.nbytes:
                raise SourceError(
                    f"is not the shard {MANIFEST_FILE} lists",
                    where=shown,
                    expected=f"{record.nbytes} bytes",
                    found=f"{status.st_size} bytes",
                )
            path = self.path / record.file
            with self._reporting(shown, record.nbytes):
                if link and not source.is_symlink() and self._fs.link(source, path):
                    self._records[record.file] = record
                    return
            with self._side_file(record.file, record.nbytes) as fd:
                self._copier.copy(fd, 0, [(src, 0, record.nbytes)], where=shown)
        self._records[record.file] = record

    def records(self) -> dict[str, ShardRecord]:
        """Return every complete shard by file, after waiting for the last one to be synced.

        Raises:
            AdaconvertError: a shard could not be synced, or a hash it waits for could not be had.
        """
        self._drain()
        return {file: self._records[file] for file in sorted(self._records)}

    def write_file(self, name: str, data: bytes) -> str:
        """Write and sync one small file and return its sha256; adaconvert.json comes last.

        Raises:
            ResourceError: the disk is full or broken.
        """
        with self._side_file(name, len(data)) as fd:
            self._fs.write_at(fd, data, 0)
        self.files[name] = hashlib.sha256(data).hexdigest()
        return self.files[name]

    def copy_file(self, name: str, source: Path) -> str:
        """Copy a regular file byte for byte, links followed, sync it and return its sha256.

        Raises:
            SourceError: it is missing, no regular file, or changes while it is read.
            ResourceError: the disk is full or broken.
        """
        with open_regular(source, escape(source.name)) as (src, status):
            size = status.st_size
            with self._side_file(name, size) as fd:
                self._copier.copy(fd, 0, [(src, 0, size)], where=escape(source.name))
                whole = Span(fd, 0, size)
                hasher = hashlib.sha256()
                for chunk in Gatherer().chunks([whole]):
                    hasher.update(chunk)
        self.files[name] = hasher.hexdigest()
        return self.files[name]

    def commit(self) -> None:
        """Make the output appear under its name, complete, synced and alone.

        Raises:
            OutputConflictError: something else appeared there meanwhile.
            ResourceError: the disk is full or broken; what was there before is untouched.
        """
        self._drain()
        self._check_contents()
        with self._reporting(self._destination.given):
            self._fs.fsync_dir(self.path)
            with signals_deferred():
                self._move_in()
                self._committed = True
            self._fs.fsync_dir(self._destination.path.parent)
            for folder in reversed(self._made):
                self._fs.fsync_dir(folder.parent)
        self._remove_old()
        self._close(remove=True)

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._open:
            return
        with suppress(Exception):
            self._drain()
        # a signal that interrupted waiting for a shard has not stopped the worker: it counts too.
        self._worker.shutdown(wait=True)
        stopped = error is not None and not isinstance(error, Exception)
        stopped = stopped or isinstance(error, InterruptedRunError)
        keep = stopped and not self._committed and bool(self._journal.records)
        self._close(remove=not keep)
        if not self._committed and not keep:
            remove_parents(self._fs, self._made)
        hint = self._resume_hint(keep)
        if isinstance(error, InterruptedRunError):
            error.hint = error.hint or hint
            error.args = (error.describe(),)
        elif isinstance(error, KeyboardInterrupt):
            raise InterruptedRunError("interrupted", hint=hint) from error
        elif isinstance(error, OSError):
            raise resource_error(error, self._destination.given, needed=self._needed) from error

    def _resume_hint(self, kept: bool) -> str:
        if self._committed:
            return f"{self._destination.given} is complete."
        if not kept:
            return self.kept_elsewhere() or "Nothing was complete, so nothing was kept."
        count = len(self._journal.records)
        shards = "1 complete shard is" if count == 1 else f"{count} complete shards are"
        return f"{shards} kept: run the same command with --resume to go on from there."

    def _seal(self, writer: ShardWriter, digests: Digests) -> None:
        # one shard is synced while the next is written: disk and copying overlap, and no more than
        # two shards are ever open.
        self._drain()
        # a signal in the middle of starting the thread would leave one that nobody waits for
        with signals_deferred():
            self._pending = self._worker.submit(self._complete, writer, digests)
            writer.finished = True

    def _complete(self, writer: ShardWriter, digests: Digests) -> ShardRecord:
        record = writer.complete(digests)
        with self._reporting(JOURNAL_FILE):
            self._journal.append(record)
        return record

    def _drain(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            record = awaited(pending)
            self._records[record.file] = record
            logger.info("%s: %s written", record.file, human_bytes(record.nbytes))

    def _is_intact(self, layout: ShardLayout, record: ShardRecord) -> bool:
        path = self.path / layout.file
        try:
            with open_regular(path, escape(layout.file)) as (fd, status):
                if status.st_size != layout.nbytes:
                    return False
                if os.pread(fd, len(layout.header), 0) != layout.header:
                    return False
                digests = hash_tensors(
                    fd, digest_order(layout.tensors), threads=2, where=layout.file
                )
        except SourceError:
            return False
        digest = shard_digest(layout.header, digests.values())
        return digest == record.digest and digests == record.tensors

    @contextmanager
    def _side_file(self, name: str, nbytes: int) -> Iterator[int]:
        self._check_not_sealed(name)
        if Path(name).name != name or name in {"", ".", ".."}:
            raise ValueError(f"{name!r} is not the name of a file")
        path = self.path / name
        with self._reporting(escape(name), nbytes):
            if os.path.lexists(path):
                self._fs.unlink(path)
            fd = self._fs.create(path)
            try:
                yield fd
                self._fs.fsync(fd)
            finally:
                self._fs.close(fd)

    def _check_not_sealed(self, name: str) -> None:
        if MANIFEST_FILE in self.files and name != MANIFEST_FILE:
            raise ValueError(f"{name} comes after {MANIFEST_FILE}, which must be last")

    def _check_contents(self) -> None:
        expected = {*self._records, *self.files}
        found = set(os.listdir(self.path))
        if MANIFEST_FILE not in expected or found != expected:
            odd = sorted(found ^ expected) or [MANIFEST_FILE]
            raise ValueError(f"staging folder and records differ: {odd}")

    def _move_in(self) -> None:
        target = self._destination
        if target.occupied():
            target.check_free(overwrite=self._overwrite, updating=self._updating)
            self._fs.rename(target.path, target.old)
            try:
                self._fs.rename(self.path, target.path)
            except BaseException:
                self._fs.rename(target.old, target.path)
                raise
            return
        try:
            self._fs.rename(self.path, target.path)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            raise OutputConflictError(
                "appeared while the output was being written",
                where=target.given,
                hint="Choose another destination.",
            ) from error

    def _remove_old(self) -> None:
        if os.path.lexists(self._destination.old):
            try:
                self._fs.remove_tree(self._destination.old, first=MANIFEST_FILE)
            except OSError as error:
                logger.warning("the replaced output could not be removed: %s", error.strerror)

    def _close(self, *, remove: bool) -> None:
        self._open = False
        self._worker.shutdown(wait=True)
        self._journal.close()
        try:
            self._lock.release(remove=remove)
        except OSError as error:
            name = escape(self._lock.folder.name)
            logger.warning("%s could not be removed: %s", name, error.strerror)

    def _reporting(self, where: str, nbytes: int | None = None) -> AbstractContextManager[None]:
        return reporting(where, folder=self._lock.folder, needed=nbytes or self._needed or None)
