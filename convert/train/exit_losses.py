"""Losses of exits, without the logits of more than a few positions at a time.

The logits of an exit are as many as those of the model, so those of all exits would be most of the
memory of a step. Here a chunk of positions goes through the tail of one exit after the other, and
its gradients are taken at once; what is kept is gradients of states and of the tails' parameters.
The last layer's logits, which exits are compared with, are computed once a chunk for all of them.

Shapes: N predicted positions, C of a chunk, d hidden size, V vocabulary, L blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.train.exit_config import GRADUAL, NONE
from adaconvert.train.losses import IGNORED, wide

#: (exit or L, states [C, d]) -> logits [C, V].
LogitsOf = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked of the exits of one pass.

    Attributes:
        end: L.
        ce: place -> factor of its cross-entropy; L for the model's own end.
        kd: exit -> factor of its divergence from the end, which gets no gradient of it.
        temperature: of the divergence, which is multiplied by its square.
        compare: say where an exit chooses as the end does.
        chunk: C.
    """

    end: int
    ce: Mapping[int, float]
    kd: Mapping[int, float] = field(default_factory=dict)
    temperature: float = 1.0
    compare: bool = False
    chunk: int = 256

    @property
    def places(self) -> tuple[int, ...]:
        """Return what is computed, the end first, because the others may be compared with it."""
        found = sorted({*self.ce, *self.kd})
        needs_end = self.end in found or bool(self.kd) or self.compare
        return (*((self.end,) if needs_end else ()), *(at for at in found if at != self.end))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What exits lose; means over the N positions.

    Attributes:
        total: [] weighted sum, with gradients.
        ce, kd: place -> [] mean, without.
        agrees: exit -> bool [N], it chooses as the end does; empty unless asked for.
    """

    total: Tensor
    ce: Mapping[int, Tensor]
    kd: Mapping[int, Tensor]
    agrees: Mapping[int, Tensor]


def predicted(states: Mapping[int, Tensor], labels: Tensor) -> tuple[dict[int, Tensor], Tensor]:
    """Return place -> [N, d] and labels [N] of the positions whose next token counts.

    Args:
        states: place -> [B, S, d].
        labels: [B, S], `IGNORED` where a token is not to be predicted.
    """
    counted = labels[:, 1:] != IGNORED
    return {at: state[:, :-1][counted] for at, state in states.items()}, labels[:, 1:][counted]


def exit_losses(
    logits_of: LogitsOf,
    states: Mapping[int, Tensor],
    targets: Tensor,
    wanted: Wanted,
    parameters: Sequence[nn.Parameter],
) -> Found:
    """Return the losses of exits over N positions.

    Args:
        logits_of: the tail of a place.
        states: place -> [N, d], with gradients where they are wanted.
        targets: [N] tokens.
        wanted: what is asked.
        parameters: of the tails, those that learn.
    """
    places = wanted.places
    exact = wide(states[places[0]][:0]).dtype
    job = _Job(logits_of, targets, wanted, tuple(parameters), exact)
    function: Any = _Chunked
    total = function.apply(job, *(states[at] for at in places), *parameters)
    count = max(int(targets.shape[0]), 1)
    return Found(
        total=total,
        ce={at: value / count for at, value in job.ce.items()},
        kd={at: value / count for at, value in job.kd.items()},
        agrees={at: torch.cat(found) for at, found in job.agrees.items() if found},
    )


class _Job:
    """The chunks of one call.

    Attributes:
        ce, kd: place -> sum over the positions so far.
        agrees: exit -> bool [C] of each chunk.
    """

    def __init__(
        self,
        logits_of: LogitsOf,
        targets: Tensor,
        wanted: Wanted,
        parameters: tuple[nn.Parameter, ...],
        exact: torch.dtype,
    ) -> None:
        self._logits_of, self._targets, self._wanted = logits_of, targets, wanted
        self._parameters = parameters
        zero = torch.zeros((), device=targets.device, dtype=exact)
        self.total = zero.clone()
        self.ce = {at: zero.clone() for at in wanted.places}
        self.kd = {at: zero.clone() for at in wanted.kd}
        self.agrees: dict[int, list[Tensor]] = {at: [] for at in wanted.places if at != wanted.end}
        self._sums: dict[int, Tensor] = {}

    def run(self, states: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of the weighted mean by the states, then by the parameters.

        Args:
            states: [N, d] of each place.
            needs: which of them want a gradient.
        """
        count = int(self._targets.shape[0])
        grads = [
            torch.zeros_like(state) if need else None
            for state, need in zip(states, needs, strict=True)
        ]
        for start in range(0, count, self._wanted.chunk):
            rows = slice(start, min(start + self._wanted.chunk, count))
            self._chunk(states, grads, rows, 1 / count)
        own = [self._sums.get(index) for index in range(len(self._parameters))]
        return [*grads, *own]

    def _chunk(
        self, states: Sequence[Tensor], grads: list[Tensor | None], rows: slice, scale: float
    ) -> None:
        """Add one chunk to every sum; `rows` are its positions."""
        wanted, teacher, chosen = self._wanted, None, None
        for index, at in enumerate(wanted.places):
            factors = (wanted.ce.get(at, 0.0), wanted.kd.get(at, 0.0))
            learns = sum(factors) > 0 and (grads[index] is not None or bool(self._parameters))
            with torch.set_grad_enabled(learns):
                leaf = states[index][rows].detach()
                leaf.requires_grad_(learns and grads[index] is not None)
                given = self._logits_of(at, leaf)
            logits = wide(given.detach())
            if at == wanted.end:
                chosen = logits.argmax(-1) if wanted.compare else None
                teacher = Teacher.of(logits, wanted.temperature) if wanted.kd else None
            elif chosen is not None:
                self.agrees[at].append(logits.argmax(-1) == chosen)
            found = softmax_losses(logits, self._targets[rows], teacher, *factors, learns=learns)
            self.ce[at] += found.ce
            self.total += found.ce * (factors[0] * scale)
            if found.kd is not None:
                self.kd[at] += found.kd
                self.total += found.kd * (factors[1] * scale)
            if found.grad is not None and given.requires_grad:
                slope = found.grad.mul_(scale).to(given.dtype)
                self._backward(given, slope, leaf, grads, index, rows)

    def _backward(
        self,
        logits: Tensor,
        slope: Tensor,
        leaf: Tensor,
        grads: list[Tensor | None],
        index: int,
        rows: slice,
    ) -> None:
        """Add the gradients of one exit at one chunk."""
        inputs = [*([leaf] if leaf.requires_grad else []), *self._parameters]
        found = list(torch.autograd.grad(logits, inputs, slope, allow_unused=True))
        mine = grads[index]
        if leaf.requires_grad:
            grad = found.pop(0)
            if mine is not None and grad is not None:
                mine[rows] = grad
        for number, grad in enumerate(found):
            if grad is None:
                continue
            if number in self._sums:
                self._sums[number] += grad
            else:
                self._sums[number] = grad.clone()


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """What exits learn from at the positions of a chunk.

    Attributes:
        shares: [C, V] p = softmax(z / temperature) of its logits z.
        negentropy: [C] sum of p log p.
    """

    shares: Tensor
    negentropy: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, temperature: float) -> Teacher:
        """Return the teacher with logits z [C, V]."""
        scaled = logits if temperature == 1 else logits / temperature
        shares, log_sums = _softmax(scaled)
        # sum of p (z - log sum exp z): where p is 0, so is its part
        negentropy = torch.linalg.vecdot(shares, scaled) - log_sums
        return cls(shares=shares, negentropy=negentropy, temperature=temperature)


