"""Small files of a finished output change together with its manifest, or not at all.

Weights are neither read nor copied where the disk can give a file a second name: the new folder
holds links to the old one's shards until it takes its place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from adaconvert.io import manifest
from adaconvert.io.commit import Staging
from adaconvert.io.destination import Destination
from adaconvert.io.fs import FileSystem


def check_updatable(folder: Path) -> None:
    """Return only when an output may be updated in place; before anything long begins.

    Raises:
        OutputConflictError: adaconvert did not write it, or not all that lies in it.
    """
    Destination.resolve(folder.resolve()).check_free(overwrite=True, updating=True)


def rewrite(
    folder: Path,
    record: Mapping[str, object],
    changed: Mapping[str, bytes],
    *,
    removed: Collection[str] = (),
    fs: FileSystem | None = None,
) -> None:
    """Return once an output holds other small files, and a manifest that lists them.

    Args:
        folder: the output.
        record: content of its adaconvert.json as it shall be; files are listed anew.
        changed: files that are new or other than before, by name.
        removed: files that go.
        fs: every call that changes the disk.

    Raises:
        OutputConflictError: the folder holds files adaconvert did not write, or is in use.
        SourceError: a file is missing or changes meanwhile.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    target = folder.resolve()
    listed = record["files"]
    names = sorted(listed) if isinstance(listed, dict) else []
    with Staging.open(
        target,
        sources=[],
        overwrite=True,
        updating=True,
        plan_digest=str(record["plan_digest"]),
        fs=fs,
    ) as staging:
        for shard in manifest.records(record).values():
            staging.adopt(shard, target / shard.file, link=True)
        for name in names:
            if name not in changed and name not in removed:
                staging.copy_file(name, target / name)
        for name, data in changed.items():
            staging.write_file(name, data)
        new = {**record, "files": dict(staging.files)}
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(new))
        staging.commit()
