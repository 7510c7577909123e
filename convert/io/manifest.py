"""`adaconvert.json`: where a checkpoint came from and the hash of everything in it.

The text is canonical (sorted keys, two spaces, ASCII, one final newline) and holds the sha256 of
itself without that entry, so any edit is noticed. No times, no paths of this machine.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, cast

from adaconvert import __version__
from adaconvert.errors import AdaconvertError, OptionError, VerificationError
from adaconvert.io.digest import digest_of_digests
from adaconvert.io.layout import ShardRecord
from adaconvert.io.names import escape

MANIFEST_FILE: Final = "adaconvert.json"
FORMAT: Final = 1
MAX_BYTES: Final = 256 << 20

_SELF: Final = "self_sha256"
_MOST_STAGES: Final = 64
_SHAPE: Final[dict[str, tuple[type, ...]]] = {
    "adaconvert": (str,),
    "dropped": (list,),
    "exactness": (dict,),
    "files": (dict,),
    "format": (int,),
    "method": (str,),
    "notes": (list,),
    "options": (dict,),
    "plan_digest": (str,),
    "shards": (dict,),
    "sources": (list,),
    "verification": (dict, type(None)),
    "versions": (dict,),
}


def build(
    *,
    method: str,
    options: Mapping[str, object],
    sources: Sequence[Mapping[str, object]],
    plan_digest: str,
    exactness: Mapping[str, object],
    shards: Mapping[str, ShardRecord],
    files: Mapping[str, str],
    dropped: Sequence[Mapping[str, object]] = (),
    notes: Sequence[str] = (),
    versions: Mapping[str, str] | None = None,
    verification: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return the manifest of an output, complete but for its own hash, which `seal` adds.

    Args:
        method: registered name.
        options: as resolved, JSON values only.
        sources: per source "label", "revision", "fingerprint" and "digest" (over its tensors).
        plan_digest: digest of the plan.
        exactness: "kind" and "why" of the promise.
        shards: what was written, by file.
        files: sha256 of every other file, by name.
        dropped: per source tensor not used "source", "tensor" and "reason".
        notes: what the user was told.
        versions: of the packages the result depends on.
        verification: the report, None when it was skipped.
    """
    return {
        "adaconvert": __version__,
        "dropped": [dict(drop) for drop in dropped],
        "exactness": dict(exactness),
        "files": dict(files),
        "format": FORMAT,
        "method": method,
        "notes": list(notes),
        "options": dict(options),
        "plan_digest": plan_digest,
        "shards": {file: _shard(record) for file, record in shards.items()},
        "sources": [dict(source) for source in sources],
        "verification": None if verification is None else dict(verification),
        "versions": dict(versions or {}),
    }


def _shard(record: ShardRecord) -> dict[str, object]:
    return {"bytes": record.nbytes, "digest": record.digest, "tensors": dict(record.tensors)}


