"""A tiny model, a tiny text, and a short fine-tune of one on the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult
from adaconvert.train.run import RunSettings, finetune

Tune = Callable[..., FinetuneResult]


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("llama-tied", tmp_path_factory.mktemp("dense") / "dense")


@pytest.fixture(scope="session")
def adaptive(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive") / "adaptive"
    return make_adaptive(dense, folder, router="param-center", experts=8)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [
        {"text": f"document {i}: the cat number {i % 7} sat on the mat and slept. " * 3}
        for i in range(40)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("mixtral", tmp_path_factory.mktemp("stock") / "mixtral")


@pytest.fixture(scope="module")
def nulled(stock: Path) -> Path:
    """Return the mixture with null experts."""
    return make_nulled(stock, stock.parent / "nulled")


@pytest.fixture
def tune(tmp_path: Path, text: Path) -> Tune:
    """Return what runs a fine-tune on the CPU into `tmp_path / name`."""

    def run(
        source: Path,
        name: str = "out",
        *,
        report: Callable[[str], None] = lambda line: None,
        resume: bool = False,
        overwrite: bool = False,
        **options: Any,
    ) -> FinetuneResult:
        given = {
            **{"steps": 12, "seq_len": 32, "batch_size": 4, "lr": 3e-3, "log_every": 3},
            **{"save_every": 0},
            **options,
        }
        data = given.pop("data", [str(text)])
        settings = RunSettings(
            destination=tmp_path / name,
            device="cpu",
            report=report,
            resume=resume,
            overwrite=overwrite,
        )
        return finetune(str(source), FinetuneConfig.of(data, given), settings)

    return run
