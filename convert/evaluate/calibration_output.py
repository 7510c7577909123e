"""Putting a calibration into a checkpoint: config.json, card and manifest, all or nothing.

Weights do not change. In place, the new folder holds hard links to the old one's shards until it
takes its name and the old one goes; another destination gets copies.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.io import manifest
from adaconvert.io.commit import Staging
from adaconvert.io.destination import Destination
from adaconvert.io.digest import digest_of_digests
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import ShardRecord, shard_digest_of_file
from adaconvert.io.names import escape
from adaconvert.io.regular import read_text
from adaconvert.io.source import Source
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object

CARD: Final = "README.md"
_BEGIN: Final = "<!-- calibration -->"
_END: Final = "<!-- end of calibration -->"
_MAX_CARD: Final = 16 << 20
#: what transformers changes when it saves a config that means the same.
_VOLATILE: Final = ("transformers_version", "_name_or_path", "auto_map")
_NOTE: Final = "calibrated: "


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An adaptive checkpoint that can be calibrated.

    Attributes:
        folder: where it lies.
        config: config.json as it is.
        record: adaconvert.json, None when there is none.
        shards: every shard with the hashes of its tensors, read from the disk.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any] | None
    shards: dict[str, ShardRecord]

    @property
    def name(self) -> str:
        """Return the folder's name."""
        return self.folder.resolve().name

    @property
    def adaptive(self) -> dict[str, Any]:
        """Return `config.adaptive`."""
        found: dict[str, Any] = self.config["adaptive"]
        return found

    def weights_digest(self) -> str:
        """Return one sha256 over names and bytes of all tensors, whatever files hold them."""
        return digest_of_digests(
            {
                name: digest
                for shard in self.shards.values()
                for name, digest in shard.tensors.items()
            }
        )


def open_checkpoint(where: str | Path) -> Checkpoint:
    """Return the checkpoint in a folder; hashes its weights.

    Raises:
        OptionError: it is no folder, or not adaptive.
        SourceError: it is damaged.
        VerificationError: its manifest was edited.
    """
    folder = Path(where)
    shown = escape(str(where))
    if not folder.is_dir():
        raise OptionError("is no folder", where=shown, hint="Name the checkpoint to calibrate.")
    config = load_object(folder / CONFIG_FILE, CONFIG_FILE, MAX_CONFIG_BYTES)
    if not isinstance(config.get("adaptive"), dict):
        raise OptionError(
            "is not an adaptive checkpoint, so there is nothing to calibrate",
            where=shown,
            hint="Make one with `adaconvert moefy` or `adaconvert d2dmoe`.",
        )
    record = manifest.read(folder) if (folder / manifest.MANIFEST_FILE).exists() else None
    return Checkpoint(folder=folder, config=dict(config), record=record, shards=_hashed(folder))


def check_whole(checkpoint: Checkpoint) -> None:
    """Return only when the weights are those the manifest lists.

    Raises:
        SourceError: they are not.
    """
    if checkpoint.record is None or manifest.records(checkpoint.record) == checkpoint.shards:
        return
    raise SourceError(
        f"the weights are not those {manifest.MANIFEST_FILE} lists",
        where=checkpoint.name,
        hint=f"Run `adaconvert verify`; if they were changed on purpose, remove "
        f"{manifest.MANIFEST_FILE} and name another folder with --out.",
    )


def _hashed(folder: Path) -> dict[str, ShardRecord]:
    source = Source.open(folder)
    found = {}
    for file in source.files:
        digest, tensors = shard_digest_of_file(folder / file)
        size = (folder / file).stat().st_size
        found[file] = ShardRecord(file=file, nbytes=size, digest=digest, tensors=tensors)
    return found


def check_destination(
    checkpoint: Checkpoint, destination: str | Path | None, *, overwrite: bool
) -> None:
    """Return only when the result may be written where it is to be; before anything long begins.

    Raises:
        OutputConflictError: it may not.
    """
    if destination is not None:
        target = Destination.resolve(destination)
        target.check_apart([checkpoint.folder])
        target.check_free(overwrite=overwrite)
        return
    try:
        Destination.resolve(checkpoint.folder).check_free(overwrite=True)
    except AdaconvertError as error:
        error.hint = "It cannot be updated in place: name another folder with --out."
        error.args = (error.describe(),)
        raise


