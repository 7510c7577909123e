"""The square Hoyer measure: its range, its invariances, its gradient, and 16-bit inputs."""

from __future__ import annotations

import pytest
import torch

from adaconvert.methods.d2dmoe.losses import mean_square_hoyer, square_hoyer


def test_counts_equally_active_neurons() -> None:
    for active in (1, 2, 5, 8):
        row = torch.zeros(8)
        row[:active] = -0.3
        assert square_hoyer(row).item() == pytest.approx(active, rel=1e-6)
        assert square_hoyer(row, normalised=True).item() == pytest.approx(active / 8, rel=1e-6)


def test_does_not_change_with_the_scale() -> None:
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(square_hoyer(rows), square_hoyer(1000 * rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(square_hoyer(rows), square_hoyer(-rows), rtol=0, atol=0)


def test_a_token_without_activations_has_measure_and_gradient_zero() -> None:
    rows = torch.zeros(2, 4, requires_grad=True)
    square_hoyer(rows).sum().backward()
    assert torch.equal(square_hoyer(rows), torch.zeros(2))
    assert rows.grad is not None
    assert torch.equal(rows.grad, torch.zeros(2, 4))


def test_gradient_is_that_of_the_formula() -> None:
    rows = torch.rand(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32) + 0.1
    rows.requires_grad_()
    square_hoyer(rows).sum().backward()
    a = rows.detach().double()
    s, q = a.sum(-1, keepdim=True), a.square().sum(-1, keepdim=True)
    # d (s^2 / q) / da = 2 s / q - 2 a s^2 / q^2 for positive activations
    expected = 2 * s / q - 2 * a * (s / q).square()
    assert rows.grad is not None
    assert (rows.grad - expected).norm() <= 4 * torch.finfo(torch.float32).eps * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_sixteen_bit_activations_are_measured_in_float32(dtype: torch.dtype, scale: float) -> None:
    rows = (scale * torch.rand(4, 4096, generator=torch.Generator().manual_seed(0))).to(dtype)
    measured = square_hoyer(rows)
    assert measured.dtype == torch.float32
    wide = rows.double()
    expected = wide.abs().sum(-1).square() / wide.square().sum(-1)
    torch.testing.assert_close(measured.double(), expected, rtol=1e-5, atol=0)


def test_padding_does_not_count() -> None:
    rows = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[True, True, False], [True, False, False]])
    expected = square_hoyer(rows)[kept].mean()
    torch.testing.assert_close(mean_square_hoyer(rows, kept), expected, rtol=1e-6, atol=0)
    assert mean_square_hoyer(rows, torch.zeros_like(kept)).item() == 0
    assert mean_square_hoyer(rows[:0]).item() == 0
