"""Networks trained to do what a projection does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaconvert.layerwise.projection_data import Matrix
from adaconvert.methods.d2dmoe.distil import (
    DistilQuality,
    DistilSettings,
    NetworkQuality,
    distil,
)
from adaconvert.methods.d2dmoe.quality import RouterQuality

SETTINGS = DistilSettings(
    neurons=12, up_bias=False, down_bias=False, steps=1, batch_tokens=64, learning_rate=1e-8
)


def problem(bias: bool = False, *, even: bool = True) -> tuple[torch.Tensor, Matrix]:
    """Return inputs whose outputs lie mostly along six directions, and a projection.

    The causes of uneven inputs are never negative, so that neurons for both signs are a waste.
    """
    generator = torch.Generator().manual_seed(0)
    causes = torch.randn(800, 6, generator=generator)
    causes = causes if even else causes.abs()
    inputs = causes @ torch.randn(6, 16, generator=generator)
    inputs += 0.1 * torch.randn(800, 16, generator=generator)
    weight = torch.randn(10, 16, generator=generator)
    return inputs, Matrix(weight=weight, bias=weight[:, 0] if bias else None)


def run(found: object, x: torch.Tensor) -> torch.Tensor:
    up, down = found.up, found.down  # type: ignore[attr-defined]
    hidden = torch.relu(torch.nn.functional.linear(x, up, found.up_bias))  # type: ignore[attr-defined]
    return torch.nn.functional.linear(hidden, down, found.down_bias)  # type: ignore[attr-defined]


def test_it_starts_as_the_best_linear_map_of_half_its_neurons() -> None:
    inputs, matrix = problem()
    found = distil(inputs, matrix, SETTINGS)
    outputs = matrix(inputs[:-80]).double()
    values, directions = torch.linalg.eigh(outputs.T @ outputs)
    best = directions[:, values.argsort(descending=True)[:6]].float()
    expected = matrix(inputs) @ best @ best.T
    # a step of 1e-8 moves weights of order 1 by as much
    assert (run(found, inputs) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert found.quality.zeros == pytest.approx(0.5, abs=0.05)
    assert found.quality.linear < 1e-9, "ten outputs have at most ten directions"


def test_training_lowers_the_error_on_tokens_it_has_not_seen() -> None:
    inputs, matrix = problem(even=False)
    rough = replace(SETTINGS, neurons=8)
    trained = replace(rough, steps=300, learning_rate=3e-3, sparsity=0.0)
    before = distil(inputs, matrix, rough).quality
    after = distil(inputs, matrix, trained).quality
    assert after.error < 0.95 * before.error
    assert after.linear < after.error, "no network is better than the best linear map of its rank"
    assert after.tokens == 80


def test_the_report_is_what_the_network_does() -> None:
    inputs, matrix = problem(bias=True)
    settings = replace(
        SETTINGS, steps=50, learning_rate=3e-3, up_bias=True, down_bias=True, neurons=9
    )
    found = distil(inputs, matrix, settings)
    assert found.up_bias is not None
    held = inputs[-80:]
    wanted = matrix(held)
    missed = (run(found, held) - wanted).square().sum()
    error = float(missed / (wanted - wanted.mean(dim=0)).square().sum())
    assert found.quality.error == pytest.approx(error, rel=1e-4)


def test_the_penalty_makes_hidden_units_zero() -> None:
    inputs, matrix = problem(even=False)
    settings = replace(SETTINGS, steps=300, learning_rate=3e-3, sparsity=0.0)
    plain = distil(inputs, matrix, settings).quality
    sparse = distil(inputs, matrix, replace(settings, sparsity=1e-2)).quality
    assert sparse.zeros > plain.zeros + 0.05
    assert sparse.error > plain.error


def test_the_same_seed_gives_the_same_bytes() -> None:
    inputs, matrix = problem()
    settings = replace(SETTINGS, steps=20, learning_rate=3e-3)
    first, second = (distil(inputs, matrix, settings) for _ in range(2))
    other = distil(inputs, matrix, replace(settings, seed=1))
    assert torch.equal(first.up, second.up)
    assert torch.equal(first.down, second.down)
    assert not torch.equal(first.up, other.up)


@pytest.mark.parametrize("neurons", [3, 40])
def test_fewer_and_more_neurons_than_directions(neurons: int) -> None:
    inputs, matrix = problem()
    found = distil(inputs, matrix, replace(SETTINGS, neurons=neurons))
    assert found.up.shape == (neurons, 16)
    assert found.up.isfinite().all()
    assert found.down.isfinite().all()


def test_a_projection_that_gives_nothing() -> None:
    inputs, _ = problem()
    zero = Matrix(weight=torch.zeros(10, 16), bias=None)
    found = distil(inputs, zero, replace(SETTINGS, steps=5))
    assert run(found, inputs).abs().max() < 1e-3
    assert found.quality.error == pytest.approx(0.0, abs=1e-3)


def test_quality_survives_as_text() -> None:
    own = DistilQuality(error=0.1, linear=0.01, zeros=0.5, tokens=3)
    router = RouterQuality(r2=0.1, spearman=0.2, captured={"E/2": 1.0}, constant={}, tokens=3)
    for quality in (
        NetworkQuality(distilled=own, router=router),
        NetworkQuality(distilled=None, router=router),
        NetworkQuality(distilled=own, router=None),
    ):
        assert NetworkQuality.load(quality.dump()) == quality
    assert "relative error 0.100 (a linear map of its size 0.010)" in own.line()
