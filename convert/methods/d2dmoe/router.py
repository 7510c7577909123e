"""Fitting one expert-contribution router: from what an FFN receives to how much each expert adds.

Shapes: T tokens, H hidden size, E experts, W router width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaconvert.methods.d2dmoe.quality import RouterQuality, measure

if TYPE_CHECKING:
    import torch

#: tokens computed at a time.
_CHUNK = 2048
#: tokens that the scale of inputs and targets is read off.
PROBE = 1024
#: bytes of targets that are kept; beyond, they are computed anew in every step.
IN_MEMORY = 2 << 30
#: smallest mean square that the error of a token is relative to, in that of the median token.
FLOOR = 0.01
#: share of the tokens kept for the report, and the most of them.
HELD_OUT, MOST_HELD_OUT = 0.1, 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """How a contribution router is trained.

    Attributes:
        width: W. 128 for models up to GPT-2's size and 512 for Gemma-2B in the published scripts.
        steps: optimiser steps.
        batch_tokens: tokens of a step, drawn without replacement until all have been seen.
        learning_rate: peak, decayed to 0 by a cosine. 1e-3 or 3e-3 in the published scripts.
        loss: "relative" divides each token's targets and scores by the length of its target vector;
            "mse" does not (the paper).
        seed: of the initial weights and the batches.
    """

    width: int = 128
    steps: int = 1000
    batch_tokens: int = 256
    learning_rate: float = 3e-3
    loss: str = "relative"
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFit:
    """A trained router.

    Attributes:
        w1: float32 [W, H].
        w2: float32 [E, W].
        quality: how well its scores match the true contributions on tokens it was not trained on.
    """

    w1: torch.Tensor
    w2: torch.Tensor
    quality: RouterQuality


def scores(inputs: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
    """Return | w2 relu(w1 x) |, [T, H] -> [T, E]; never negative.

    Source: Szatkowski et al. 2024, arXiv 2310.04361, section 3.2; no biases and abs on the output
        as in the official code, which offers identity, relu and softplus as well.
    """
    from torch.nn.functional import linear

    return linear(linear(inputs, w1).relu(), w2).abs()


def fit_router(
    inputs: torch.Tensor,
    contributions: Callable[[torch.Tensor], torch.Tensor],
    settings: RouterSettings,
    *,
    step_done: Callable[[], object] = lambda: None,
) -> RouterFit:
    """Return a router that predicts the length of each expert's output.

    The last tenth of the tokens is kept for the report. Inputs and targets are scaled to unit size
    while training; the scales are folded into the weights afterwards, which changes no score
    because ReLU and abs pass positive factors through. The same inputs, settings and number of
    threads give the same bytes.

    Args:
        inputs: what the FFN receives, float32 [T, H].
        contributions: gives ||E_i(x)||_2, the output bias left out, [n, H] -> [n, E].
        settings: how to train.
        step_done: called after every step.

    Source: Szatkowski et al. 2024, arXiv 2310.04361, section 3.2: squared error, AdamW, the base
        model frozen. Our differences: the error of a token is relative to the size of its target,
        since tokens of language models differ a thousandfold and the rules that read the scores
        compare experts of one token (`loss="mse"` is the published one); w2 starts without negative
        entries, as the scores have none; a cosine decay. On SmolLM2-135M, 22k tokens, 1000 steps,
        held-out rank correlation with the published error / with the relative one / with w2
        positive too: layer 1, 32 experts of 48 neurons 0.52 / 0.55 / 0.58, 256 of 6 neurons
        0.36 / 0.42 / 0.41; layer 15 0.76 / 0.76 / 0.77 and 0.57 / 0.57 / 0.58.
    """
    held = min(max(len(inputs) // round(1 / HELD_OUT), 1), MOST_HELD_OUT)
    training = inputs[:-held] if len(inputs) > held else inputs
    targets = _Targets(training, contributions)
    w1, w2 = _trained(training, targets, settings, step_done)
    return RouterFit(w1=w1, w2=w2, quality=_judged(inputs[-held:], contributions, w1, w2))


def _trained(
    training: torch.Tensor,
    targets: _Targets,
    settings: RouterSettings,
    step_done: Callable[[], object],
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(settings.seed)
    size_in, size_out = _size(training[:PROBE]), _size(targets.first)
    w1 = _uniform((settings.width, training.shape[1]), generator).to(training.device)
    w2 = _uniform((targets.first.shape[1], settings.width), generator).abs().to(training.device)
    w1.requires_grad_()
    w2.requires_grad_()
    optimiser = torch.optim.AdamW([w1, w2], lr=settings.learning_rate)
    batches = Batches(len(training), settings.batch_tokens, generator)
    for step in range(settings.steps):
        rows = next(batches).to(training.device)
        target = targets(rows) / size_out
        error = (scores(training[rows] / size_in, w1, w2) - target).square()
        if settings.loss == "relative":
            error = error / target.square().mean(dim=1, keepdim=True).clamp_min(FLOOR)
        optimiser.param_groups[0]["lr"] = settings.learning_rate * decay(step, settings.steps)
        optimiser.zero_grad()
        error.mean().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        step_done()
    return w1.detach() / size_in, w2.detach() * size_out


class _Targets:
    """The contributions of training tokens: computed once where they fit, else when asked for."""

    def __init__(
        self, training: torch.Tensor, contributions: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        import torch

        self._training, self._contributions = training, contributions
        self.first = contributions(training[:PROBE])
        self._all: torch.Tensor | None = None
        if 4 * len(training) * self.first.shape[1] <= IN_MEMORY:
            self._all = torch.cat([contributions(p) for p in torch.split(training, _CHUNK)])

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the contributions of the tokens `rows` [n], [n, E]."""
        if self._all is not None:
            return self._all[rows]
        return self._contributions(self._training[rows])


def _judged(
    inputs: torch.Tensor,
    contributions: Callable[[torch.Tensor], torch.Tensor],
    w1: torch.Tensor,
    w2: torch.Tensor,
) -> RouterQuality:
    import torch

    pieces = torch.split(inputs, _CHUNK)
    guessed = torch.cat([scores(piece, w1, w2) for piece in pieces])
    return measure(guessed, torch.cat([contributions(piece) for piece in pieces]))


def _size(values: torch.Tensor) -> float:
    """Return the median over rows of the root mean square; outliers do not set it."""
    rows = values.square().mean(dim=1).sqrt()
    middle = float(rows.median())
    return middle if middle > 0 else float(rows.mean()) or 1.0


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Return a matrix as `nn.Linear` starts: uniform within 1 / sqrt(columns)."""
    import torch

    return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])


class Batches:
    """Rows of each step, drawn without replacement epoch after epoch."""

    def __init__(self, tokens: int, size: int, generator: torch.Generator) -> None:
        self._tokens, self._size, self._generator = tokens, min(size, tokens), generator
        self._left: list[torch.Tensor] = []

    def __next__(self) -> torch.Tensor:
        import torch

        if not self._left:
            order = torch.randperm(self._tokens, generator=self._generator)
            whole = self._tokens // self._size * self._size
            self._left = list(torch.split(order[:whole], self._size))
        return self._left.pop()


def decay(step: int, steps: int) -> float:
    """Return the learning rate's factor: 1 at first, then a cosine to nearly 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))
