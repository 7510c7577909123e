"""The balance loss of null experts as a formula, and what is told of their use."""

from __future__ import annotations

import torch
from torch import Tensor

from adaconvert.train.health import LayerHealth, notes
from adaconvert.train.losses import balance, null_balance

EPS = torch.finfo(torch.float32).eps


def assert_close(found: Tensor, expected: Tensor, roundings: float) -> None:
    assert float((found - expected).norm()) <= roundings * EPS * float(expected.norm())


def example() -> tuple[Tensor, Tensor, Tensor]:
    """Return probabilities [2, 5, 9], counts [2, 9] and a mask, of 4 real and 5 null experts."""
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(2, 5, 9, generator=generator).softmax(dim=-1)
    counts = torch.randint(1, 9, (2, 9), generator=generator).float()
    return probabilities, counts, torch.ones(2, 5)


def test_with_even_targets_it_is_the_loss_of_adamoe() -> None:
    probabilities, counts, mask = example()
    grouped = counts.clone()
    grouped[:, 4:] = counts[:, 4:].mean(dim=1, keepdim=True)
    expected = balance(probabilities, grouped, mask)
    found = null_balance(probabilities, counts, mask, experts=4, share=torch.tensor(4 / 9))
    assert_close(found, expected, 8)
    # and not the plain one
    assert float((found - balance(probabilities, counts, mask)).abs().max()) > 1e-3


def test_it_is_one_at_the_targets_whatever_they_are() -> None:
    probabilities, _, mask = example()
    for share in (0.0, 0.05, 0.3, 0.9, 1.0):
        goals = torch.tensor([share / 4] * 4 + [(1 - share) / 5] * 5)
        counts = 1000 * goals.expand(2, 9)
        found = null_balance(probabilities, counts, mask, experts=4, share=torch.tensor(share))
        assert_close(found, torch.ones(2), 16)


def test_choices_may_be_permuted_inside_the_null_group_alone() -> None:
    probabilities, counts, mask = example()
    share = torch.tensor(0.6)
    before = null_balance(probabilities, counts, mask, experts=4, share=share)
    inside = counts[:, [0, 1, 2, 3, 7, 4, 8, 6, 5]]
    after = null_balance(probabilities, inside, mask, experts=4, share=share)
    assert_close(after, before, 8)
    across = counts[:, [8, 1, 2, 3, 4, 5, 6, 7, 0]]
    moved = null_balance(probabilities, across, mask, experts=4, share=share)
    assert float((moved - before).abs().min()) > 1e-3


def test_the_null_group_is_pressed_evenly() -> None:
    probabilities, counts, mask = example()
    probabilities.requires_grad_()
    null_balance(probabilities, counts, mask, experts=4, share=torch.tensor(0.6)).sum().backward()
    pressure = probabilities.grad
    assert pressure is not None
    assert torch.equal(pressure[..., 4:], pressure[..., 4:5].expand(-1, -1, 5))
    assert pressure[..., :4].unique().numel() > 2


def test_what_is_used_hardly_ever_is_not_judged() -> None:
    def layer(*counts: int) -> LayerHealth:
        share = sum(counts) / 200
        return LayerHealth(
            layer=0, counts=counts, tokens=100, entropy=0.5, share=share, idle=1 - 2 * share
        )

    assert (layer(9, 0, 0, 0).crowding, layer(9, 0, 0, 0).dead) == (0.0, ())
    assert (layer(0, 0, 0, 0).crowding, layer(0, 0, 0, 0).dead) == (0.0, ())
    assert (layer(10, 0, 0, 0).crowding, layer(10, 0, 0, 0).dead) == (1.0, (1, 2, 3))


def test_budgets_that_were_missed_are_told() -> None:
    rows = [(0, 0.9, 0.64), (1, 0.9, 0.641), (2, 0.5, 0.549), (3, 0.5, 0.44), (4, None, 0.2)]
    rows += [(5, 0.3, None), (6, 0.2, 0.4), (7, 0.2, 0.3)]
    budgets = [{"layer": a, "target": b, "share": c} for a, b, c in rows]
    assert notes({"layers": [], "steps": 3, "budgets": budgets}) == [
        "layers 0, 1: ran 0.64 of their experts, budget 0.90",
        "layer 3: ran 0.44 of its experts, budget 0.50",
        "layers 6, 7: ran 0.30 to 0.40 of their experts, budget 0.20",
    ]


def test_crowding_with_null_experts_rounds_to_the_nearest() -> None:
    def crowding(*counts: int, tokens: int) -> float:
        share = sum(counts) / (2 * tokens)
        found = LayerHealth(
            layer=0, counts=counts, tokens=tokens, entropy=0.5, share=share, idle=0.0
        )
        return found.crowding

    # 2.01 experts a token: of two experts, not of three
    assert crowding(60, 60, 51, 30, tokens=100) == 0.6
    assert crowding(100, 100, 1, 0, tokens=100) == 1.0
    # 1.2: what one expert gets of all tokens
    assert crowding(60, 30, 20, 10, tokens=100) == 0.6
    # fewer than one
    assert crowding(40, 10, 0, 0, tokens=100) == 0.8
    assert crowding(100, 100, 100, 90, tokens=100) == 0.0
