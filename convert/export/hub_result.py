"""What `push` did, or would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adaconvert.io.names import escape
from adaconvert.units import human_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What is at the hub now; with `dry_run`, what would be sent.

    Attributes:
        url: page of the repository, its branch or the pull request.
        commit: what holds the checkpoint; None in a dry run.
        files: name and size of every file of the checkpoint.
        skipped: names of the files that were there already.
        left_out: entries of the folder that are not published, and why.
        deleted: files of an earlier checkpoint that were removed from the repository.
        private: whether only its owner sees the repository; None when that is not known.
        dry_run: nothing was sent.
        notes: what the user should know.
    """

    url: str
    commit: str | None
    files: tuple[tuple[str, int], ...]
    skipped: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    deleted: tuple[str, ...] = ()
    private: bool | None = None
    dry_run: bool = False
    notes: tuple[str, ...] = ()

    @property
    def sent(self) -> tuple[tuple[str, int], ...]:
        """Return name and size of the files that were not there before."""
        return tuple(item for item in self.files if item[0] not in self.skipped)

    def to_json(self) -> dict[str, object]:
        """Return the result as plain data."""
        return {
            "url": self.url,
            "commit": self.commit,
            "dry_run": self.dry_run,
            "private": self.private,
            "files": [{"name": name, "bytes": nbytes} for name, nbytes in self.files],
            "skipped": list(self.skipped),
            "left_out": [{"name": name, "reason": why} for name, why in self.left_out.items()],
            "deleted": list(self.deleted),
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Return the text a person reads; the URL comes last."""
        found = self._files() if self.dry_run else self._done()
        found += [f"left out: {escape(name)}: {why}" for name, why in self.left_out.items()]
        found += [f"removed there: {escape(name)}" for name in self.deleted]
        found += [f"note: {note}" for note in self.notes]
        return [*found, f"would go to {self.url}" if self.dry_run else self.url]

    def _files(self) -> list[str]:
        width = max((len(escape(name)) for name, _ in self.files), default=0)
        rows = [f"{escape(name):{width}}  {human_bytes(size):>12}" for name, size in self.files]
        total = human_bytes(sum(size for _, size in self.files))
        return [*rows, f"{len(self.files)} files, {total}; dry run: nothing was sent"]

    def _done(self) -> list[str]:
        sent = self.sent
        size = human_bytes(sum(nbytes for _, nbytes in sent))
        there = f"{len(self.skipped)} there already"
        what = f"{len(sent)} files sent, {size}; {there}" if sent else f"nothing to send: {there}"
        seen = {True: ", private", False: ", public", None: ""}[self.private]
        return [what, f"commit {self.commit}{seen}"]
