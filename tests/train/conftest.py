"""Tiny models, tiny texts, and short fine-tunes of one on the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.depth_by_hand import depth_by_hand
from adaconvert.testing.labelled import rows_of, texts_with_exits, with_confidence, written
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult
from adaconvert.train.run import RunSettings, finetune

Tune = Callable[..., FinetuneResult]
#: a short training of the exits of a classifier.
SHORT: dict[str, Any] = {
    "train": "exits",
    "steps": 30,
    "batch_size": 8,
    "lr": 3e-3,
    "log_every": 10,
    "device": "cpu",
}


def reach(model: Any, paths: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the FLOPs of tokens that run none of some routed blocks, and all of these."""
    found = []
    for threshold in (1e30, -1e30):
        values = dict.fromkeys(paths or model.adaptive_depth(), threshold)
        held = model.set_depth("threshold", threshold=values)
        with torch.no_grad(), held, model.account() as account:
            model(input_ids=torch.zeros(1, 16, dtype=torch.long))
        found.append(account.compute())
    return found[0], found[1]


def tune_exits(source: Path, out: Path, **options: Any) -> FinetuneResult:
    """Return what a short training of a classifier's exits says."""
    found = api.finetune(source, out, **{**SHORT, **options})
    assert isinstance(found, FinetuneResult)
    return found


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


@pytest.fixture(scope="module")
def exits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a classifier of texts with exits nobody has trained."""
    return texts_with_exits(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def confident(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return one whose exits have classifiers of confidence."""
    return with_confidence(texts_with_exits(tmp_path_factory.mktemp("confident")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return labelled texts to train and to measure on."""
    folder = tmp_path_factory.mktemp("data")
    return written(folder / "train.jsonl", rows_of(60)), written(
        folder / "valid.jsonl", rows_of(20, seed=1)
    )


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model of four blocks."""
    folder = tmp_path_factory.mktemp("deep") / "dense"
    return tiny_models.make("llama-tied", folder, layers=4, max_shard_size="1GB")


@pytest.fixture
def routed(deep: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return what makes a checkpoint whose blocks 1 and 2 may be skipped, as conversions begin."""

    def make(kind: str = "skip", name: str = "routed", *, start: bool = True, **more: Any) -> Path:
        return depth_by_hand(deep, tmp_path / name, [1, 2], kind, start=start, **more)

    return make


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
