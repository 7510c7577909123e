"""Experts of transformers that are given slots without an expert, which then cost nothing.

Shapes: T tokens, J slots, P = (token, slot) pairs that have an expert, d hidden size, M null
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .adaptive_null import NullExperts

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
#: the experts implementation that skips such slots itself: `adaconvert.kernels`.
_SKIPS = "adaconvert"
#: the block whose forward pass this is. Router and experts learn it here, not by a reference, so
#: that copies of them (adapters keep some) work in the block that calls them.
_BLOCK: ContextVar[Any] = ContextVar("adaptive_block", default=None)


def block() -> Any:
    """Return the `AdaptiveMixture` this code runs in, None outside of any."""
    return _BLOCK.get()


@contextmanager
def inside(entered: Any) -> Iterator[None]:
    """Run the body in a block's forward pass."""
    token = _BLOCK.set(entered)
    try:
        yield
    finally:
        _BLOCK.reset(token)


class MixtureExperts(nn.Module):
    """What the stock class of a mixture's experts becomes a subclass of.

    It takes what `AdaptiveMixture` lets the router return: a slot whose index is below 0 has no
    expert, and slots without one are a token's last. Null experts that add to the output have M
    slots behind those, whose weights are their shares of the selection. Called by itself, outside
    a block, it takes what the stock class does.

    Attributes:
        drops_slots: what tells `adaconvert.kernels` that slots can be without an expert.
    """

    drops_slots = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        site = block()
        if site is None or not site.adaptive_computes:
            return self._without(hidden_states, top_k_index, top_k_weights)
        null: NullExperts = site.null_experts
        real = top_k_index.shape[-1] - null.weight.shape[0]
        index, weights = top_k_index[:, :real], top_k_weights[:, :real]
        out = self._without(hidden_states, index.contiguous(), weights.contiguous())
        added: Tensor = null(hidden_states, shares=top_k_weights[:, real:])
        return out + added.to(out.dtype)

    def adaptive_compacted(
        self, run: Run, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """Return the output of `run`, an implementation for slots that all have an expert."""
        return compacted(run, hidden_states, top_k_index, top_k_weights)

    def _without(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Return the real experts' output, [T, d]."""
        stock: Run = super().forward
        own: Any = self
        if own.config._experts_implementation == _SKIPS:
            return stock(x, index, weights)
        return compacted(stock, x, index, weights)


def compacted(run: Run, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the output of experts that know no empty slots, run for the pairs alone, [T, d].

    Every pair becomes a token with one slot of weight one; weights and sums follow as in
    transformers' grouped implementation. Where all tokens have as many experts, and on devices that
    hold no values, `run` is called once for the tokens as they are.

    Args:
        run: (x, index, weights) -> output; every index names an expert.
        x: [T, d].
        index: [T, J]; below 0 for none, and then in all slots behind.
        weights: [T, J]; 0 where there is none.
    """
    if index.is_meta or _is_fake(index):
        return run(x, index.clamp(min=0), weights)
    live = index >= 0
    used = live.sum(dim=0)
    # slots fill from the first on, so the number of slots in use is that of the busiest token
    counts: list[int] = used.tolist()
    most, pairs = sum(count > 0 for count in counts), sum(counts)
    if pairs == len(x) * most and pairs:
        return run(x, index[:, :most].contiguous(), weights[:, :most].contiguous())
    if not pairs:
        return torch.zeros_like(x)
    token, slot = live[:, :most].nonzero(as_tuple=True)
    plain = run(x[token], index[token, slot, None], x.new_ones(len(token), 1))
    weighted = plain * weights[token, slot, None]
    spread = weighted.new_zeros(len(x) * most, x.shape[-1])
    spread = spread.index_copy(0, token * most + slot, weighted)
    return spread.view(len(x), most, -1).sum(dim=1).to(x.dtype)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and not torch.compiler.is_dynamo_compiling()
