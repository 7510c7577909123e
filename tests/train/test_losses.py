"""Losses against their definitions, and the penalty that joins the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from adaconvert.train import losses
from adaconvert.train.config import Sparsity
from adaconvert.train.sparsify import Meter

EPS = torch.finfo(torch.float32).eps


def test_square_hoyer_ranges_from_one_neuron_to_all() -> None:
    a = torch.tensor([[0.0, 3.0, 0.0, 0.0], [2.0, 2.0, -2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    a.requires_grad_()
    found = losses.square_hoyer(a)
    assert found.tolist() == [1.0, 4.0, 0.0]
    found.sum().backward()
    assert a.grad is not None
    assert a.grad[2].tolist() == [0.0] * 4


def test_language_model_loss_is_that_of_transformers() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, :3] = losses.IGNORED
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    # the same sums in the same order
    assert torch.equal(losses.language_model(logits, labels), expected)


def test_distillation_is_zero_for_the_teacher_itself_and_counts_predicted_positions_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 2, 5, 7, generator=generator)
    labels = torch.zeros(2, 5, dtype=torch.int64)
    # log-softmax of equal logits subtracts to exactly zero
    assert losses.distillation(logits, logits, labels, 2.0) == 0
    labels[1] = losses.IGNORED
    p, q = teacher[0, :-1].softmax(-1), logits[0, :-1].softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    found = losses.distillation(logits, teacher, labels, 1.0)
    # float32 sums of 7 terms of order one
    assert found == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
@pytest.mark.parametrize("norm", ["raw", "width"])
@pytest.mark.parametrize("masked", [False, True])
def test_penalty_adds_the_gradient_of_its_definition(penalty: str, norm: str, masked: bool) -> None:
    meter = Meter(Sparsity(penalty=penalty, coefficient=0.3, norm=norm))
    meter.ffn = 2
    z = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]) if masked else None
    meter.begin(coefficient=0.3, share=0.5, mask=mask)
    (meter.watch(torch.relu(z), 0) ** 2).sum().backward()
    assert z.grad is not None
    found, z.grad = z.grad, None
    a = torch.relu(z)
    real = torch.ones(6) if mask is None else mask.flatten().float()
    values = losses.PENALTIES[penalty](a).flatten() / (8 if norm == "width" else 1)
    mean = (values * real).sum() / real.sum()
    ((a**2).sum() + 0.3 * 0.5 / 2 * mean).backward()
    # the same float32 operations, added in another order
    assert (found - z.grad).norm() <= 4 * EPS * z.grad.norm()
    value, (zeros,), _ = meter.drain(1)
    assert value == pytest.approx(0.5 * float(mean.detach()), rel=1e-6)
    share = ((a == 0).float().mean(-1).flatten() * real).sum() / real.sum()
    assert zeros == pytest.approx(0.5 * float(share.detach()), rel=1e-6)


def test_watching_without_gradients_changes_nothing() -> None:
    meter = Meter(Sparsity(coefficient=1.0))
    a = torch.ones(2, 3)
    assert meter.watch(a, 0) is a
    assert meter.drain(1) == (0.0, [], [])
