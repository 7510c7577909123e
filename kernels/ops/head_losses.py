"""The chunked computation of losses of output heads: one loop for every objective.

An objective turns a chunk of logits into its losses and, in place, into its gradient by them.

H heads, T tokens, d hidden size, V vocabulary, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Head(NamedTuple):
    """What is differentiated: H hidden states [T, d], their matrix [V, d] and bias [V]."""

    hiddens: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None

    def in_compute_dtypes(self) -> Head:
        """Return all of it in the dtype of autocast where it is on."""
        bias = None if self.bias is None else _in_compute_dtype(self.bias)
        hiddens = tuple(_in_compute_dtype(each) for each in self.hiddens)
        return Head(hiddens, _in_compute_dtype(self.weight), bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Logits:
    """How logits follow from products: scaled, then capped."""

    scale: float
    softcap: float | None

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return logits [c, V] in float32 or float64."""
        wide = functional.linear(hidden, weight, bias).to(wide_of(hidden.dtype))
        if self.scale != 1:
            wide.mul_(self.scale)
        if self.softcap is not None:
            wide.div_(self.softcap).tanh_().mul_(self.softcap)
        return wide

    def slope(self, wide: Tensor) -> Tensor | None:
        """Return the derivative of the logits by the products, [c, V]; None stands for 1."""
        if self.softcap is None:
            return None if self.scale == 1 else wide.new_tensor(self.scale)
        return (wide / self.softcap).square_().neg_().add_(1).mul_(self.scale)


class Objective(Protocol):
    """A loss of logits."""

    def begin(self, start: int, stop: int, rows: Tensor | None) -> None:
        """Prepare for the tokens from start to stop, of which `rows` (None: all) count."""

    def end(self) -> None:
        """Forget what was prepared."""

    def __call__(self, wide: Tensor, grad: bool) -> Tensor:
        """Return the losses [c]; with `grad`, `wide` [c, V] has become their gradient."""
        ...


@dataclass
class CrossEntropy:
    """Cross-entropy of one target per token.

    Attributes:
        targets: [T] int64, all of them indices of the vocabulary.
    """

    targets: Tensor
    _mine: Tensor = field(init=False)

    def begin(self, start: int, stop: int, rows: Tensor | None) -> None:
        """Take the targets of these tokens."""
        self._mine = _select(self.targets[start:stop], rows)[:, None]

    def end(self) -> None:
        """Keep nothing of a chunk but views."""
        del self._mine

    def __call__(self, wide: Tensor, grad: bool) -> Tensor:
        """Return -log softmax(wide) at the targets; the gradient is softmax - 1 at the target."""
        highest = wide.amax(-1, keepdim=True)
        picked = wide.gather(1, self._mine)
        sums = wide.sub_(highest).exp_().sum(-1, keepdim=True)
        if grad:
            wide.div_(sums)
            wide.scatter_(1, self._mine, wide.gather(1, self._mine) - 1)
        return (sums.log() + highest - picked)[:, 0]