@dataclass(frozen=True, kw_only=True)
class Softmaxed:
    """Losses of logits, summed over C positions.

    Attributes:
        ce: [].
        kd: [], None where none is wanted.
        grad: [C, V] of the weighted sum by the logits, None unless asked for.
    """

    ce: Tensor
    kd: Tensor | None
    grad: Tensor | None


def softmax_losses(
    logits: Tensor,
    targets: Tensor,
    teacher: Teacher | None,
    ce: float,
    kd: float,
    *,
    learns: bool,
) -> Softmaxed:
    """Return cross-entropy, divergence from a teacher and their gradient in closed form.

    Both come from one softmax, and the gradient is written over it: (p - 1[target]) for the
    cross-entropy and T (p_T - teacher) for the divergence times T^2, T the temperature. Taken
    through autograd, each costs several more passes over [C, V], which is most of a step on a CPU.

    Args:
        logits: [C, V].
        targets: [C].
        teacher: of the divergence; none is computed without.
        ce, kd: their factors in the gradient.
        learns: whether the gradient is wanted.
    """
    rows = torch.arange(len(targets), device=logits.device)
    shares, log_sums = _softmax(logits)
    lost = (log_sums - logits[rows, targets]).sum()
    diverged = None
    if kd and teacher is not None:
        degrees = teacher.temperature
        scaled = logits if degrees == 1 else logits / degrees
        flat, sums = (None, log_sums) if degrees == 1 else _softmax(scaled)
        apart = teacher.negentropy - torch.linalg.vecdot(teacher.shares, scaled) + sums
        diverged = apart.sum() * degrees**2
        if learns:
            if flat is None:
                shares.mul_(ce + kd)
            else:
                shares.mul_(ce).add_(flat, alpha=kd * degrees)
            shares.sub_(teacher.shares, alpha=kd * degrees)
    elif learns and ce != 1:
        shares.mul_(ce)
    if learns:
        shares[rows, targets] -= ce
    return Softmaxed(ce=lost, kd=diverged, grad=shares if learns else None)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax [C, V] and log-sum-exp [C] of logits, from one pass of exponentials."""
    top = logits.amax(-1, keepdim=True)
    shares = (logits - top).exp_()
    sums = shares.sum(-1, keepdim=True)
    return shares.div_(sums), (sums.log() + top).squeeze(-1)


class _Chunked(torch.autograd.Function):
    """Total loss of a job; its gradients are there when it is."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> Tensor:
        states = tensors[: len(job.ce)]
        needs = ctx.needs_input_grad[1 : 1 + len(states)]
        found = job.run(states, needs)
        ctx.kept = [value is not None for value in found]
        ctx.save_for_backward(*(value for value in found if value is not None))
        return job.total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return (None, *(next(saved) * grad if kept else None for kept in ctx.kept))


