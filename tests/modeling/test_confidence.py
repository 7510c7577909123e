"""How sure an exit is, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest
import torch

from adaconvert.modeling.adaptive_exit_decide import confidence, similarity, threshold_at

#: probabilities of three classes, and of one that is certain.
CHOICES = torch.tensor([[0.5, 0.3, 0.2], [1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0]])


def said(measure: str, logits: torch.Tensor, **more: torch.Tensor) -> torch.Tensor:
    state = more.get("state", torch.zeros(len(logits), 2))
    return confidence(measure, logits, state=state, previous_state=more.get("previous"), head=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measures_of_probabilities(dtype: torch.dtype) -> None:
    logits = CHOICES.clamp_min(1e-30).log().to(dtype)
    entropy = -sum(p * math.log(p) for p in (0.5, 0.3, 0.2))
    wanted = {
        "max": [0.5, 1 / 3, 1.0],
        "difference": [0.2, 0.0, 1.0],
        "entropy": [1 - entropy / math.log(3), 0.0, 1.0],
    }
    for measure, values in wanted.items():
        found = said(measure, logits)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(values, abs=1e-2 if dtype.itemsize == 2 else 1e-5)


def test_a_state_that_turns_no_more_is_sure() -> None:
    state = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-2.0, 0.0]])
    before = torch.tensor([[3.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = said("state", torch.zeros(3, 3), state=state, previous=before)
    assert found.tolist() == pytest.approx([1.0, math.sqrt(0.5), -1.0])


def test_similarity_is_one_less_the_divergence() -> None:
    certain = torch.tensor([[60.0, 0.0], [60.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[60.0, 0.0], [0.0, 60.0], [60.0, 0.0]])
    # of a fair and a certain coin: H(3/4, 1/4) - 1/2 bit
    mixed = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)) - 0.5
    assert similarity(certain, other).tolist() == pytest.approx([1.0, 0.0, 1 - mixed], abs=1e-5)


def test_thresholds_fall_to_nine_tenths() -> None:
    rule = {"thresholds": [0.8], "decay": {"rate": 4.0, "length": 100}}
    assert threshold_at(rule, 0, 0) == pytest.approx(0.8)
    assert threshold_at(rule, 0, 50) == pytest.approx(0.72 + 0.08 * math.exp(-2))
    assert threshold_at(rule, 0, 10**6) == pytest.approx(0.72)
    assert threshold_at({**rule, "decay": None}, 0, 50) == 0.8