def seal(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return the manifest with the hash of its own contents."""
    body = {key: value for key, value in manifest.items() if key != _SELF}
    return {**body, _SELF: hashlib.sha256(_canonical(body)).hexdigest()}


def dump(manifest: Mapping[str, object]) -> bytes:
    """Return the bytes of adaconvert.json, sealed."""
    return _canonical(seal(manifest))


def _canonical(value: Mapping[str, object]) -> bytes:
    text = json.dumps(value, sort_keys=True, indent=2, allow_nan=False)
    return (text + "\n").encode("ascii")


def read(folder: Path) -> dict[str, object]:
    """Return the manifest of an output folder.

    Raises:
        VerificationError: it is missing, damaged or was edited.
        OptionError: a newer adaconvert wrote it.
    """
    raw = _raw(folder)
    manifest = _parse(raw)
    if manifest is None:
        raise _error("is damaged", hint="Convert again; nothing vouches for this folder.")
    wanted = manifest.get("format")
    if isinstance(wanted, int) and wanted > FORMAT:
        raise OptionError(
            "was written by a newer adaconvert",
            where=MANIFEST_FILE,
            expected=f"format {FORMAT} or older",
            found=f"format {wanted} of adaconvert {escape(manifest.get('adaconvert'))}",
            hint="Upgrade adaconvert.",
        )
    _check_shape(manifest)
    if dump(manifest) != raw:
        raise _error(
            "was edited after it was written",
            hint="Restore the file, or convert again.",
        )
    return manifest


def is_ours(folder: Path) -> bool:
    """Return whether a folder holds a manifest of any version of adaconvert, edited or not."""
    manifest = peek(folder)
    return isinstance(manifest.get("adaconvert"), str) and isinstance(manifest.get("format"), int)


def peek(folder: Path) -> dict[str, object]:
    """Return what a manifest says, edited or of any version; nothing when it cannot be read."""
    try:
        return _parse(_raw(folder)) or {}
    except AdaconvertError:
        return {}


def foreign_entries(folder: Path) -> list[str]:
    """Return what lies in an output folder that its manifest does not list, sorted."""
    manifest = peek(folder)
    known = {MANIFEST_FILE}
    for key in ("files", "shards"):
        entries = manifest.get(key)
        known |= set(entries) if isinstance(entries, dict) else set()
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in known)


def records(manifest: Mapping[str, object]) -> dict[str, ShardRecord]:
    """Return the shards a manifest that `read` returned lists, by file."""
    found = {}
    for file, entry in cast("dict[str, dict[str, object]]", manifest["shards"]).items():
        found[file] = ShardRecord(
            file=file,
            nbytes=cast("int", entry["bytes"]),
            digest=cast("str", entry["digest"]),
            tensors=cast("dict[str, str]", entry["tensors"]),
        )
    return found


def weights_of(manifest: Mapping[str, object]) -> str:
    """Return one sha256 over names and bytes of all tensors a manifest that `read` returned
    lists."""
    shards = records(manifest).values()
    return digest_of_digests(
        {name: digest for shard in shards for name, digest in shard.tensors.items()}
    )


def history_of(
    folder: Path, *, label: str | None = None, weights: str | None = None
) -> list[dict[str, object]]:
    """Return the stages a checkpoint came by, oldest first; none when adaconvert did not write it.

    Args:
        folder: the checkpoint, as it was opened.
        label: what the next stage calls it; entered as "into" of the last stage.
        weights: sha256 over its tensors; the history of other weights is none of this checkpoint.
    """
    try:
        manifest = read(folder)
        if weights is not None and weights_of(manifest) != weights:
            return []
    except (AdaconvertError, ValueError):
        return []
    last = _stage(manifest)
    if label is not None:
        last["into"] = label
    return [*history(manifest), last][-_MOST_STAGES:]


def histories_of(
    sources: Sequence[tuple[Path, str]], weights: Sequence[str] | None = None
) -> list[dict[str, object]]:
    """Return the stages several checkpoints came by; one they share is there once.

    Args:
        sources: folder and label of each.
        weights: sha256 over the tensors of each.
    """
    digests: Sequence[str | None] = [None] * len(sources) if weights is None else weights
    found: list[dict[str, object]] = []
    for (folder, label), digest in zip(sources, digests, strict=True):
        stages = history_of(folder, label=label, weights=digest)
        found += [stage for stage in stages if stage not in found]
    return found


def history(manifest: Mapping[str, object]) -> list[dict[str, object]]:
    """Return the earlier stages a manifest lists, those that are none left out."""
    listed = manifest.get("history")
    entries = listed if isinstance(listed, list) else []
    return [dict(entry) for entry in entries if isinstance(entry, dict) and _is_stage(entry)]


def _is_stage(entry: Mapping[str, object]) -> bool:
    kinds = {"method": str, "options": dict, "sources": list, "exactness": dict, "notes": list}
    return all(isinstance(entry.get(key), kind) for key, kind in kinds.items())


def _stage(manifest: Mapping[str, object]) -> dict[str, object]:
    """Return a manifest without what only its own folder needs."""
    sources = cast("list[object]", manifest["sources"])
    kept = {key: manifest[key] for key in ("method", "options", "exactness", "notes")}
    found: dict[str, object] = {
        **kept,
        "sources": [
            {key: source.get(key) for key in ("label", "revision", "digest")}
            for source in sources
            if isinstance(source, dict)
        ],
        "version": manifest["adaconvert"],
    }
    training = manifest.get("training")
    return {**found, "training": training} if isinstance(training, dict) else found


def _raw(folder: Path) -> bytes:
    path = folder / MANIFEST_FILE
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise _error("is no regular file of a sensible size")
        return path.read_bytes()
    except OSError as error:
        raise _error(
            "is missing or cannot be read",
            hint="Only folders written by adaconvert have it.",
        ) from error


def _parse(raw: bytes) -> dict[str, object] | None:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _check_shape(manifest: Mapping[str, object]) -> None:
    for key, kinds in _SHAPE.items():
        if not isinstance(manifest.get(key, ...), kinds):
            raise _error(f"entry '{key}' is missing or of the wrong kind")
    for file, entry in cast("dict[str, object]", manifest["shards"]).items():
        keys = {"bytes": int, "digest": str, "tensors": dict}
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), kind) for key, kind in keys.items()
        ):
            raise _error(f"entry of shard '{escape(file)}' is damaged")


def _error(message: str, *, hint: str | None = None) -> VerificationError:
    return VerificationError(message, where=MANIFEST_FILE, hint=hint)
