"""Router losses against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaconvert.train import losses


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts_of(chosen: Tensor, mask: Tensor, experts: int) -> Tensor:
    """Return how often each expert was chosen by the real tokens, one at a time."""
    counts = torch.zeros(chosen.shape[0], experts)
    for b in range(chosen.shape[0]):
        for s in range(chosen.shape[1]):
            for expert in chosen[b, s].tolist():
                counts[b, expert] += mask[b, s]
    return counts


def test_balance_is_one_when_even_and_e_when_one_expert_has_everything() -> None:
    mask = torch.ones(1, 8)
    even = torch.full((1, 8, 4), 0.25)
    assert losses.balance(even, torch.full((1, 4), 2.0), mask).tolist() == [1.0]
    one = torch.zeros(1, 8, 4)
    one[..., 2] = 1
    assert losses.balance(one, torch.tensor([[0.0, 0.0, 8.0, 0.0]]), mask).tolist() == [4.0]


def test_balance_is_its_plain_formula_over_the_real_tokens_of_each_sequence() -> None:
    probabilities = random(2, 6, 4).softmax(dim=-1)
    mask = torch.tensor([[1.0] * 6, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    chosen = probabilities.topk(2, dim=-1).indices
    counts = counts_of(chosen, mask, 4)
    found = losses.balance(probabilities, counts, mask)
    for b, tokens in ((0, 6), (1, 3)):
        expected = 0.0
        for expert in range(4):
            share = sum(expert in chosen[b, s].tolist() for s in range(tokens)) / (2 * tokens)
            mean = sum(float(probabilities[b, s, expert]) for s in range(tokens)) / tokens
            expected += 4 * share * mean
        # float32 sums of at most 24 terms of order one
        assert float(found[b]) == pytest.approx(expected, rel=1e-6)


def test_z_is_the_mean_square_of_logsumexp_over_real_tokens() -> None:
    logits = random(2, 5, 3)
    mask = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0], [1.0] * 5])
    found = losses.router_z(logits, mask)
    for b, tokens in ((0, 2), (1, 5)):
        rows = logits[b, :tokens].tolist()
        expected = sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / tokens
        assert float(found[b]) == pytest.approx(expected, rel=1e-5)


def test_a_constant_on_all_logits_leaves_choices_alone_and_costs_z() -> None:
    logits, mask = random(1, 9, 4), torch.ones(1, 9)
    moved = logits + 3
    assert torch.equal(logits.topk(2, dim=-1).indices, moved.topk(2, dim=-1).indices)
    assert float(losses.router_z(moved, mask)) > float(losses.router_z(logits, mask))


def test_regression_is_relative_to_each_token_and_zero_when_true() -> None:
    norms = random(1, 4, 3).abs() + 0.1
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert losses.regression(norms, norms, mask).tolist() == [0.0]
    # all tokens are of like size, so no floor: doubling errs by the size itself
    assert float(losses.regression(2 * norms, norms, mask)) == pytest.approx(1.0, rel=1e-6)
    # tokens a thousand times as long weigh no more
    scale = torch.tensor([1.0, 3.0, 0.5, 1.0])[None, :, None]
    assert float(losses.regression(2 * norms * scale, norms * scale, mask)) == pytest.approx(
        1.0, rel=1e-6
    )


def test_regression_does_not_divide_by_nothing() -> None:
    norms = torch.zeros(1, 3, 2, requires_grad=False)
    scores = torch.zeros(1, 3, 2, requires_grad=True)
    found = losses.regression(scores, norms, torch.ones(1, 3))
    found.sum().backward()
    assert found.tolist() == [0.0]
    assert scores.grad is not None
    assert bool(torch.isfinite(scores.grad).all())


def test_hidden_distance_is_relative_and_over_predicted_positions() -> None:
    theirs = [random(2, 4, 8, seed=s) for s in range(3)]
    labels = torch.zeros(2, 4, dtype=torch.int64)
    labels[1, 2:] = losses.IGNORED
    assert float(losses.hidden_distance(theirs, theirs, labels)) == 0.0
    zero = [torch.zeros_like(t) for t in theirs]
    # ||0 - t||^2 / ||t||^2, each of 12 ratios rounded once or twice
    assert float(losses.hidden_distance(zero, theirs, labels)) == pytest.approx(1.0, rel=1e-6)
    # position s counts when label s + 1 does: here 0, 1, 2 and 0 of the two sequences
    ours = [t.clone() for t in theirs]
    for t in ours:
        t[0, 3] += 1
        t[1, 1:] += 1
    assert float(losses.hidden_distance(ours, theirs, labels)) == 0.0
    ours[0][0, 0] *= 3
    # one of 4 tokens, in one of 3 layers, at (3 - 1)^2
    assert float(losses.hidden_distance(ours, theirs, labels)) == pytest.approx(4 / 12, rel=1e-6)


def test_a_batch_without_targets_has_loss_zero() -> None:
    logits = random(1, 3, 5)
    labels = torch.full((1, 3), losses.IGNORED)
    assert float(losses.language_model(logits, labels)) == 0.0
    assert float(losses.hidden_distance([logits], [logits], labels)) == 0.0
