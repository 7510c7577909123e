"""Exits of classifiers: the objectives by hand, and what tuning does to tiny models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.testing.labelled import with_confidence
from adaconvert.train.exit_classifiers import (
    Objective,
    classifier_loss,
    halting,
    prior_of,
    tune_classifier,
)


def test_halting_is_a_distribution() -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.0, 0.0]])
    found = halting(logits).exp()
    assert found.sum(1).tolist() == pytest.approx([1.0, 1.0])
    assert found[1].tolist() == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert prior_of(3, 0.5).tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


def test_objectives_by_hand() -> None:
    logits = [torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]])]
    label, halts = torch.tensor([0]), torch.tensor([[0.0]])
    first, last = (math.log(1 + math.exp(-x)) for x in (1.0, 3.0))
    weighted = classifier_loss(logits, label, (1, 3), Objective())
    assert float(weighted) == pytest.approx((first + 3 * last) / 4, rel=1e-5)
    geometric = Objective(kind="geometric", factor=0.5, cost=0.0)
    found = classifier_loss(logits, label, (1, 3), geometric, halts)
    # the deeper one does better, and is reached one time in two
    assert float(found) == pytest.approx((first + last) / 2 + 0.5 * math.log(2), rel=1e-5)
    ponder = Objective(kind="ponder", factor=2.0, prior=0.5)
    found = classifier_loss(logits, label, (1, 3), ponder, halts)
    divergence = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    assert float(found) == pytest.approx((first + last) / 2 + 2 * divergence, rel=1e-5)


def classifier(family: str, folder: Path, *, confidence: bool) -> Any:
    """Return a tiny classifier with exits after blocks 1 and 2 of 3."""
    name = "BertForSequenceClassification" if family == "bert" else "ViTForImageClassification"
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    dense = tiny_models.make(
        *(family, folder / "dense"), layers=3, max_shard_size="1GB", architecture=name, **quiet
    )
    source = by_hand(dense, folder / "exits", [1, 2], "norm")
    return load_model(with_confidence(source) if confidence else source)


def batch_of(family: str) -> dict[str, Tensor]:
    """Return eight examples whose class can be told from what they begin with."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(8) % 2
    if family == "bert":
        ids = torch.randint(10, 200, (8, 9), generator=generator)
        ids[:, 1] = 20 + 50 * labels
        mask = torch.ones_like(ids)
        mask[::3, 6:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    pixels = torch.randn(8, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels + 2 * labels.view(-1, 1, 1, 1), "labels": labels}


@pytest.mark.parametrize("family", ["bert", "vit"])
@pytest.mark.parametrize("kind", ["weighted", "geometric", "ponder"])
def test_exits_of_classifiers_learn(family: str, kind: str, tmp_path: Path) -> None:
    model = classifier(family, tmp_path, confidence=kind != "weighted")
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = batch_of(family)
    history = tune_classifier(
        model, [batch], steps=25, objective=Objective(kind=kind), train=("exits",), lr=3e-3
    )
    assert history[-1] < history[0] - 0.02
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.startswith("exits."), name
    assert not model.training
    if kind == "weighted":
        deeper = tune_classifier(model, [batch], steps=10, lr=1e-3)
        assert deeper[-1] < history[0]
        assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    model = classifier("bert", tmp_path, confidence=False)
    with pytest.raises(OptionError, match="no classifier of confidence"):
        tune_classifier(model, [], steps=1, objective=Objective(kind="ponder"))
    with pytest.raises(OptionError, match="no batches"):
        tune_classifier(model, [], steps=1)
    with pytest.raises(OptionError, match="kind: is unknown"):
        Objective(kind="act")
    dense = tiny_models.make("llama", tmp_path / "llama")
    with pytest.raises(OptionError, match="no classifier with exits"):
        tune_classifier(load_model(dense), [], steps=1)