def config_digest(config: Mapping[str, Any]) -> str:
    """Return the sha256 of what a config.json says besides its calibration and default selections.

    Keys that transformers rewrites without a change of meaning are left out.
    """
    bare = {key: value for key, value in config.items() if key not in _VOLATILE}
    adaptive = copy.deepcopy(bare.get("adaptive")) or {}
    adaptive.pop("calibration", None)
    for slots in adaptive.get("sites", {}).values():
        slots.get("ffn", {}).pop("select", None)
    bare["adaptive"] = adaptive
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stale(where: str | Path) -> list[str]:
    """Return why the calibration table of a checkpoint no longer holds; empty when it does.

    Raises:
        OptionError: there is no calibrated checkpoint.
        SourceError: it is damaged.
    """
    checkpoint = open_checkpoint(where)
    table = checkpoint.adaptive.get("calibration")
    if not isinstance(table, dict) or not isinstance(table.get("digests"), dict):
        raise OptionError("holds no calibration", where=checkpoint.name)
    digests = table["digests"]
    reasons = []
    if digests.get("weights") != checkpoint.weights_digest():
        reasons.append("the weights have changed since")
    if digests.get("config") != config_digest(checkpoint.config):
        reasons.append("config.json has changed since")
    return reasons


def calibrated_config(config: Mapping[str, Any], result: CalibrationResult) -> dict[str, Any]:
    """Return config.json with the table in it, and the chosen row as every site's default.

    The default is what a model does without being asked: a checkpoint calibrated to a budget keeps
    to it wherever it is loaded. `set_compute(1.0)` runs every expert.
    """
    new = copy.deepcopy(dict(config))
    adaptive = new["adaptive"]
    adaptive["calibration"] = result.entry()
    if result.chosen is None:
        return new
    select = result.rows[result.chosen].select
    for path, slots in adaptive["sites"].items():
        if "ffn" in slots:
            slots["ffn"]["select"] = dict(select.get(path) or select["*"])
    return new


def write(
    checkpoint: Checkpoint,
    result: CalibrationResult,
    destination: str | Path | None,
    *,
    overwrite: bool = False,
    fs: FileSystem | None = None,
) -> Path:
    """Return the folder that now holds the calibrated checkpoint.

    Raises:
        OutputConflictError: the destination is taken, or the checkpoint holds foreign files.
        SourceError: a file of the checkpoint has changed meanwhile.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    in_place = destination is None
    target = checkpoint.folder.resolve() if destination is None else Path(destination)
    size = 0 if in_place else sum(shard.nbytes for shard in checkpoint.shards.values())
    with Staging.open(
        target,
        sources=[] if in_place else [checkpoint.folder],
        overwrite=in_place or overwrite,
        plan_digest=hashlib.sha256(json.dumps(result.to_json()).encode()).hexdigest(),
        needed_bytes=size,
        fs=fs,
    ) as staging:
        for shard in checkpoint.shards.values():
            staging.adopt(shard, checkpoint.folder / shard.file, link=in_place)
        for name in _side_files(checkpoint):
            staging.copy_file(name, checkpoint.folder / name)
        config = calibrated_config(checkpoint.config, result)
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
        staging.write_file(CONFIG_FILE, text.encode())
        staging.write_file(CARD, _card(checkpoint, result).encode())
        record = _manifest(checkpoint, result, staging.files)
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
        staging.commit()
    return target


def _side_files(checkpoint: Checkpoint) -> list[str]:
    """Return the files that go along as they are."""
    written = {CONFIG_FILE, CARD, manifest.MANIFEST_FILE}
    if checkpoint.record is not None:
        return sorted(set(checkpoint.record["files"]) - written)
    found = sorted(entry.name for entry in checkpoint.folder.iterdir() if entry.is_file())
    return [name for name in found if name not in written and name not in checkpoint.shards]


def _card(checkpoint: Checkpoint, result: CalibrationResult) -> str:
    """Return the card with the section of this calibration in place of any earlier one."""
    try:
        text = read_text(checkpoint.folder / CARD, CARD, _MAX_CARD)
    except AdaconvertError:
        text = f"# {checkpoint.name}\n"
    section = "\n".join([_BEGIN, *result.card(), _END])
    earlier = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END), re.DOTALL)
    if earlier.search(text):
        return earlier.sub(lambda _: section, text, count=1)
    return f"{text.rstrip()}\n\n{section}\n"


def _manifest(
    checkpoint: Checkpoint, result: CalibrationResult, files: Mapping[str, str]
) -> dict[str, Any]:
    record = checkpoint.record
    if record is None:
        record = _first_manifest(checkpoint)
    notes = [note for note in record["notes"] if not str(note).startswith(_NOTE)]
    chosen = "a table, nothing chosen" if result.chosen is None else result.promise()
    return {**record, "files": dict(files), "notes": [*notes, f"{_NOTE}{chosen}"]}


def _first_manifest(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the manifest of a checkpoint that had none, such as one saved by a trainer."""
    return manifest.build(
        method="calibrate",
        options={},
        sources=[
            {
                "label": checkpoint.name,
                "revision": None,
                "fingerprint": config_digest(checkpoint.config),
                "digest": checkpoint.weights_digest(),
            }
        ],
        plan_digest="",
        exactness={"kind": "exact", "why": "the weights are those of the source"},
        shards=checkpoint.shards,
        files={},
    )
