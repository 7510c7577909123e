"""The destination: the last checkpoint of a run under its own name, with the recipe beside it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final, cast

from adaconvert.errors import AdaconvertError
from adaconvert.io import manifest
from adaconvert.io.card_file import CARD, FIGURES, RECIPE
from adaconvert.io.commit import Staging
from adaconvert.io.destination import Destination
from adaconvert.io.rewrite import rewrite
from adaconvert.running.state import State

#: entries of a manifest that tell of a checkpoint and do not change it.
_SAID: Final = ("card", "quality")
#: files that do.
_TOLD: Final = (CARD, RECIPE, *FIGURES)


def place(folder: Path, destination: Path, recipe: str, *, overwrite: bool) -> None:
    """Return once `destination` holds the checkpoint of a stage and the recipe it came by.

    Weights are given a second name where the disk can do so, and copied otherwise; the stage's
    folder stays for the next run.

    Args:
        folder: of the stage.
        destination: folder to write.
        recipe: content of the recipe file.
        overwrite: replace an earlier output of adaconvert.

    Raises:
        OutputConflictError: the destination is taken.
        VerificationError: the stage's folder has no manifest, or was edited.
        ResourceError: the disk is full or broken.
    """
    record = manifest.read(folder)
    shards = manifest.records(record)
    listed = cast("dict[str, str]", record["files"])
    with Staging.open(
        destination,
        sources=[folder],
        overwrite=overwrite,
        plan_digest=str(record["plan_digest"]),
        needed_bytes=0,
    ) as staging:
        for shard in shards.values():
            staging.adopt(shard, folder / shard.file, link=True)
        for name in sorted(listed):
            if name != RECIPE:
                staging.copy_file(name, folder / name)
        staging.write_file(RECIPE, recipe.encode("ascii"))
        new = {**record, "files": dict(staging.files)}
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(new))
        staging.commit()


def renew(destination: Path, recipe: str) -> None:
    """Return once a destination that holds the result of a stage has another recipe beside it.

    What was recorded there stays, and so does a card that was edited.

    Raises:
        OutputConflictError: it holds files adaconvert did not write.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    rewrite(destination, manifest.read(destination), {RECIPE: recipe.encode("ascii")})


def is_placed(folder: Path, destination: Path, recipe: str, state: State) -> bool:
    """Return whether the destination is what `place` left, with the card made since."""
    if not is_untouched(folder, destination, state):
        return False
    files = cast("dict[str, str]", manifest.read(destination)["files"])
    return files.get(RECIPE) == hashlib.sha256(recipe.encode("ascii")).hexdigest()


def is_untouched(folder: Path, destination: Path, state: State) -> bool:
    """Return whether the destination is what a run left of a stage's folder, by any recipe."""
    return digest_of(destination) == state.placed and holds(folder, destination)


def holds(folder: Path, destination: Path) -> bool:
    """Return whether the destination is the checkpoint of a stage's folder, whatever was recorded
    of it since."""
    found, made = _read(destination), _read(folder)
    if found is None or made is None:
        return False
    return _facts(found) == _facts(made) and _has_all(destination, found)


def _facts(record: dict[str, object]) -> dict[str, object]:
    """Return what of a manifest decides the checkpoint: not its card with figures, its recipe and
    results."""
    kept = {name: value for name, value in record.items() if name not in _SAID}
    files = cast("dict[str, str]", record["files"])
    kept["files"] = {name: digest for name, digest in files.items() if name not in _TOLD}
    return manifest.seal(kept)


def is_ours(destination: Path, state: State) -> bool:
    """Return whether this run, or an earlier one in the same work folder, wrote the destination."""
    found = _read(destination)
    if found is None:
        return False
    if state.placed and digest_of(destination) == state.placed:
        return True
    # a run that was killed before it could record what it placed
    stages = (entry.get("folder") for entry in state.stages.values())
    made = [_read(state.folder / str(name)) for name in stages if name]
    return RECIPE in cast("dict[str, str]", found["files"]) and any(
        other is not None and other["shards"] == found["shards"] for other in made
    )


def check(destination: Path, state: State, *, overwrite: bool) -> None:
    """Return only when the result may be put there.

    Raises:
        OutputConflictError: the destination is taken.
    """
    target = Destination.resolve(destination)
    target.check_free(overwrite=overwrite or is_ours(destination, state))


def digest_of(folder: Path) -> str:
    """Return the sha256 of a folder's manifest, '' when there is none."""
    try:
        return hashlib.sha256((folder / manifest.MANIFEST_FILE).read_bytes()).hexdigest()
    except OSError:
        return ""


def _has_all(folder: Path, record: dict[str, object]) -> bool:
    shards = manifest.records(record).values()
    return all(os.path.lexists(folder / shard.file) for shard in shards)


def _read(folder: Path) -> dict[str, object] | None:
    try:
        return manifest.read(folder)
    except AdaconvertError:
        return None
