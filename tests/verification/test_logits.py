"""Differences of logits and of hidden states, on numbers small enough to do by hand."""

from __future__ import annotations

import math

import pytest
import torch

from adaconvert.verification.logits import compare_logits, hidden_difference

DENSE = torch.tensor([[[4.0, 1.0, 0.0], [2.0, 1.9999, -4.0]]])


def test_equal_logits() -> None:
    found = compare_logits(DENSE, DENSE.clone(), tolerance=1e-5)
    assert (found.max_abs_diff, found.max_abs_logit, found.relative) == (0.0, 4.0, 0.0)
    assert (found.argmax_agreement, found.disputed, found.kl, found.tokens) == (1.0, 0, 0.0, 2)


def test_the_largest_difference_is_relative_to_the_largest_dense_logit() -> None:
    target = DENSE.clone()
    target[0, 0, 2] += 0.5
    found = compare_logits(DENSE, target, tolerance=1e-5)
    assert found.max_abs_diff == 0.5
    assert found.relative == pytest.approx(0.125)


@pytest.mark.parametrize(("tolerance", "disputed"), [(1e-5, 1), (1e-4, 0)])
def test_a_flipped_argmax_counts_only_when_the_choice_was_clear(
    tolerance: float, disputed: int
) -> None:
    target = DENSE.clone()
    target[0, 1] = torch.tensor([1.9999, 2.0, -4.0])
    found = compare_logits(DENSE, target, tolerance=tolerance)
    assert found.argmax_agreement == 0.5
    assert found.disputed == disputed


def test_kl_is_the_mean_over_tokens_in_nats() -> None:
    dense = torch.log(torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]))
    target = torch.log(torch.tensor([[[0.5, 0.5], [0.25, 0.75]]]))
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert compare_logits(dense, target, tolerance=1e-5).kl == pytest.approx(expected)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["dense", "target"])
def test_a_logit_that_is_no_number_makes_the_difference_infinite(value: float, which: str) -> None:
    broken = DENSE.clone()
    broken[0, 1, 1] = value
    pair = (broken, DENSE) if which == "dense" else (DENSE, broken)
    found = compare_logits(*pair, tolerance=1e-5)
    assert not found.finite
    assert found.disputed == 2


def test_logits_that_are_no_numbers_in_both_are_left_out() -> None:
    dense, target = DENSE.clone(), DENSE.clone()
    target[0, 0, 0] -= 1.0
    for logits in (dense, target):
        logits[0, 0, 1] = math.nan
    found = compare_logits(dense, target, tolerance=1e-5)
    assert (found.max_abs_diff, found.tokens, found.left_out) == (1.0, 2, 1)
    assert found.argmax_agreement == 1.0
    assert found.finite
    for logits in (dense, target):
        logits[0, 0] = math.inf
    found = compare_logits(dense, target, tolerance=1e-5)
    assert (found.max_abs_diff, found.tokens, found.left_out) == (0.0, 1, 3)
    for logits in (dense, target):
        logits[0, 1] = math.nan
    found = compare_logits(dense, target, tolerance=1e-5)
    assert not found.finite
    assert found.silent


def test_hidden_states_are_compared_per_token() -> None:
    # one token of real models is thousands of times larger than the others and must not hide them
    dense = torch.zeros(1, 2, 4)
    dense[0, 0], dense[0, 1] = torch.tensor([1e4, 0, 0, -1e4]), torch.tensor([1.0, 0, 0, -1])
    target = dense.clone()
    target[0, 1, 0] += 0.1
    assert hidden_difference(dense, target) > 0.04


def test_a_shifted_mean_is_no_difference() -> None:
    dense = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    assert hidden_difference(dense, dense - dense.mean(-1, keepdim=True)) < 1e-6
    assert hidden_difference(dense, 1.5 * dense) == pytest.approx(0.5, rel=1e-5)


def test_nan_states_differ_infinitely() -> None:
    dense = torch.ones(1, 1, 2)
    assert hidden_difference(dense, dense * math.nan) == math.inf
