"""A language a tiny model can learn, and what a calibrated checkpoint is held to."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, Final

from adaconvert.io import manifest
from adaconvert.io.layout import shard_digest_of_file

WORDS: Final = (
    *("the", "model", "runs", "few", "of", "its", "experts"),
    *("and", "loses", "little", "of", "what", "it", "knows"),
)
OPTIONS: Final[dict[str, Any]] = {"length": 32, "max_tokens": None}


def sentence(rng: random.Random) -> str:
    """Return words in an order that their first two give away."""
    start, stride = rng.randrange(14), rng.randrange(1, 6)
    return " ".join(WORDS[(start + stride * n) % 14] for n in range(rng.randrange(6, 14)))


def documents(count: int, seed: int) -> list[str]:
    """Return different documents as lines of JSON."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[json.dumps({"text": sentence(rng)}) + "\n"] = None
    return list(found)


def teach(folder: Path, sentences: int) -> None:
    """Train the checkpoint in `folder` on its language, so that leaving parts out costs it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rng = random.Random(1)
    ids = [tokenizer(sentence(rng))["input_ids"][:24] for _ in range(sentences)]
    data = torch.tensor([row for row in ids if len(row) == 24])
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in torch.split(data, 24):
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
    model.save_pretrained(folder)


def table(folder: Path) -> dict[str, Any]:
    """Return `config.adaptive` of a checkpoint."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["adaptive"]
    return found


def assert_whole(folder: Path) -> None:
    """Every file is there, listed, and of the hash the manifest gives."""
    record: dict[str, Any] = manifest.read(folder)
    shards, files = manifest.records(record), record["files"]
    assert manifest.foreign_entries(folder) == []
    for file, shard in shards.items():
        assert shard_digest_of_file(folder / file) == (shard.digest, shard.tensors)
    for file, digest in files.items():
        assert hashlib.sha256((folder / file).read_bytes()).hexdigest() == digest, file
