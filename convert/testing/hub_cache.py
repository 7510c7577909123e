"""A Hugging Face hub cache built by hand: blobs, and snapshots whose files are links into them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def build_hub_cache(
    cache: Path,
    repo_id: str,
    checkpoint: Path,
    *,
    commit: str = COMMIT,
    ref: str = "main",
    leave_out: Iterable[str] = (),
) -> Path:
    """Return the snapshot folder of `repo_id` in `cache`, with the files of `checkpoint` as links.

    The list of the repository's files is there too, as huggingface_hub 2 keeps it.

    Args:
        cache: the folder HF_HUB_CACHE would name.
        repo_id: "org/name".
        checkpoint: folder whose files become blobs.
        commit: name of the snapshot.
        ref: branch that points at it.
        leave_out: files, by path inside `checkpoint`, whose download is to look interrupted.
    """
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    blobs = repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / ref).write_text(commit, encoding="utf-8")
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    _write_tree(repository / "trees" / f"{commit}.json", checkpoint, files)
    for file in files:
        relative = file.relative_to(checkpoint)
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        if str(relative) in set(leave_out):
            blob.with_name(f"{blob.name}.incomplete").write_bytes(file.read_bytes()[:10])
            continue
        blob.write_bytes(file.read_bytes())
        link = snapshot / relative
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "/".join([".."] * (len(relative.parts) + 1))
        link.symlink_to(f"{up}/blobs/{blob.name}")
    return snapshot


def _write_tree(path: Path, checkpoint: Path, files: Iterable[Path]) -> None:
    entries = {
        str(file.relative_to(checkpoint)): {"size": file.stat().st_size, "blob_id": "0" * 40}
        for file in files
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format_version": 1, "files": entries}), encoding="utf-8")
