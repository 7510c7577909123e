"""Keeping what `evaluate` measured in the checkpoint's manifest, for its card to show."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaconvert.errors import OptionError, SourceError
from adaconvert.evaluate.report import Evaluation, Result
from adaconvert.evaluate.statistics import Mean, finite
from adaconvert.export.card_facts import entries_of
from adaconvert.export.recard import update
from adaconvert.io import manifest
from adaconvert.io.card_file import is_edited
from adaconvert.io.layout import shard_digest_of_file
from adaconvert.io.names import escape
from adaconvert.io.rewrite import check_updatable


def check_recordable(where: str) -> None:
    """Return only when results may be kept in a checkpoint; before anything long begins.

    Raises:
        OptionError: it is no folder.
        VerificationError: its manifest is missing, damaged or was edited.
        SourceError: its weights are not those the manifest lists.
        OutputConflictError: it holds files adaconvert did not write.
    """
    folder = Path(where)
    if not folder.is_dir():
        raise OptionError(
            "keeps results in a folder adaconvert wrote", where="--record", found=escape(where)
        )
    record = manifest.read(folder)
    check_updatable(folder)
    for file, shard in manifest.records(record).items():
        if shard_digest_of_file(folder / file) != (shard.digest, shard.tensors):
            raise SourceError(
                f"is not the shard {manifest.MANIFEST_FILE} lists",
                where=escape(file),
                hint="Results of other weights are not kept; run `adaconvert verify`.",
            )


def keep(where: str, found: Evaluation) -> bool:
    """Return whether the card changed; an edited one stays, and the manifest has the results.

    What was kept of other texts stays; of each text the newest results are kept.

    Raises:
        OutputConflictError: the folder holds files adaconvert did not write.
        ResourceError: the disk is full or broken; what was there is untouched.
    """
    folder = Path(where)
    record = manifest.read(folder)
    edited = is_edited(folder, record)
    new = quality_of(found)
    before = [entry for entry in entries_of(record) if entry.get("data") != new["data"]]
    update(folder, record, {**record, "quality": [*before, new]}, keep=edited)
    return not edited


def quality_of(found: Evaluation) -> dict[str, Any]:
    """Return an entry of a manifest's "quality": no times, no speeds, no paths."""
    reference = found.reference
    return {
        "data": found.data.get("name"),
        "digest": found.data.get("digest"),
        "documents": found.data.get("documents"),
        "tokens": found.data.get("tokens"),
        "length": found.data.get("length"),
        "dtype": found.runtime.get("dtype"),
        "reference": None if reference is None else _row(reference),
        "settings": [_row(result) for result in found.results],
    }


def _row(result: Result) -> Mapping[str, Any]:
    cost, real = result.compute, result.realised
    null = {} if real is None else {"real_experts": real.to_json()}
    if result.classes is not None:
        null["token_classes"] = result.classes.to_json()
    return {
        "label": result.label,
        "compute": None if cost is None else finite(cost.fraction),
        "loss": _mean(result.loss),
        "perplexity": finite(result.perplexity),
        "accuracy": _mean(result.accuracy),
        "increase": _mean(result.increase),
        "agreement": _mean(result.agreement),
        **null,
    }


def _mean(mean: Mean | None) -> float | None:
    return None if mean is None else finite(mean.value)
