"""The files of a model card, and whether its owner has edited it since it was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from adaconvert.errors import AdaconvertError
from adaconvert.io import manifest
from adaconvert.io.regular import read_whole

CARD: Final = "README.md"
#: drawn beside the card of a calibrated checkpoint.
PLOT: Final = "compute_loss.svg"
#: drawn beside the card of a checkpoint with null experts that was measured on text.
CLASSES_PLOT: Final = "real_experts.svg"
FIGURES: Final = (PLOT, CLASSES_PLOT)
#: what `adaconvert run` leaves in the last stage's folder.
RECIPE: Final = "adaconvert_recipe.yaml"
#: marks a card adaconvert wrote; its owner may remove the line to keep it for good.
MARKER: Final = "<!-- written by adaconvert -->"
MAX_CARD: Final = 16 << 20


def is_edited(folder: Path, record: Mapping[str, object] | None = None) -> bool:
    """Return whether the card of an output is no longer the one adaconvert wrote.

    Args:
        folder: the output.
        record: content of its adaconvert.json, read leniently when None.
    """
    if not os.path.lexists(folder / CARD):
        return False
    try:
        raw = read_whole(folder / CARD, CARD, MAX_CARD)
    except AdaconvertError:
        # no card of ours, whatever it is
        return True
    known = manifest.peek(folder) if record is None else record
    return MARKER.encode() not in raw or hashlib.sha256(raw).hexdigest() != _written(known)


def _written(record: Mapping[str, object]) -> object:
    """Return the sha256 of the card as it was written.

    An edited card that a later stage took along is among the files with the hash it has now.
    """
    card, files = record.get("card"), record.get("files")
    own = card.get("sha256") if isinstance(card, dict) else None
    return own or (files.get(CARD) if isinstance(files, dict) else None)
