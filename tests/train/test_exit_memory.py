"""The memory table of a fine-tune of exits: logits of a chunk, and sums of gradients of heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert.layerwise.quiet import quiet
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.memory import need_of

VOCAB, LENGTH, BATCH = 40_000, 256, 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("wide")
    dense = tiny_models.make("llama", root / "dense", vocab_size=VOCAB, max_shard_size="1GB")
    return by_hand(dense, root / "exits", [1], "affine")


def options(**more: Any) -> dict[str, Any]:
    return {
        **{"steps": 1, "seq_len": LENGTH, "batch_size": BATCH, "train": ("exits",)},
        **{"save_every": 0, **more},
    }


def activations(source: Path, **more: Any) -> int:
    with quiet():
        model = load_model(source, device_map="meta")
        return need_of(model, FinetuneConfig.of(["x"], options(**more))).activations


def test_logits_of_a_chunk_are_counted(source: Path) -> None:
    by_chunk = {chunk: activations(source, exit_chunk=chunk) for chunk in (8, 512, 4096)}
    assert by_chunk[512] - by_chunk[8] == 504 * VOCAB * 4 * 4
    # there are no more positions than the batch has
    assert by_chunk[4096] - by_chunk[8] == (BATCH * LENGTH - 8) * VOCAB * 4 * 4
    kd = activations(source, exit_chunk=512, exit_loss="kd")
    assert kd - by_chunk[512] == 512 * VOCAB * 4
    # without losses of exits the logits of whole sequences exist
    whole = activations(source, exit_weights="0", train=("all",))
    assert whole >= BATCH * LENGTH * VOCAB * 4 * 4


def test_heads_that_learn_are_summed(source: Path, tmp_path: Path) -> None:
    dense = source.parent / "dense"
    own = by_hand(dense, tmp_path / "own", [1], "norm")
    once = (VOCAB * 32 + 32) * 4
    assert activations(own) > once
    assert activations(own, accumulate=2) - activations(own) == once
    # a map lies in front of the tail
    assert activations(source, accumulate=2) == activations(source)
