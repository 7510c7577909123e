"""Labelled texts a tiny classifier can learn, and tiny classifiers with exits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand

CLASSES: Final = ("LABEL_0", "LABEL_1")
#: the word that gives each class away.
_WORDS: Final = ("experts", "nothing")


def rows_of(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Return texts whose first word gives their class away.

    Args:
        count: how many, of each class every second one.
        seed: others have other texts, below 1000 texts each.
    """
    return [
        {"text": f"{_WORDS[n % 2]} of the model number {n + 1000 * seed}", "label": CLASSES[n % 2]}
        for n in range(count)
    ]


def written(path: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    """Write rows as lines of JSON; return `path`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts_with_exits(root: Path, **options: Any) -> Path:
    """Return a classifier of texts in two classes with exits after blocks 1 and 2 of 3.

    Args:
        root: folder of the dense model and of this one.
        options: of `tiny_models.make`.
    """
    dense = tiny_models.make(
        *("bert", root / "dense"),
        layers=3,
        max_shard_size="1GB",
        architecture="BertForSequenceClassification",
        num_labels=2,
        **options,
    )
    return by_hand(dense, root / "exits", (1, 2), "norm")


def with_confidence(source: Path) -> Path:
    """Give every exit of a checkpoint a classifier of confidence, all zeros; return `source`."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    hidden = int(config["hidden_size"])
    for head in config["adaptive"]["model"]["exits"]["heads"]:
        head["confidence"] = True
        name = f"exits.{head['at']}.confidence"
        tensors |= {f"{name}.weight": torch.zeros(1, hidden), f"{name}.bias": torch.zeros(1)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(config))
    return source
