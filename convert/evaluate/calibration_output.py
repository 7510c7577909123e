"""Putting a calibration into a checkpoint: config.json, card and manifest, all or nothing.

Weights do not change. In place, the new folder holds hard links to the old one's shards until it
takes its name and the old one goes; another destination gets copies.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaconvert.arch.calibration import config_digest, stale_reasons, table_of
from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.evaluate.calibration_result import CalibrationResult
from adaconvert.export.card import card_files, with_card
from adaconvert.export.card_calibration import is_note, notes_of
from adaconvert.export.card_facts import costs_of, recovered_facts
from adaconvert.io import manifest
from adaconvert.io.card_file import CARD, FIGURES, is_edited
from adaconvert.io.commit import Staging
from adaconvert.io.destination import Destination
from adaconvert.io.digest import digest_of_digests
from adaconvert.io.fs import FileSystem
from adaconvert.io.layout import ShardRecord, shard_digest_of_file
from adaconvert.io.names import escape
from adaconvert.io.rewrite import check_updatable
from adaconvert.io.source import Source
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object
from adaconvert.modeling.adaptive_knobs import DEPTH, EXITS, has_exits
from adaconvert.modeling.adaptive_schema import routed_layers, routed_specs

_RESET: Final = "no setting was asked for: the default is the conversion's again"
_RESET_TO_ALL: Final = (
    "no setting was asked for, and what the default was before the earlier calibration is not "
    "recorded: every expert runs"
)


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
        check_updatable(checkpoint.folder)
    except AdaconvertError as error:
        error.hint = "It cannot be updated in place: name another folder with --out."
        error.args = (error.describe(),)
        raise


def stale(where: str | Path) -> list[str]:
    """Return why the calibration table of a checkpoint no longer holds; empty when it does.

    Raises:
        OptionError: there is no calibrated checkpoint.
        SourceError: it is damaged.
    """
    checkpoint = open_checkpoint(where)
    if table_of(checkpoint.config) is None:
        raise OptionError("holds no calibration", where=checkpoint.name)
    return stale_reasons(checkpoint.config, checkpoint.weights_digest())


def calibrated_config(config: Mapping[str, Any], result: CalibrationResult) -> dict[str, Any]:
    """Return config.json with the table in it, and the chosen row as every site's default.

    The default is what a model does without being asked: a checkpoint calibrated to a budget keeps
    to it wherever it is loaded. `set_compute(1.0)` runs every expert. Without a choice the default
    is the conversion's, also where an earlier calibration had chosen another.
    """
    new = copy.deepcopy(dict(config))
    adaptive = new["adaptive"]
    adaptive["calibration"] = result.entry()
    chosen = None if result.chosen is None else result.rows[result.chosen].select
    select = configured(config["adaptive"]) if chosen is None else chosen
    if has_exits(adaptive):
        _set_exits(adaptive["model"]["exits"], select.get(EXITS) or {})
    for path, spec in routed_layers(adaptive).items():
        spec["select"] = _of_block(select.get(DEPTH) or {"rule": "all"}, path, spec["select"])
    for path, spec in routed_specs(adaptive).items():
        spec["select"] = _fitting(select.get(path) or select["*"], spec["experts"]["count"])
    return new


def _set_exits(exits: dict[str, Any], rule: Mapping[str, Any]) -> None:
    """Make a rule the one by which tokens leave; an empty one lets none leave."""
    never = {**exits["decide"], "thresholds": [None] * len(exits["heads"])}
    if never["measure"] == "patience":
        never["patience"] = len(exits["heads"])
    found = {**never, **rule}
    exits["kv"] = found.pop("kv", exits["kv"])
    exits["decide"] = found


def _of_block(rule: Mapping[str, Any], path: str, configured: Mapping[str, Any]) -> dict[str, Any]:
    """Return a rule of skipping as a block stores it; as it was where the rule does not name it."""
    for name in ("threshold", "capacity"):
        value = rule.get(name)
        if isinstance(value, Mapping):
            found = value.get(path)
            return dict(configured) if found is None else {"rule": rule["rule"], name: found}
    return dict(rule)


def _fitting(select: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Return a selection as a site of so many experts stores it: a k of all sites may be more."""
    return {**select, "k": min(select["k"], experts)} if "k" in select else dict(select)


def configured(adaptive: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every site's selection as it was before a calibration chose one.

    A checkpoint whose calibration chose a default without keeping the one before runs all experts.
    """
    sites = {path: spec["select"] for path, spec in routed_specs(adaptive).items()}
    if has_exits(adaptive):
        exits = adaptive["model"]["exits"]
        sites[EXITS] = {**exits["decide"], "kv": exits["kv"]}
    layers = routed_layers(adaptive)
    if layers:
        sites[DEPTH] = of_blocks(layers)
    table = adaptive.get("calibration") or {}
    if table.get("chosen") is None:
        return {path: dict(select) for path, select in sites.items()}
    kept = table.get("configured") or {}
    unknown = {path: {} if path == EXITS else {"rule": "all"} for path in sites}
    return {path: dict(kept.get(path) or unknown[path]) for path in sites}


def of_blocks(layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the rule that gives every block whose tokens choose the threshold it has."""
    chosen = {p: spec["select"] for p, spec in layers.items()}
    levels = {p: own["threshold"] for p, own in chosen.items() if own["rule"] == "threshold"}
    return {"rule": "threshold", "threshold": levels}


def reset_notes(adaptive: Mapping[str, Any], chosen: int | None) -> tuple[str, ...]:
    """Return what to say when no setting is chosen where an earlier calibration had chosen one."""
    before = adaptive.get("calibration") or {}
    if chosen is not None or before.get("chosen") is None:
        return ()
    return (_RESET if before.get("configured") else _RESET_TO_ALL,)


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
        updating=in_place,
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
        record = _with_card(checkpoint, _manifest(checkpoint, result), staging)
        staging.write_file(manifest.MANIFEST_FILE, manifest.dump(record))
        staging.commit()
    return target


def _side_files(checkpoint: Checkpoint) -> list[str]:
    """Return the files that go along as they are."""
    written = {CONFIG_FILE, CARD, *FIGURES, manifest.MANIFEST_FILE}
    if checkpoint.record is not None:
        return sorted(set(checkpoint.record["files"]) - written)
    found = sorted(entry.name for entry in checkpoint.folder.iterdir() if entry.is_file())
    return [name for name in found if name not in written and name not in checkpoint.shards]


def _with_card(
    checkpoint: Checkpoint, record: Mapping[str, Any], staging: Staging
) -> dict[str, Any]:
    """Return the manifest with a new card; one that was edited goes along as it is."""
    # what it costs depends on the default
    record = {**record, "card": {**record["card"], "after": costs_of(staging.path)}}
    files = card_files(staging.path, record)
    if is_edited(checkpoint.folder, record):
        staging.copy_file(CARD, checkpoint.folder / CARD)
    for name, data in files.items():
        if name not in staging.files:
            staging.write_file(name, data)
    return with_card(record, staging.files, hashlib.sha256(files[CARD]).hexdigest())


def _manifest(checkpoint: Checkpoint, result: CalibrationResult) -> dict[str, Any]:
    """Return the manifest without what was measured under another default."""
    record = checkpoint.record or _first_manifest(checkpoint)
    record = {"card": recovered_facts(checkpoint.folder), **record}
    notes = [note for note in record["notes"] if not is_note(str(note))]
    promise = None if result.chosen is None else result.promise()
    new = {**record, "notes": [*notes, *notes_of(promise, result.notes)]}
    new.pop("quality", None)
    return new


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
