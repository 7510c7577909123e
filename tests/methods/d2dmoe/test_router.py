"""Fitting a contribution router: what it can learn it learns, and the numbers on it are right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adaconvert.methods.d2dmoe import router
from adaconvert.methods.d2dmoe.quality import measure
from adaconvert.methods.d2dmoe.router import RouterSettings, fit_router, scores

SMALL = RouterSettings(width=32, steps=300, batch_tokens=64)
LONG = RouterSettings(width=32, steps=1000, batch_tokens=128)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def teacher(x: torch.Tensor) -> torch.Tensor:
    """Lengths of the outputs of six ReLU experts of eight neurons, [n, 12] -> [n, 6]."""
    hidden = (x @ drawn(12, 48, seed=3)).relu().reshape(-1, 6, 8)
    return torch.einsum("tem,emd->ted", hidden, drawn(6, 8, 12, seed=4)).norm(dim=2)


def test_learns_the_contributions_of_experts() -> None:
    fitted = fit_router(drawn(4000, 12), teacher, LONG)
    assert fitted.w1.shape == (32, 12)
    assert fitted.w2.shape == (6, 32)
    assert fitted.quality.r2 > 0.8
    assert fitted.quality.spearman > 0.8
    assert fitted.quality.captured["E/2"] > 0.97
    # better than the same experts for every token
    assert fitted.quality.captured["E/2"] > fitted.quality.constant["E/2"] + 0.05
    assert fitted.quality.tokens == 400


def test_scores_are_never_negative() -> None:
    assert bool((scores(drawn(50, 12), drawn(8, 12), drawn(6, 8, seed=3)) >= 0).all())


@pytest.mark.parametrize(("size_in", "size_out"), [(1e-3, 1.0), (1.0, 1e4), (1e3, 1e-4)])
def test_the_scale_of_inputs_and_contributions_does_not_matter(
    size_in: float, size_out: float
) -> None:
    x = drawn(1000, 12)
    plain = fit_router(x, teacher, SMALL)
    scaled = fit_router(x * size_in, lambda y: teacher(y / size_in) * size_out, SMALL)
    # the same training up to rounding, which 300 steps amplify
    assert scaled.quality.r2 == pytest.approx(plain.quality.r2, abs=0.02)
    assert scaled.quality.spearman == pytest.approx(plain.quality.spearman, abs=0.02)


def test_the_same_seed_gives_the_same_bytes_and_another_another() -> None:
    x = drawn(500, 12)
    first, again = fit_router(x, teacher, SMALL), fit_router(x, teacher, SMALL)
    other = fit_router(x, teacher, replace(SMALL, seed=1))
    assert torch.equal(first.w1, again.w1)
    assert torch.equal(first.w2, again.w2)
    assert not torch.equal(first.w1, other.w1)


def test_fitting_leaves_the_caller_s_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit_router(drawn(100, 12), teacher, RouterSettings(width=4, steps=3))
    assert torch.equal(torch.rand(3), expected)


def test_targets_too_large_to_keep_are_computed_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = drawn(500, 12)
    kept = fit_router(x, teacher, SMALL)
    monkeypatch.setattr(router, "IN_MEMORY", 0)
    anew = fit_router(x, teacher, SMALL)
    # a product of 64 rows may be summed in another order than one of 500
    torch.testing.assert_close(anew.w1, kept.w1, rtol=0.05, atol=0.02)


def test_giant_tokens_do_not_spoil_the_relative_loss() -> None:
    x = drawn(4000, 12)
    x[::20] *= 300
    kept = fit_router(x, teacher, LONG).quality
    lost = fit_router(x, teacher, replace(LONG, loss="mse")).quality
    assert kept.spearman > 0.8
    assert kept.spearman > lost.spearman + 0.02


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_few_tokens_are_enough_to_run(tokens: int) -> None:
    fitted = fit_router(drawn(tokens, 12), teacher, RouterSettings(width=4, steps=3))
    assert bool(fitted.w1.isfinite().all())
    assert fitted.quality.tokens == 1


def test_contributions_of_zero_do_not_make_it_fail() -> None:
    fitted = fit_router(drawn(50, 12), lambda x: torch.zeros(len(x), 3), SMALL)
    assert bool(fitted.w2.isfinite().all())
    assert fitted.quality.captured == {"E/4": 1.0, "E/2": 1.0}


def test_every_step_is_reported() -> None:
    seen: list[Any] = []
    fit_router(
        drawn(50, 12), teacher, RouterSettings(width=4, steps=7), step_done=lambda: seen.append(0)
    )
    assert len(seen) == 7


def test_quality_of_perfect_reversed_and_constant_scores() -> None:
    true = torch.tensor([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]])
    perfect = measure(true, true)
    assert (perfect.r2, perfect.spearman) == pytest.approx((1.0, 1.0))
    assert perfect.captured == pytest.approx({"E/4": 1.0, "E/2": 1.0})
    # each expert contributes the same on average, so a fixed choice of two holds 5 of 7
    assert perfect.constant["E/2"] == pytest.approx(10 / 14)
    assert perfect.tokens == 2
    wrong = measure(5 - true, true)
    assert wrong.spearman == pytest.approx(-1.0)
    assert wrong.captured == pytest.approx({"E/4": 1 / 4, "E/2": 3 / 7})
    scale = true.square().mean(1, keepdim=True).sqrt()
    constant = measure((true / scale).mean(0) * scale, true)
    assert constant.r2 == pytest.approx(0.0, abs=1e-6)
