"""Losses of several output heads that share one matrix, without keeping logits.

Logits are made for a chunk of tokens at a time and turned in place into their own gradient, which
is multiplied into the gradients of hidden states and matrix at once. Kept for the backward are
the inputs and those gradients alone: of the hidden states in their dtype, and one of the matrix for
all heads in float32, for a bfloat16 or float16 matrix twice its size (float64 for float64). No
atomics: a second call gives the same bits.

Time and memory: kernels/README.md. At the vocabulary of 8192 measured there, torch 2.13's own
`linear_cross_entropy` is faster on a CPU and needs two to four times the memory; it is not called.

H heads, T tokens, d hidden size, V vocabulary, c tokens of a chunk.

Source: gradients in the forward, chunk by chunk, as in Liger Kernel, Hsu et al. 2024, arXiv
2410.10989, section 3.2; one gradient of the matrix for several heads is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adaconvert.kernels import head_losses
from adaconvert.kernels.head_losses import Head, Logits

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")


def multi_head_cross_entropy(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    targets: Tensor,
    *,
    head_weights: Sequence[float] | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return each head's weight times its cross-entropy, [H] float32 (float64 for float64 inputs).

    Their sum is what to differentiate: its gradients are ready when the losses are. Any other
    function of them gets the right gradients too, computed again in the backward (not where the
    matrix and the bias need none). No gradient of a gradient.

    Args:
        hiddens: H of [T, d], under autocast cast to its dtype as `weight` and `bias` are.
        weight: [V, d], of the dtype of the hidden states.
        targets: [T] int64.
        head_weights: H numbers, 1 by default. A head of weight 0 is not computed.
        bias: [V].
        ignore_index: targets that count for nothing. If all do, losses and gradients are 0.
        chunk: c; by default as `default_chunk`.
        reduction: "mean" divides by the number of tokens that count.
        logit_scale: multiplies the logits.
        softcap: s in s tanh(logits / s), after the scale.

    Raises:
        ValueError: a shape or an option does not fit.
        TypeError: hidden states and matrix differ in dtype, or the targets are not int64.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"targets are {targets.dtype}; expected torch.int64")
    if targets.dim() != 1:
        raise ValueError(f"targets are {list(targets.shape)}; expected [T]")
    counted = targets != ignore_index
    objective = head_losses.CrossEntropy(targets.masked_fill(~counted, 0))
    logits = Logits(scale=logit_scale, softcap=softcap)
    head = Head(tuple(hiddens), weight, bias).in_compute_dtypes()
    return _losses(objective, head, logits, counted, head_weights, chunk, reduction)


def multi_head_kl(
    hiddens: Sequence[Tensor],
    weight: Tensor,
    teacher: Tensor | Callable[[int, int], Tensor],
    *,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    head_weights: Sequence[float] | None = None,
    bias: Tensor | None = None,
    counted: Tensor | None = None,
    chunk: int | None = None,
    reduction: Reduction = "mean",
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return each head's weight times temperature^2 KL(teacher || head), [H] as the above.

    Both are softmax(logits / temperature). The teacher gets no gradient; a chunk of its logits
    serves all heads.

    Args:
        hiddens: H of [T, d], the students'.
        weight: [V, d], the students'.
        teacher: hidden states [T, d'], whose logits are made as the students' are; or a function
            that returns the final logits [stop - start, V] of the tokens from start to stop, called
            under the autocast of this call.
        teacher_weight: [V, d'] of teacher hidden states, of their dtype or cast to that of
            autocast; by default `weight` with `bias`.
        teacher_bias: [V], goes with `teacher_weight`.
        temperature: above 0.
        counted: [T] bool, tokens that count; all by default.
        head_weights, bias, chunk, reduction, logit_scale, softcap: as of the cross-entropy.

    Raises:
        ValueError: a shape or an option does not fit.
        TypeError: hidden states and matrix differ in dtype, the students' or the teacher's, or
            `counted` is not bool.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2, with the divergence for its
        cross-entropy of soft targets: the same gradient.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected above 0")
    logits = Logits(scale=logit_scale, softcap=softcap)
    head = Head(tuple(hiddens), weight, bias).in_compute_dtypes()
    tokens = _tokens(head)
    if counted is None:
        counted = torch.ones(tokens, dtype=torch.bool, device=weight.device)
    if counted.dtype != torch.bool:
        raise TypeError(f"counted is {counted.dtype}; expected bool")
    if isinstance(teacher, Tensor):
        own = head[1:] if teacher_weight is None else (teacher_weight, teacher_bias)
        teacher = _teacher_head(Head((teacher,), *own), logits, tokens)
    elif teacher_weight is not None or teacher_bias is not None:
        raise ValueError("a teacher's matrix or bias is for a teacher of hidden states")
    else:
        device = weight.device.type
        autocast = head_losses.autocast_dtype(device)
        teacher = _TeacherFunction(teacher, device, autocast)
    if chunk is None:
        # the teacher's distribution takes as much as the students'
        chunk = math.ceil(default_chunk(tokens, weight.shape[0]) / 2)
    objective = head_losses.Divergence(teacher, temperature)
    return _losses(objective, head, logits, counted, head_weights, chunk, reduction)


@dataclass(frozen=True, slots=True)
class _TeacherFunction:
    """A teacher's function, called under the autocast of the caller, in the backward too."""

    function: Callable[[int, int], Tensor]
    device: str
    autocast: torch.dtype | None

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return the logits of the tokens from start to stop."""
        # a matrix is cast here without a gradient: no cache, which would hand that to the caller
        on = {"enabled": self.autocast is not None, "cache_enabled": False}
        with torch.autocast(self.device, self.autocast, **on):
            return self.function(start, stop)


@dataclass(frozen=True, slots=True)
class _TeacherHead:
    """A teacher of hidden states [T, d'], whose logits are made chunk by chunk."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    logits: Logits

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return the logits of the tokens from start to stop."""
        return self.logits.of(self.hidden[start:stop], self.weight, self.bias)


def default_chunk(tokens: int, vocabulary: int) -> int:
    """Return how many tokens' logits exist at a time.

    A sixteenth of all, but not so few that adding up the gradient of the matrix costs more than
    computing it, and not so many that logits of one chunk are larger than 2^28 numbers.
    """
    most = max(2**28 // max(vocabulary, 1), 1)
    return max(min(max(math.ceil(tokens / 16), 128), 1024, most), 1)


def _losses(
    objective: head_losses.Objective,
    head: Head,
    logits: Logits,
    counted: Tensor,
    head_weights: Sequence[float] | None,
    chunk: int | None,
    reduction: str,
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r}; expected {' or '.join(REDUCTIONS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}; expected at least 1")
    if logits.softcap is not None and not logits.softcap > 0:
        raise ValueError(f"softcap is {logits.softcap}; expected above 0")
    weights = [1.0] * len(head.hiddens) if head_weights is None else list(head_weights)
    _check(head, counted, weights)
    size = default_chunk(_tokens(head), head.weight.shape[0]) if chunk is None else chunk
    work = head_losses.Work(
        objective=objective,
        logits=logits,
        counted=counted,
        head_weights=tuple(weights),
        chunk=size,
        mean=reduction == "mean",
        grad=torch.is_grad_enabled(),
    )
    found: Tensor = head_losses.losses(head, work)
    return found


def _teacher_head(given: Head, logits: Logits, tokens: int) -> _TeacherHead:
    (hidden,), weight, bias = given
    bias = None if bias is None else bias.detach()
    (hidden,), weight, bias = Head((hidden.detach(),), weight.detach(), bias).in_compute_dtypes()
    if hidden.shape != (tokens, weight.shape[1]):
        shape = [tokens, weight.shape[1]]
        raise ValueError(f"the teacher is {list(hidden.shape)}; expected {shape}")
    for name, tensor in (("the teacher", hidden), ("the teacher's bias", bias)):
        if tensor is not None and tensor.dtype != weight.dtype:
            raise TypeError(f"{name}: {tensor.dtype}, its matrix is {weight.dtype}")
    return _TeacherHead(hidden, weight, bias, logits)


def _tokens(head: Head) -> int:
    if not head.hiddens:
        raise ValueError("no heads")
    return head.hiddens[0].shape[0]


def _check(head: Head, counted: Tensor, weights: list[float]) -> None:
    tokens = _tokens(head)
    if head.weight.dim() != 2:
        raise ValueError(f"the matrix is {list(head.weight.shape)}; expected [V, d]")
    vocabulary, size = head.weight.shape
    if len(weights) != len(head.hiddens):
        raise ValueError(f"{len(weights)} head weights for {len(head.hiddens)} heads")
    expected: list[tuple[str, Tensor, tuple[int, ...]]] = [("the tokens", counted, (tokens,))]
    expected += [(f"head {at}", each, (tokens, size)) for at, each in enumerate(head.hiddens)]
    if head.bias is not None:
        expected.append(("bias", head.bias, (vocabulary,)))
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name}: {list(tensor.shape)}; expected {list(shape)}")
    for name, tensor, _ in expected:
        if tensor is not counted and tensor.dtype != head.weight.dtype:
            raise TypeError(f"{name}: {tensor.dtype}, the matrix is {head.weight.dtype}")