@dataclass
class Divergence:
    """temperature^2 KL(teacher || student) of softmax(logits / temperature).

    Attributes:
        teacher: returns the teacher's logits of the tokens from start to stop, [stop - start, V].
        temperature: above 0.
    """

    teacher: Callable[[int, int], Tensor]
    temperature: float
    _logarithms: Tensor = field(init=False)
    _shares: Tensor = field(init=False)

    def begin(self, start: int, stop: int, rows: Tensor | None) -> None:
        """Make the teacher's distribution, once for all students."""
        logits = self.teacher(start, stop)
        if logits.dim() != 2 or logits.shape[0] != stop - start:
            raise ValueError(
                f"the teacher of {stop - start} tokens returned {list(logits.shape)}; "
                "expected one row of logits each"
            )
        logits = _select(logits.detach(), rows)
        wide = logits.to(wide_of(logits.dtype)) / self.temperature
        self._logarithms = wide.sub_(wide.logsumexp(-1, keepdim=True))
        self._shares = self._logarithms.exp()

    def end(self) -> None:
        """Free the teacher's distribution."""
        del self._logarithms, self._shares

    def __call__(self, wide: Tensor, grad: bool) -> Tensor:
        """Return the divergences; the gradient is temperature (student - teacher)."""
        if wide.shape != self._shares.shape:
            raise ValueError(
                f"a vocabulary of {wide.shape[1]}, the teacher has {self._shares.shape[1]}"
            )
        wide.div_(self.temperature).sub_(wide.logsumexp(-1, keepdim=True))
        apart = self._logarithms - wide
        # a share of 0 counts 0, whatever the student gives
        apart.masked_fill_(self._shares == 0, 0)
        losses: Tensor = torch.linalg.vecdot(self._shares, apart)
        if grad:
            wide.exp_().sub_(self._shares).mul_(self.temperature)
        return losses.mul_(self.temperature**2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is computed of the heads.

    Attributes:
        objective: the loss.
        logits: how logits are made.
        counted: [T] bool.
        head_weights: H numbers.
        chunk: c.
        mean: divide by the number of tokens that count.
        grad: gradients will be asked for.
    """

    objective: Objective
    logits: Logits
    counted: Tensor
    head_weights: tuple[float, ...]
    chunk: int
    mean: bool
    grad: bool


def losses(head: Head, work: Work) -> Tensor:
    """Return each head's weighted loss, [H] float32 or float64, of tensors of one dtype."""
    if not torch.compiler.is_compiling():
        return _losses(head, work)
    # the loop over chunks is as long as the batch, and a compiled graph of it would be too. Not a
    # decorator: that imports the compiler, and Triton with it
    outside: Callable[..., Tensor] = torch.compiler.disable(_losses)  # type: ignore[no-untyped-call]
    return outside(head, work)


def _losses(head: Head, work: Work) -> Tensor:
    with torch.autocast(head.weight.device.type, enabled=False):
        out: Tensor = _HeadLosses.apply(  # type: ignore[no-untyped-call]
            work, head.weight, head.bias, *head.hiddens
        )
    return out


def wide_of(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype losses are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype of autocast, None where it is off."""
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _in_compute_dtype(tensor: Tensor) -> Tensor:
    dtype = None if tensor.dtype == torch.float64 else autocast_dtype(tensor.device.type)
    return tensor if dtype is None else tensor.to(dtype)


class _Gradients(NamedTuple):
    """Sums over the tokens that count; None where not asked for."""

    hiddens: list[Tensor | None]
    weight: Tensor | None
    bias: Tensor | None


class _HeadLosses(torch.autograd.Function):
    """The autograd of `_run`, which finds the gradients of the sum of all losses in the forward."""

    @staticmethod
    def forward(
        ctx: Any, work: Work, weight: Tensor, bias: Tensor | None, *hiddens: Tensor
    ) -> Tensor:
        needs = ctx.needs_input_grad[1:] if work.grad else (False,) * (2 + len(hiddens))
        head = Head(hiddens, weight, bias)
        out, ctx.found = _run(head, work, work.head_weights, needs)
        ctx.count = work.counted.sum().clamp_(min=1).to(out.dtype) if work.mean else None
        ctx.work = work
        ctx.save_for_backward(weight, bias, *hiddens)
        factors = out.new_tensor(work.head_weights)
        return out * factors if ctx.count is None else out * factors / ctx.count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs, work, found = ctx.needs_input_grad[1:], ctx.work, ctx.found
        # used up: they are scaled in place
        ctx.found = None
        weight, bias, *hiddens = ctx.saved_tensors
        head = Head(tuple(hiddens), weight, bias)
        share = grad if ctx.count is None else grad / ctx.count
        if any(needs[:2]) and not _uniform(grad):
            factors = share * share.new_tensor(work.head_weights)
            found = _run(head, work, factors.unbind(), needs)[1]
            share = torch.ones_like(share)
        elif found is None:
            found = _run(head, work, work.head_weights, needs)[1]
        return None, *_scaled(found, share, weight.dtype)


def _scaled(found: _Gradients, share: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return the gradients of matrix, bias and hidden states; uses up `found`."""
    of_hiddens = (
        None if each is None else each.mul_(share[at]) for at, each in enumerate(found.hiddens)
    )
    weight, bias = (
        None if each is None else each.mul_(share[0]).to(dtype)
        for each in (found.weight, found.bias)
    )
    return weight, bias, *of_hiddens


def _uniform(grad: Tensor) -> bool:
    """Return whether all heads surely have one gradient; looks only where that does not stall."""
    if grad.shape[0] == 1 or grad.stride() == (0,):
        return True
    return grad.device.type == "cpu" and bool((grad == grad[0]).all())


def _run(
    head: Head, work: Work, factors: Sequence[float | Tensor], needs: Sequence[bool]
) -> tuple[Tensor, _Gradients]:
    """Return the sums of the losses [H], unweighted, and the gradients of factors times sums.

    Args:
        factors: H numbers; a head of the number 0 is left out.
        needs: of matrix, bias and each hidden state.
    """
    wide = wide_of(head.weight.dtype)
    sums = torch.zeros(len(head.hiddens), dtype=wide, device=head.weight.device)
    found = _Gradients(
        [
            torch.zeros_like(h) if need else None
            for h, need in zip(head.hiddens, needs[2:], strict=True)
        ],
        torch.zeros_like(head.weight, dtype=wide) if needs[0] else None,
        torch.zeros_like(head.bias, dtype=wide) if needs[1] and head.bias is not None else None,
    )
    for start, stop, rows, share in _spans(work, wide):
        work.objective.begin(start, stop, rows)
        for at, factor in enumerate(factors):
            if isinstance(factor, Tensor) or factor:
                hidden = _select(head.hiddens[at][start:stop], rows)
                here = _Gradients([found.hiddens[at]], found.weight, found.bias)
                place = slice(start, stop) if rows is None else rows + start
                scale = factor if share is None else share * factor
                sums[at] += _chunk(head, hidden, work, scale, share, here, place)
        work.objective.end()
    return sums, found


def _spans(
    work: Work, wide: torch.dtype
) -> Iterator[tuple[int, int, Tensor | None, Tensor | None]]:
    """Yield start, stop, the rows that count, and 1 or 0 for each row [c, 1].

    On the CPU the rows that do not count are left out; elsewhere that would wait for the device, so
    they count 0 times.
    """
    looks = work.counted.device.type == "cpu"
    for start in range(0, work.counted.shape[0], work.chunk):
        counted = work.counted[start : start + work.chunk]
        stop = start + counted.shape[0]
        if not looks:
            yield start, stop, None, counted[:, None].to(wide)
        elif counted.all():
            yield start, stop, None, None
        elif counted.any():
            yield start, stop, counted.nonzero()[:, 0], None


def _chunk(
    head: Head,
    hidden: Tensor,
    work: Work,
    factor: float | Tensor,
    share: Tensor | None,
    found: _Gradients,
    place: slice | Tensor,
) -> Tensor:
    """Return the sum of the losses of rows of hidden states [c, d]; adds to `found`."""
    grad = any(each is not None for each in (*found.hiddens, found.weight, found.bias))
    wide = work.logits.of(hidden, head.weight, head.bias)
    slope = work.logits.slope(wide) if grad else None
    each = work.objective(wide, grad)
    if share is not None:
        each = torch.where(share[:, 0] > 0, each, 0)
    if not grad:
        return each.sum()
    if slope is not None:
        wide.mul_(slope)
        del slope
    if isinstance(factor, Tensor) or factor != 1:
        wide.mul_(factor)
    _add(wide, hidden, head.weight, found, place)
    return each.sum()


def _add(
    wide: Tensor, hidden: Tensor, weight: Tensor, found: _Gradients, place: slice | Tensor
) -> None:
    """Add the gradients that follow from those of the products, `wide` [c, V]."""
    if found.bias is not None:
        found.bias.add_(wide.sum(0))
    narrow = wide.to(hidden.dtype)
    del wide
    of_hidden = found.hiddens[0]
    if of_hidden is not None:
        of_hidden[place] = narrow @ weight
    if found.weight is None or not found.weight.numel():
        return
    if found.weight.dtype == narrow.dtype:
        found.weight.addmm_(narrow.t(), hidden)
    elif narrow.dtype == torch.float16:
        _add_float16(found.weight, narrow, hidden)
    else:
        found.weight.add_(narrow.t() @ hidden)


def _add_float16(total: Tensor, narrow: Tensor, hidden: Tensor) -> None:
    """Add narrow [c, V] transposed times hidden [c, d] to the float32 total [V, d].

    The sum over a chunk may leave float16 where the mean does not: where the largest numbers allow
    that, it is made of hidden states divided by a power of two.
    """
    norm = torch.linalg.vector_norm
    most = norm(narrow, torch.inf).float() * norm(hidden, torch.inf) * narrow.shape[0]
    # 2^-24 is the smallest number of float16
    power = (most / 2**15).log2().ceil().clamp(0, 24)
    total.addcmul_(narrow.t() @ (hidden * (-power).exp2()), power.exp2())


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)
