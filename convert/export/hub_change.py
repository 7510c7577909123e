"""How a repository must change to hold a checkpoint, and nothing that would be loaded instead."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from adaconvert.errors import OutputConflictError
from adaconvert.export.hub_files import Contents, Part
from adaconvert.export.hub_remote import Blob, Hashes, Remote, is_same
from adaconvert.io.card_file import CARD, MARKER
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.io.names import listing
from adaconvert.progress import bar

_MAX_MANIFEST: Final = 256 << 20
#: files that decide what a repository loads as.
_CHECKPOINT = re.compile(r"config\.json|(pytorch_)?model[\w.-]*\.(safetensors|bin)(\.index\.json)?")
_OUR_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_NOTHING = Blob(nbytes=-1, sha256=None, git=None)
_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What makes a repository hold the checkpoint.

    Attributes:
        parts: files it is to hold.
        same: those it holds already.
        deleted: files of an earlier checkpoint to remove.
        kept: files it keeps though the folder has others, and why.
        hashes: of files here, as far as they were needed.
    """

    parts: tuple[Part, ...]
    same: tuple[Part, ...]
    deleted: tuple[str, ...]
    kept: Mapping[str, str]
    hashes: Hashes

    @property
    def todo(self) -> list[Part]:
        """Return the files to send."""
        return [part for part in self.parts if part not in self.same]

    def missing(self, tree: Mapping[str, Blob]) -> list[str]:
        """Return the files that are not in a repository as they should be."""
        wrong = [
            part.name for part in self.parts if not is_same(part, tree.get(part.name), self.hashes)
        ]
        return wrong + [name for name in self.deleted if name in tree]


def change_of(
    contents: Contents, remote: Remote, parent: str, *, proposal: bool, progress: bool
) -> Change:
    """Return how the commit `parent` must change.

    Args:
        contents: the folder's files.
        remote: the repository.
        parent: its commit.
        proposal: its owner decides whether the change is made.
        progress: show a progress bar on a terminal.

    Raises:
        OutputConflictError: it holds a checkpoint of somebody else.
    """
    there = remote.tree(parent)
    earlier = _earlier(remote, there, parent)
    if earlier is None and not proposal:
        _check_not_foreign(there, remote)
    hashes = Hashes()
    kept = _kept_card(contents, remote, there, parent, earlier)
    parts = [part for part in contents.parts if part.name not in kept]
    alike = [part for part in parts if part.nbytes == there.get(part.name, _NOTHING).nbytes]
    same = []
    with bar(sum(part.nbytes for part in alike), "comparing", enabled=progress) as shown:
        for part in alike:
            if is_same(part, there[part.name], hashes):
                same.append(part)
            shown.update(part.nbytes)
    return Change(
        parts=tuple(parts),
        same=tuple(same),
        deleted=_stale(contents, there, earlier),
        kept=kept,
        hashes=hashes,
    )


def _earlier(remote: Remote, there: Mapping[str, Blob], commit: str) -> dict[str, str] | None:
    """Return what adaconvert put into the repository before: sha256 by name; None for nothing."""
    blob = there.get(MANIFEST_FILE)
    if blob is None or blob.nbytes > _MAX_MANIFEST:
        return None
    try:
        manifest = json.loads(remote.read(MANIFEST_FILE, commit))
        files, shards = manifest["files"], manifest["shards"]
        found = {str(name): str(files[name]) for name in files}
        # the hash it was written with: a later stage may have taken an edited card along
        card = (manifest.get("card") or {}).get("sha256") or files.get(CARD, "")
        return {**found, **dict.fromkeys(shards, ""), CARD: str(card)}
    # somebody wrote something else under that name
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _check_not_foreign(there: Mapping[str, Blob], remote: Remote) -> None:
    foreign = [name for name in sorted(there) if _CHECKPOINT.fullmatch(name)]
    if foreign:
        raise OutputConflictError(
            f"holds a checkpoint adaconvert did not write ({listing(foreign, 3)})",
            where=remote.repo,
            hint="Push to another repository, or propose it there with --create-pr.",
        )


def _stale(
    contents: Contents, there: Mapping[str, Blob], earlier: Mapping[str, str] | None
) -> tuple[str, ...]:
    """Return what an earlier checkpoint left there, to be loaded beside ours or instead of it."""
    ours = {part.name for part in contents.parts}
    listed = {name for name in earlier or {} if name in there and not name.startswith(".")}
    weights = {name for name in there if _OUR_WEIGHTS.fullmatch(name)}
    return tuple(sorted((listed | weights) - ours - {CARD}))


def _kept_card(
    contents: Contents,
    remote: Remote,
    there: Mapping[str, Blob],
    commit: str,
    earlier: Mapping[str, str] | None,
) -> dict[str, str]:
    """Return the card and why the one at the hub is to stay: somebody edited it there.

    A card that was edited here goes there all the same: its owner pushes it.
    """
    card = next(part for part in contents.parts if part.name == CARD)
    blob = there.get(CARD)
    if blob is None or contents.edited_card or is_same(card, blob, Hashes()):
        return {}
    content = remote.read(CARD, commit)
    written = (earlier or {}).get(CARD)
    if MARKER.encode() in content and hashlib.sha256(content).hexdigest() == written:
        return {}
    # what a hub makes for a new repository holds a license and no word
    text = _FRONT_MATTER.sub("", content.decode("utf-8", "replace"))
    return {CARD: "was edited at the hub, where it is kept"} if text.strip() else {}
