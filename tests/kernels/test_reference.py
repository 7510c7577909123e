"""The reference of the kernels against a loop over tokens and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels.reference import expert_ffn


def loop(x: Tensor, mask: Tensor, tensors: dict[str, Tensor], width: int, shared: int) -> Tensor:
    """The definition: each token adds up the neurons of its experts, one at a time."""
    rows = []
    for token, chosen in zip(x, mask.tolist(), strict=True):
        neurons = list(range(shared))
        for expert, runs in enumerate(chosen):
            first = shared + expert * width
            neurons += range(first, first + width) if runs else ()
        out = torch.zeros_like(token) + tensors.get("down_bias", torch.zeros_like(token))
        for j in neurons:
            value = tensors["up"][j] @ token
            if "up_bias" in tensors:
                value = value + tensors["up_bias"][j]
            if "gate" in tensors:
                gate = tensors["gate"][j] @ token
                bias = tensors.get("gate_bias", torch.zeros_like(tensors["up"][:, 0]))
                value = value * functional.silu(gate + bias[j])
            else:
                value = functional.silu(value)
            out = out + value * tensors["down"][:, j]
        rows.append(out)
    return torch.stack(rows)


def tensors_of(*, glu: bool, biases: bool, neurons: int, hidden: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(neurons)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found = {"up": draw(neurons, hidden), "down": draw(hidden, neurons)}
    if glu:
        found["gate"] = draw(neurons, hidden)
    if biases:
        found |= {"up_bias": draw(neurons), "down_bias": draw(hidden)}
        if glu:
            found["gate_bias"] = draw(neurons)
    return found


@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("width", "shared"), [(1, 0), (3, 0), (3, 2), (12, 0)])
def test_reference_is_the_sum_over_selected_neurons(
    glu: bool, biases: bool, width: int, shared: int
) -> None:
    tensors = tensors_of(glu=glu, biases=biases, neurons=12 + shared)
    x = torch.randn(5, 6, dtype=torch.float64)
    mask = torch.rand(5, 12 // width) < 0.5
    mask[0] = False
    out = expert_ffn(x, mask, width=width, shared=shared, activation=functional.silu, **tensors)
    expected = loop(x, mask, tensors, width, shared)
    # float64 sums of at most 14 terms of order 10 in another order
    assert (out - expected).abs().max() <= 1e-12 * max(1.0, float(expected.abs().max()))


def test_gradients_of_everything_are_right() -> None:
    tensors = tensors_of(glu=True, biases=True, neurons=7)
    names = sorted(tensors)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    factors = torch.rand(3, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])

    def run(x: Tensor, factors: Tensor, *values: Tensor) -> Tensor:
        return expert_ffn(
            x,
            mask,
            width=2,
            shared=1,
            activation=torch.tanh,
            weights_per_expert=factors,
            **dict(zip(names, values, strict=True)),
        )

    values = [tensors[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, (x, factors, *values))


def test_expert_weights_scale_each_expert() -> None:
    tensors = tensors_of(glu=True, biases=False, neurons=8)
    x = torch.randn(2, 6, dtype=torch.float64)
    options = {"width": 4, "activation": functional.gelu, **tensors}
    first, second = torch.tensor([[True, False]] * 2), torch.tensor([[False, True]] * 2)
    factors = torch.tensor([[0.25, 3.0], [0.0, 1.0]], dtype=torch.float64)
    out = expert_ffn(x, first | second, weights_per_expert=factors, **options)
    parts = expert_ffn(x, first, **options), expert_ffn(x, second, **options)
    expected = factors[:, :1] * parts[0] + factors[:, 1:] * parts[1]
    assert (out - expected).abs().max() <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("glu", [True, False])
def test_a_known_activated_gate_is_taken(glu: bool) -> None:
    tensors = tensors_of(glu=glu, biases=True, neurons=8)
    x = torch.randn(2, 6, dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    first = ("gate", "gate_bias") if glu else ("up", "up_bias")
    gated = torch.tanh(functional.linear(x, *(tensors[name] for name in first)))
    options = {"width": 4, "activation": torch.tanh, **tensors}
    assert torch.equal(expert_ffn(x, mask, gated=gated, **options), expert_ffn(x, mask, **options))
