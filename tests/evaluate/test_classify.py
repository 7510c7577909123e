"""Accuracy of classifiers, one text at a time by hand against batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert.data.tokens import load_tokenizer
from adaconvert.errors import DataError, OptionError, SourceError
from adaconvert.evaluate.classify import read_labelled, score_labelled
from adaconvert.evaluate.perplexity import Variant
from adaconvert.evaluate.settings import STORED
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models

TEXTS = ("good", "a bad film, far too long " * 4, "so so", "an expert decides", "nothing", "x y")
FAMILIES = {
    "bert": "BertForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make(
        request.param,
        tmp_path_factory.mktemp("classify") / "model",
        architecture=FAMILIES[request.param],
        num_labels=3,
    )


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load_model(folder)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def variant(model: Any, *, is_reference: bool = False) -> Variant:
    return Variant(label="it", model=model, setting=STORED, is_reference=is_reference)


def test_accuracy_is_that_of_single_texts(folder: Path, model: Any, tmp_path: Path) -> None:
    rows = [{"text": t, "label": i % 3} for i, t in enumerate(TEXTS)]
    data = read_labelled(written(tmp_path / "a.jsonl", rows), folder, model.config)
    tokenizer = load_tokenizer(folder)
    chosen, losses = [], []
    for row in rows:
        with torch.no_grad():
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0].double()
        chosen.append(int(logits.argmax()))
        losses.append(float(logits.logsumexp(-1) - logits[row["label"]]))
    for size in (1, 2, 6):
        (score,) = score_labelled([variant(model)], data, batch_size=size)
        assert list(score.chosen) == chosen
        assert list(score.right) == [c == r["label"] for c, r in zip(chosen, rows, strict=True)]
        # float32 logits of order 10
        assert score.loss == pytest.approx(numpy.array(losses), rel=1e-4, abs=1e-5)
        assert score.agreeing is None


def test_agreement_with_a_reference(
    folder: Path, model: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    family = model.config.model_type
    other = load_model(
        tiny_models.make(
            family, tmp_path / "o", architecture=FAMILIES[family], num_labels=3, seed=3
        )
    )
    rows = [{"text": t, "label": 0} for t in TEXTS]
    data = read_labelled(written(tmp_path / "a.jsonl", rows), folder, model.config)
    first, second = score_labelled([variant(other, is_reference=True), variant(model)], data)
    assert first.agreeing is None
    assert second.agreeing is not None
    assert list(second.agreeing) == list(first.chosen == second.chosen)


def test_labels_by_name_and_other_fields(folder: Path, model: Any, tmp_path: Path) -> None:
    rows = [{"body": "a", "class": "LABEL_2"}, {"body": "b", "class": 1}, {"body": "c"}]
    where = written(tmp_path / "a.jsonl", rows)
    options: dict[str, Any] = {"field": "body", "label_field": "class"}
    data = read_labelled(where, folder, model.config, max_documents=2, **options)
    assert (data.labels, data.names) == ((2, 1), ("a.jsonl:1", "a.jsonl:2"))
    with pytest.raises(DataError, match=r"a\.jsonl line 3: there is no field 'class'"):
        read_labelled(where, folder, model.config, **options)


@pytest.mark.parametrize("label", [3, -1, "good", 1.0, True, None, [0]])
def test_labels_the_model_does_not_have(
    folder: Path, model: Any, tmp_path: Path, label: object
) -> None:
    where = written(tmp_path / "a.jsonl", [{"text": "a", "label": label}])
    with pytest.raises(
        DataError,
        match=r"a\.jsonl:1 field 'label': is no label of the model; expected 0 to 2, or one of LAB",
    ):
        read_labelled(where, folder, model.config)


def test_long_texts_are_cut_and_counted(folder: Path, model: Any, tmp_path: Path) -> None:
    rows = [{"text": "word " * 400, "label": 0}, {"text": "word", "label": 0}]
    data = read_labelled(written(tmp_path / "a.jsonl", rows), folder, model.config)
    assert (len(data.ids[0]), data.cut) == (256, 1)
    short = read_labelled(written(tmp_path / "a.jsonl", rows), folder, model.config, length=5)
    assert max(map(len, short.ids)) == 5
    score_labelled([variant(model)], data)


def test_nothing_labelled(folder: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: holds no labelled text"):
        read_labelled(written(tmp_path / "a.jsonl", []), folder, model.config)


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_other_problems_are_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    config = load_model(folder).config
    config.problem_type = kind
    with pytest.raises(OptionError, match=f"one label a text; found {kind}"):
        read_labelled(tmp_path, folder, config)


def test_nan_names_the_text(folder: Path, tmp_path: Path) -> None:
    broken = load_model(folder)
    rows = [{"text": t, "label": 0} for t in ("aaaa", "bb", "zzz")]
    data = read_labelled(written(tmp_path / "a.jsonl", rows), folder, broken.config)
    with torch.no_grad():
        broken.get_input_embeddings().weight[data.ids[2][1]] = float("nan")
    with pytest.raises(SourceError, match=r"computes NaN .*; found first in text a\.jsonl:3"):
        score_labelled([variant(broken)], data, batch_size=1)
