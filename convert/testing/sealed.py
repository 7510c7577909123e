"""A manifest for any checkpoint folder, as if adaconvert had written it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from adaconvert.io import manifest
from adaconvert.io.card_file import MARKER
from adaconvert.io.layout import ShardRecord, shard_digest_of_file

CARD = f"---\nlibrary_name: transformers\ntags:\n- adaconvert\n---\n\n{MARKER}\n# tiny\n"


def seal(folder: Path, **changes: object) -> Path:
    """Return `folder`, which now holds a card, and a manifest that lists every file in it.

    Args:
        folder: a checkpoint.
        changes: entries of the manifest that are to differ.
    """
    (folder / manifest.MANIFEST_FILE).unlink(missing_ok=True)
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(CARD, encoding="utf-8")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    record = manifest.build(
        method="upcycle",
        options={},
        sources=[{"label": "org/dense", "revision": None, "fingerprint": "", "digest": ""}],
        plan_digest="",
        exactness={"kind": "exact", "why": "it is the same model"},
        shards={name: _record(folder, name) for name in weights},
        files={
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
            for name in names
            if name not in weights
        },
        verification={"passed": True},
    )
    (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump({**record, **changes}))
    return folder


def _record(folder: Path, name: str) -> ShardRecord:
    path = folder / name
    digest, tensors = shard_digest_of_file(path)
    return ShardRecord(file=name, nbytes=path.stat().st_size, digest=digest, tensors=tensors)
