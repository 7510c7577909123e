"""What is counted of routers while they are trained, and how losses join what they return.

Shapes: B sequences, S positions, T = B S tokens, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.train.routing_sites import StockRouter


@dataclass
class Tally:
    """What one router chose over some steps; all are sums over real tokens.

    Attributes:
        counts: [E] uses of each expert.
        sums: [2] tokens, and their entropies as a fraction of ln E; with null experts [3], the last
            of them tokens that ran no expert.
    """

    counts: Tensor | None = None
    sums: Tensor | None = None

    def add(self, counts: Tensor, sums: Tensor) -> None:
        """Count a batch."""
        self.counts = counts if self.counts is None else self.counts + counts
        self.sums = sums if self.sums is None else self.sums + sums

    def clear(self) -> None:
        """Forget everything."""
        self.counts = self.sums = None


@dataclass
class Tallies:
    """Tallies of one router: since the last log line, the last step, and over the last steps."""

    line: Tally = field(default_factory=Tally)
    step: Tally = field(default_factory=Tally)
    end: Tally = field(default_factory=Tally)


class Joined(torch.autograd.Function):
    """The identity of its first argument, whose backward pass gives the second a gradient of 1."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.like = (loss.dtype, loss.device)
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, arriving: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return arriving, torch.ones((), dtype=dtype, device=device)


def parts_of(output: Any, router: StockRouter) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [T, E], choices [T, K] and weights [T, K] of what a router returned.

    The order differs between architectures and versions of transformers: logits, weights, choices
    or the reverse of it.
    """
    tensors = [t for t in output if isinstance(t, Tensor)] if isinstance(output, tuple) else []
    whole = [t for t in tensors if not t.is_floating_point()]
    real = [t for t in tensors if t.is_floating_point()]
    logits = [t for t in real if t.shape[-1] == router.experts]
    if tensors and not tensors[0].is_floating_point():
        logits = logits[::-1]
    if len(whole) != 1 or len(real) != 2 or not logits:
        raise OptionError(
            f"the router {router.path} returns neither logits nor choices that are known",
            where="--balance",
            hint="Train this architecture with --balance 0 --z-loss 0 --collapse 0.",
        )
    weights = real[1] if real[0] is logits[0] else real[0]
    return logits[0], whole[0], weights


def replaced(output: tuple[Any, ...], old: Tensor, new: Tensor) -> tuple[Any, ...]:
    """Return what a router returned with one tensor in another's place."""
    return tuple(new if item is old else item for item in output)


def counts_of(chosen: Tensor, mask: Tensor, experts: int) -> Tensor:
    """Return how often each sequence's real tokens chose each expert, [B, S K] -> [B, E]."""
    each = chosen.shape[1] // mask.shape[1]
    real = mask.repeat_interleave(each, dim=1)
    counts = mask.new_zeros(mask.shape[0], experts)
    return counts.scatter_add_(1, chosen.long(), real)


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `torch.compile` calls instead of reading it."""
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def widest(device: torch.device) -> torch.dtype:
    """Return the dtype a device counts in."""
    return torch.float32 if device.type == "mps" else torch.float64
