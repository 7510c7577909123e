"""Making the card of a finished output again; one that its owner edited is left alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.export.card import card_files, with_card
from adaconvert.export.card_facts import recovered_facts
from adaconvert.io import manifest
from adaconvert.io.card_file import CARD, FIGURES, is_edited
from adaconvert.io.fs import FileSystem
from adaconvert.io.names import escape
from adaconvert.io.rewrite import rewrite


@dataclass(frozen=True, slots=True, kw_only=True)
class CardResult:
    """What became of a card.

    Attributes:
        folder: the output.
        written: its files changed.
        edited: its owner had edited it.
    """

    folder: Path
    written: bool
    edited: bool

    def to_json(self) -> dict[str, object]:
        """Return JSON values only."""
        return {"folder": self.folder.name, "written": self.written, "edited": self.edited}

    def lines(self) -> list[str]:
        """Return the text a person reads."""
        where = f"{self.folder}/{CARD}"
        if self.written:
            return [f"wrote {where}"]
        if self.edited:
            return [
                f"{where} was edited since adaconvert wrote it, and stays as it is",
                "note: --overwrite writes it anew",
            ]
        return [f"{where} is up to date"]


def renew_card(
    folder: Path, *, overwrite: bool = False, fs: FileSystem | None = None
) -> CardResult:
    """Return once an output has the card that its manifest and config.json tell.

    Args:
        folder: an output of adaconvert, of any version.
        overwrite: also write a card anew that was edited.
        fs: every call that changes the disk.

    Raises:
        OptionError: it is no folder.
        VerificationError: its manifest is missing, damaged or was edited.
        SourceError: its config.json is damaged.
        OutputConflictError: it holds files adaconvert did not write.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    if not folder.is_dir():
        raise OptionError(
            "is no folder", where=escape(str(folder)), hint="Name a folder adaconvert wrote."
        )
    record = manifest.read(folder)
    edited = is_edited(folder, record)
    if edited and not overwrite:
        return CardResult(folder=folder, written=False, edited=True)
    return CardResult(folder=folder, written=update(folder, record, record, fs=fs), edited=edited)


def update(
    folder: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    *,
    keep: bool = False,
    fs: FileSystem | None = None,
) -> bool:
    """Return whether the folder had to change to hold a manifest and the card it tells.

    Args:
        folder: an output.
        old: content of its adaconvert.json.
        new: the same as it shall be, files apart.
        keep: leave the card as it is, edited.
        fs: every call that changes the disk.

    Raises:
        OutputConflictError: the folder holds files adaconvert did not write.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    facts = new.get("card")
    told = {**new, "card": facts if isinstance(facts, dict) else recovered_facts(folder)}
    files = card_files(folder, told)
    sha256 = hashlib.sha256(files[CARD]).hexdigest()
    if keep:
        del files[CARD]
    removed = set(FIGURES) - set(files)
    record = with_card(told, old["files"], sha256)
    listed = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    expected = {name: h for name, h in old["files"].items() if name not in removed} | listed
    if {**record, "files": expected} == dict(old) and _on_disk(folder, files):
        return False
    rewrite(folder, record, files, removed=removed, fs=fs)
    return True


def _on_disk(folder: Path, files: Mapping[str, bytes]) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).read_bytes() == data
        for name, data in files.items()
    )
