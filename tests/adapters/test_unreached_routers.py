"""Weight decay leaves routers alone that no loss reaches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.stored import tensors_of
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.run import RunSettings, finetune

Bases = Callable[..., Path]


def trained(source: Path, folder: Path, **options: Any) -> Any:
    """Return what two steps with much weight decay make of a checkpoint."""
    folder.mkdir()
    lines = [json.dumps({"text": f"the quick brown fox number {i} " * 8}) for i in range(12)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    given = {
        **{"train": ["all"], "steps": 2, "seq_len": 16, "batch_size": 2},
        **{"lr": 1e-2, "weight_decay": 0.5, "save_every": 0, **options},
    }
    settings = RunSettings(destination=folder / "out", device="cpu", report=lambda line: None)
    config = FinetuneConfig.of([str(folder / "text.jsonl")], given)
    return finetune(str(source), config, settings)


def moved(source: Path, made: Path) -> set[str]:
    """Return which parts of a checkpoint differ, "adapters" and "router"."""
    before, after = tensors_of(source), tensors_of(made)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    return {part for name in changed for part in ("adapters", "router") if f".{part}." in name}


@pytest.mark.parametrize(
    ("experts", "select", "wanted"),
    [
        (1, {"rule": "soft"}, {"adapters"}),
        (4, {"rule": "top-p", "p": 0.25, "renormalize": True}, {"adapters"}),
        (4, {"rule": "top-p", "p": 0.25}, {"adapters", "router"}),
    ],
    ids=["one adapter", "one that weighs one", "one that weighs its share"],
)
def test_only_routers_that_a_loss_reaches_are_changed(
    base_of: Bases, tmp_path: Path, experts: int, select: dict[str, Any], wanted: set[str]
) -> None:
    source = make_adapted(
        base_of("llama"), tmp_path / "in", linears=("q_proj",), experts=experts, select=select
    )
    result = trained(source, tmp_path / "run")
    assert moved(source, result.destination) == wanted
