"""A two-layer network trained to give what a projection gives.

Shapes: T tokens, d inputs, o outputs, f neurons.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.methods.d2dmoe.losses import square_hoyer
from adaconvert.methods.d2dmoe.quality import RouterQuality
from adaconvert.methods.d2dmoe.router import HELD_OUT, MOST_HELD_OUT, Batches, decay

if TYPE_CHECKING:
    import torch

    from adaconvert.layerwise.projection_data import Matrix

#: tokens computed at a time.
_CHUNK = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilSettings:
    """How a network is trained.

    Attributes:
        neurons: f.
        up_bias, down_bias: which layers have one.
        steps: optimiser steps.
        batch_tokens: tokens of a step, drawn without replacement until all have been seen.
        learning_rate: peak, decayed to 0 by a cosine.
        sparsity: coefficient of the square Hoyer measure of the hidden units, reached linearly.
        seed: of the initial weights and the batches.
    """

    neurons: int
    up_bias: bool
    down_bias: bool
    steps: int = 1000
    batch_tokens: int = 512
    learning_rate: float = 1e-3
    sparsity: float = 1e-3
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DistilQuality:
    """A network against its projection on tokens it was not trained on.

    Attributes:
        error: squared error over the variance of the projection's outputs; 0 is perfect, 1 is what
            their mean would do.
        linear: the same of the best linear map of as many FLOPs, of rank f: what the network
            has to stay near for its experts to be worth while.
        zeros: share of its hidden units that are exactly zero.
        tokens: number of tokens.
    """

    error: float
    linear: float
    zeros: float
    tokens: int

    def to_json(self) -> dict[str, object]:
        """Return the numbers as JSON data."""
        return {
            "error": self.error,
            "linear": self.linear,
            "zeros": self.zeros,
            "tokens": self.tokens,
        }

    def line(self) -> str:
        """Return the numbers as text."""
        return (
            f"relative error {self.error:.3f} (a linear map of its size {self.linear:.3f}), "
            f"{self.zeros:.0%} of its hidden units zero"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkQuality:
    """How good one fitted network is.

    Attributes:
        distilled: against the projection; None where the network was there before.
        router: against its experts' contributions; None where no router was fitted.
    """

    distilled: DistilQuality | None
    router: RouterQuality | None

    def to_json(self) -> dict[str, object]:
        """Return both as JSON data."""
        return {
            "distilled": None if self.distilled is None else self.distilled.to_json(),
            "router": None if self.router is None else self.router.to_json(),
        }

    def dump(self) -> str:
        """Return both as text."""
        return json.dumps(list(self.to_json().values()))

    @classmethod
    def load(cls, text: str) -> NetworkQuality:
        """Return what `dump` wrote."""
        distilled, router = json.loads(text)
        return cls(
            distilled=None if distilled is None else DistilQuality(**distilled),
            router=None if router is None else RouterQuality(**router),
        )

    def line(self) -> str:
        """Return both in words."""
        return "; ".join(part.line() for part in (self.distilled, self.router) if part is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled:
    """A trained network.

    Attributes:
        up: float32 [f, d].
        up_bias: [f] or None.
        down: [o, f].
        down_bias: [o] or None.
        quality: of it.
    """

    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None
    quality: DistilQuality


def distil(
    inputs: torch.Tensor,
    matrix: Matrix,
    settings: DistilSettings,
    *,
    step_done: Callable[[], object] = lambda: None,
) -> Distilled:
    """Return a network that gives for each input about what the projection gives.

    The last tenth of the tokens is kept for the report. The same inputs, settings and number of
    threads give the same bytes.

    Args:
        inputs: what the projection receives, float32 [T, d].
        matrix: the projection.
        settings: how to train.
        step_done: called after every step.

    Source: Szatkowski et al. 2024, arXiv 2310.04361, `rep_distill_train.py` of the official code:
        each projection by itself, on what the original model gives it; squared error plus a square
        Hoyer measure that is switched on linearly; ReLU; biases where the original has them. Our
        difference: it starts as the best linear map of rank f / 2 (each direction as a pair of
        neurons, for either sign) and not at random. `scripts/stage5_table.py` measures how close it
        comes; on SmolLM2-135M, layer 14, the best linear map of rank f, which costs as much, is two
        to five times closer still.
    """
    held = min(max(len(inputs) // round(1 / HELD_OUT), 1), MOST_HELD_OUT)
    training = inputs[:-held] if len(inputs) > held else inputs
    moments = _moments(training, matrix)
    start = _start(training, matrix, moments, settings)
    weights = _trained(training, matrix, start, settings, step_done)
    quality = _judged(inputs[-held:], matrix, weights, moments, settings.neurons)
    bias = weights.get("down_bias")
    if bias is not None and matrix.bias is not None:
        bias = bias + matrix.bias
    return Distilled(
        up=weights["up"],
        up_bias=weights.get("up_bias"),
        down=weights["down"],
        down_bias=bias,
        quality=quality,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    """Principal directions of a projection's outputs, its bias left out.

    Attributes:
        directions: [o, o], strongest first.
        powers: mean square along each, [o].
    """

    directions: torch.Tensor
    powers: torch.Tensor


def _moments(training: torch.Tensor, matrix: Matrix) -> _Moments:
    import torch

    total: Any = 0
    for piece in torch.split(training, _CHUNK):
        outputs = (piece @ matrix.weight.T).double()
        total = total + outputs.T @ outputs
    powers, directions = torch.linalg.eigh(total / len(training))
    return _Moments(directions.flip(1).float(), powers.flip(0).clamp_min(0).float())


def _start(
    training: torch.Tensor, matrix: Matrix, moments: _Moments, settings: DistilSettings
) -> dict[str, torch.Tensor]:
    """Return the network that is the best linear map of rank f / 2, each hidden unit of mean square
    about one half."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    outputs, inputs = matrix.weight.shape
    count, device = settings.neurons, training.device
    scale = 1e-2 / inputs**0.5
    up = (torch.randn(count, inputs, generator=generator) * scale).to(device)
    down = (torch.randn(outputs, count, generator=generator) * scale).to(device)
    pairs = min(count // 2, outputs)
    sizes = moments.powers[:pairs].sqrt().clamp_min(1e-12 * float(moments.powers[0].sqrt()) + 1e-30)
    along = moments.directions[:, :pairs]
    rows, columns = (along.T @ matrix.weight) / sizes[:, None], along * sizes
    signs = torch.tensor([1.0, -1.0], device=device)
    up[: 2 * pairs] = (rows[:, None] * signs[:, None]).reshape(2 * pairs, inputs)
    down[:, : 2 * pairs] = (columns[:, :, None] * signs).reshape(outputs, 2 * pairs)
    found = {"up": up, "down": down}
    if settings.up_bias:
        found["up_bias"] = torch.zeros(count, device=device)
    if settings.down_bias:
        found["down_bias"] = torch.zeros(outputs, device=device)
    return found


def _hidden(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import linear

    return linear(inputs, weights["up"], weights.get("up_bias")).relu()


def _output(weights: dict[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import linear

    return linear(hidden, weights["down"], weights.get("down_bias"))


def _trained(
    training: torch.Tensor,
    matrix: Matrix,
    start: dict[str, torch.Tensor],
    settings: DistilSettings,
    step_done: Callable[[], object],
) -> dict[str, torch.Tensor]:
    """Return the trained weights; outputs are in units of their size while training."""
    import torch

    generator = torch.Generator().manual_seed(settings.seed + 1)
    unit_in, unit_out = _unit(training), _unit(training[:_CHUNK] @ matrix.weight.T)
    weights = {
        "up": start["up"] * unit_in,
        "down": start["down"] / unit_out,
        **{name: value.clone() for name, value in start.items() if "bias" in name},
    }
    for value in weights.values():
        value.requires_grad_()
    optimiser = torch.optim.AdamW(weights.values(), lr=settings.learning_rate, weight_decay=0.0)
    batches = Batches(len(training), settings.batch_tokens, generator)
    for step in range(settings.steps):
        rows = next(batches).to(training.device)
        x = training[rows]
        hidden = _hidden(weights, x / unit_in)
        missed = _output(weights, hidden) - (x @ matrix.weight.T) / unit_out
        loss = missed.square().mean()
        if settings.sparsity:
            ramp = (step + 1) / settings.steps
            loss = loss + settings.sparsity * ramp * square_hoyer(hidden).mean()
        optimiser.param_groups[0]["lr"] = settings.learning_rate * decay(step, settings.steps)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        step_done()
    found = {name: value.detach() for name, value in weights.items()}
    found["up"] = found["up"] / unit_in
    found["down"] = found["down"] * unit_out
    if "down_bias" in found:
        found["down_bias"] = found["down_bias"] * unit_out
    return found


def _unit(values: torch.Tensor) -> float:
    return float(values.square().mean().sqrt()) or 1.0


def _judged(
    inputs: torch.Tensor,
    matrix: Matrix,
    weights: dict[str, torch.Tensor],
    moments: _Moments,
    neurons: int,
) -> DistilQuality:
    import torch

    wanted = torch.cat([piece @ matrix.weight.T for piece in torch.split(inputs, _CHUNK)])
    variance = float((wanted - wanted.mean(dim=0)).double().square().sum()) or 1.0
    hidden = torch.cat([_hidden(weights, piece) for piece in torch.split(inputs, _CHUNK)])
    missed = (_output(weights, hidden) - wanted).double().square().sum()
    best = moments.directions[:, :neurons]
    linear = (wanted @ best @ best.T - wanted).double().square().sum()
    return DistilQuality(
        error=float(missed) / variance,
        linear=float(linear) / variance,
        zeros=float((hidden == 0).float().mean()),
        tokens=len(inputs),
    )
