"""`--precision auto`: frozen weights that are stored in 16 bits are never doubled unasked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adaconvert.methods.sources import open_source
from adaconvert.testing.tiny_models import make
from adaconvert.train.checks import settled
from adaconvert.train.config import FinetuneConfig


@pytest.mark.parametrize(
    ("dtype", "options", "precision"),
    [
        ("float32", {"train": ["all"]}, "fp32"),
        ("float32", {"train": ["experts"]}, "fp32"),
        ("bfloat16", {"train": ["all"]}, "fp32"),
        ("bfloat16", {"train": ["experts"]}, "bf16"),
        ("float16", {"train": ["experts"]}, "bf16"),
        ("bfloat16", {"train": ["all"], "lora": 4}, "bf16"),
        ("bfloat16", {"train": ["experts"], "precision": "fp32"}, "fp32"),
    ],
)
def test_what_auto_stands_for(
    tmp_path: Path, dtype: str, options: dict[str, Any], precision: str
) -> None:
    item = open_source(str(make("llama", tmp_path / "dense", dtype=dtype)))
    config = FinetuneConfig.of(["text.jsonl"], {"steps": 1, **options})
    assert config.precision == options.get("precision", "auto")
    assert settled(config, item).precision == precision


def test_the_plan_counts_frozen_weights_as_stored(tmp_path: Path) -> None:
    from adaconvert import api

    dense = make("llama", tmp_path / "dense", dtype="bfloat16")
    (tmp_path / "text.jsonl").write_text('{"text": "one two three"}\n' * 50)
    needed = {
        precision: api.finetune(
            dense,
            tmp_path / "out",
            data=[tmp_path / "text.jsonl"],
            steps=1,
            seq_len=16,
            train=["q_proj"],
            precision=precision,
            device="cpu",
            dry_run=True,
        ).budget.need
        for precision in ("auto", "bf16", "fp32")
    }
    assert needed["auto"] == needed["bf16"]
    assert needed["auto"].total < needed["fp32"].total