def confidence_loss(logits: Tensor, agrees: Tensor) -> Tensor:
    """Return the balanced cross-entropy of a classifier that says whether its exit agrees, [].

    Both answers weigh half, however often each is right; one that does not occur counts nothing.

    Args:
        logits: [N].
        agrees: bool [N].

    Source: CALM, 2207.07061, section 3.5: independent cross-entropy, balanced by frequency.
    """
    each = functional.binary_cross_entropy_with_logits(
        wide(logits), agrees.to(wide(logits).dtype), reduction="none"
    )
    means = [each[answer].mean() for answer in (agrees, ~agrees) if bool(answer.any())]
    return torch.stack(means).mean() if means else each.sum()


# -- LayerSkip


def skip_weights(
    layers: int, scale: float, enabled: Sequence[bool], chosen: Sequence[int] | None = None
) -> dict[int, float]:
    """Return place -> factor of LayerSkip's early-exit loss; they sum to 1.

    e(l) = scale x (0 + 1 + ... + l) for l < L - 1, e(L - 1) = L - 1 + scale x (0 + ... + L - 2),
    divided by their sum over the blocks that count.

    Args:
        layers: L.
        scale: e_scale.
        enabled: [L] which blocks the curriculum lets count; the last one always does.
        chosen: blocks before the exits that may count, None for all.

    Source: Elhoushi et al. 2024, 2404.16710, section 4.1.2.
    """
    last = layers - 1
    found = {}
    for layer in range(layers):
        if layer == last:
            found[layers] = last + scale * (last * (last - 1) / 2) if last else 1.0
        elif enabled[layer] and (chosen is None or layer + 1 in chosen):
            found[layer + 1] = scale * (layer * (layer + 1) / 2)
    total = sum(found.values())
    return {at: value / total for at, value in found.items() if value > 0}


def enabled_layers(
    curriculum: str, rotation: int, layers: int, step: int, steps: int
) -> list[bool]:
    """Return which of L blocks' exits count at a step, counted from 0, of `steps`.

    Rotational: every R-th block, shifted by one each step. Gradual: from the last one down, all
    from half the steps on.

    Source: LayerSkip, 2404.16710, section 4.1.2; torchtune, `EarlyExitCurriculum`.
    """
    last = layers - 1
    if curriculum == NONE:
        return [True] * layers
    if curriculum == GRADUAL:
        down = math.floor(min(1.0, 2 * step / steps) * last)
        return [layer >= last - down for layer in range(layers)]
    return [layer == last or (layer - step) % rotation == 0 for layer in range(layers)]
