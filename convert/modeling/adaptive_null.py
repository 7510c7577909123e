"""Null experts: which real experts a token runs when experts that cost nothing compete with them.

A block has n real experts and M null ones; a token selects the K' best of all and runs the real
ones among them. Of equal logits a null expert stands just behind the real one it may be a copy of.
The same set is found by margins: real expert number j of a token's order runs where

    m_j = r_(j) - v_(K'-j+1) >= beta,

with real logits r and null logits v from high to low and the null bias beta, because j real experts
leave K'-j slots to null ones. Margins do not increase with j, so a quantile of them is a bias for
any share of the experts.

Source: AdaMoE, Zeng et al. 2024, arXiv 2406.13233, section 3; kinds of null experts MoE++, Jin et
al. 2024, arXiv 2410.07348, section 3.1. The margins, the bias as the one knob and the factor that
gives null logits a gradient are ours.

Shapes: T tokens, d hidden size, n real and M null experts, K' slots, J = min(K', n).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: kinds whose null experts add something to the output.
COMPUTING = ("identity", "constant")


class NullExperts(nn.Module):
    """The tensors of a block's null experts.

    Attributes:
        weight: [M, d] rows of the router, of its dtype.
        bias: [1] float32, added to every null logit for selection.
        scale: [1] float32 of kind "identity", else None.
        value: [M, d] float32 of kind "constant", else None.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter | None
    value: nn.Parameter | None

    def __init__(self, spec: Mapping[str, Any], hidden: int, like: Tensor) -> None:
        super().__init__()
        count, kind = int(spec["count"]), spec["kind"]

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, dtype=dtype, device=like.device))

        self.weight = zeros(count, hidden, dtype=like.dtype)
        self.bias = zeros(1)
        self.register_parameter("scale", zeros(1) if kind == "identity" else None)
        self.register_parameter("value", zeros(count, hidden) if kind == "constant" else None)

    def forward(
        self,
        x: Tensor,
        *,
        experts: int = 0,
        wide: bool = False,
        shares: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Return null logits without the bias, [T, M], and the bias, [1]; of given shares, what the
        null experts add to the block's output instead, [T, d] in float32.

        Both are ways through `forward`, because weights that are elsewhere come when it is called.

        Args:
            x: [T, d], the block's input.
            experts: n.
            wide: the router computes in float32.
            shares: [T, M], the share of each null expert in the token's selection.
        """
        if shares is not None:
            return self._output(x, shares.float())
        weight: Tensor = self.weight
        if wide:
            x, weight = x.float(), weight.float()
        # rows that are copies of the router's give its logits to the last bit, because they go
        # through products of the router's shape
        count = weight.shape[0]
        size = experts if count % experts == 0 else count
        parts = [weight[start : start + size] for start in range(0, count, size)]
        logits = torch.cat([nn.functional.linear(x, part) for part in parts], dim=-1)
        return logits, self.bias

    def _output(self, x: Tensor, shares: Tensor) -> Tensor:
        if self.scale is not None:
            return self.scale * shares.sum(dim=-1, keepdim=True) * x.float()
        assert self.value is not None
        return shares @ self.value.float()


@dataclass(frozen=True)
class Decision:
    """What a block decided.

    Attributes:
        logits: [T, n] real logits, float32 (float64 for a float64 model).
        null_logits: [T, M] null logits without the bias.
        order: [T, J] int64, real experts from the best on.
        margins: [T, J] how far the bias may rise until that expert no longer runs; +inf where
            there are too few null experts to fill its slot.
        kept: [T, J] bool, the experts that run.
        weights: [T, J] of their outputs, 0 where not kept.
        null_weights: [T, M] the share of each null expert in the selection, 0 where not selected.
    """

    logits: Tensor
    null_logits: Tensor
    order: Tensor
    margins: Tensor
    kept: Tensor
    weights: Tensor
    null_weights: Tensor | None


def decide(
    logits: Tensor,
    null_logits: Tensor,
    *,
    slots: int,
    combine: str,
    scaling: float = 1.0,
    beta: Tensor | float = 0.0,
    min_real: int = 0,
    weights_mode: str = "real",
    gain: float = 1.0,
    straight_through: bool = False,
    shares: bool = False,
    first: Tensor | None = None,
) -> Decision:
    """Return which real experts run and with what weight.

    Args:
        logits: [T, n] of the real experts.
        null_logits: [T, M] of the null ones, M may be 0; of equal logits null expert j ranks just
            behind real expert j mod n, whose copy it may be.
        slots: K', up to n + M.
        combine: "renorm": weights are shares of the real experts that run; "all": of all real ones.
        scaling: factor on the weights of "all".
        beta: null bias, [1] or a number; +-inf allowed.
        min_real: 1 keeps the best real expert of every token.
        weights_mode: "real", or "selected": null experts take their share (of the selection under
            "renorm", of all n + M under "all"), and weights are multiplied by `gain`.
        straight_through: under "real", multiply the weights by R / R.detach(), R = the running real
            experts' share of the selection: 1, with a gradient for null logits and for tokens with
            one real expert.
        shares: return `null_weights`.
        first: [T, k] experts that come first among equal logits.
    """
    real, null = _wide(logits), _wide(null_logits)
    bias = torch.as_tensor(beta, dtype=real.dtype, device=real.device)
    order = _order(real, first)
    null_order, ranks = _null_order(null, order, slots)
    best = order[:, :slots]
    ranked, lowest = real.gather(-1, best), null.gather(-1, null_order)
    margins = _margins(ranked, lowest, ranks, slots)
    kept = margins >= bias
    if min_real:
        kept = torch.cat([torch.ones_like(kept[:, :1]), kept[:, 1:]], dim=-1)
    chosen = _Chosen(real, ranked, kept, null + bias, lowest + bias, slots)
    weights = chosen.weights(best, combine, scaling, gain if weights_mode == "selected" else None)
    if straight_through and weights_mode == "real":
        mass = chosen.log_real() - chosen.log_selected()
        weights = weights * (mass - mass.detach()).exp()
    return Decision(
        logits=real,
        null_logits=null,
        order=best,
        margins=margins,
        kept=kept,
        weights=weights,
        null_weights=chosen.shares(null_order) if shares else None,
    )


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _order(real: Tensor, first: Tensor | None) -> Tensor:
    """Return the experts from the best on, [T, n]; of equal ones those in `first`, [T, k], then
    the lower index."""
    if first is None:
        return real.argsort(dim=-1, descending=True, stable=True)
    named = torch.zeros_like(real, dtype=torch.int8).scatter(-1, first, 1)
    before = named.argsort(dim=-1, descending=True, stable=True)
    after = real.gather(-1, before).argsort(dim=-1, descending=True, stable=True)
    return before.gather(-1, after)


def _null_order(null: Tensor, order: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Return the best null experts, [T, min(K', M)], and for each the rank of the real expert it
    may be a copy of; of equal ones the lower rank comes first."""
    count, experts = null.shape[-1], order.shape[-1]
    copies = -(-count // experts)
    padded = nn.functional.pad(null, (0, copies * experts - count), value=-torch.inf)
    first = experts * torch.arange(copies, device=null.device)
    before = (order.unsqueeze(-1) + first).flatten(1)
    after = padded.gather(-1, before).argsort(dim=-1, descending=True, stable=True)
    after = after[:, : min(slots, count)]
    return before.gather(-1, after), after // max(copies, 1)


def _margins(ranked: Tensor, lowest: Tensor, ranks: Tensor, slots: int) -> Tensor:
    """Return the margins, [T, J].

    Args:
        ranked: [T, J] real logits from the highest on.
        lowest: [T, min(K', M)] null logits from the highest on.
        ranks: [T, min(K', M)] of the real experts they stand behind.
        slots: K'.
    """
    tokens, count = ranked.shape
    sure = min(max(slots - lowest.shape[-1], 0), count)
    # of the real experts that are not sure of a slot, the null expert each competes with
    part = slice(slots - count, slots - sure)
    margins = ranked[:, sure:] - lowest[:, part].flip(-1)
    behind = ranks[:, part].flip(-1) < torch.arange(sure, count, device=ranked.device)
    least = torch.full_like(margins, -torch.finfo(margins.dtype).tiny)
    margins = torch.where((margins == 0) & behind, least, margins)
    return torch.cat([ranked.new_full((tokens, sure), torch.inf), margins], dim=-1)


@dataclass(frozen=True)
class _Chosen:
    """What a token has selected, and the shares that follow from it.

    Attributes:
        real: [T, n] real logits.
        ranked: [T, J] the best of them, from the highest on.
        kept: [T, J] which of those run.
        null: [T, M] null logits, the bias in them.
        lowest: [T, min(K', M)] the best of them, from the highest on.
        slots: K'.
    """

    real: Tensor
    ranked: Tensor
    kept: Tensor
    null: Tensor
    lowest: Tensor
    slots: int

    def taken(self) -> Tensor:
        """Return which of the best null experts are selected, bool [T, min(K', M)]."""
        left = self.slots - self.kept.sum(dim=-1, keepdim=True)
        return torch.arange(self.lowest.shape[-1], device=left.device) < left

    def running(self) -> Tensor:
        """Return the logits of what runs, -inf for the rest; all of them where nothing runs, so
        that no sum is empty."""
        return self.ranked.masked_fill(~self.kept & self.kept[:, :1], -torch.inf)

    def log_real(self) -> Tensor:
        """Return the logarithm of the mass of what runs, [T, 1]."""
        return self.running().logsumexp(dim=-1, keepdim=True)

    def log_selected(self) -> Tensor:
        """Return the logarithm of the mass of all that is selected, [T, 1]."""
        real = self.ranked.masked_fill(~self.kept, -torch.inf)
        null = self.lowest.masked_fill(~self.taken(), -torch.inf)
        return torch.cat([real, null], dim=-1).logsumexp(dim=-1, keepdim=True)

    def weights(self, best: Tensor, combine: str, scaling: float, gain: float | None) -> Tensor:
        """Return the weights, [T, J]; a `gain` means that null experts take their share."""
        if combine == "all":
            if gain is None:
                found = self.real.softmax(dim=-1)
            else:
                found = torch.cat([self.real, self.null], dim=-1).softmax(dim=-1) * gain
            found = found.gather(-1, best) * scaling
        elif gain is None:
            found = self.running().softmax(dim=-1)
        else:
            found = (self.ranked - self.log_selected()).exp() * gain
        return found.masked_fill(~self.kept, 0)

    def shares(self, null_order: Tensor) -> Tensor:
        """Return the share of each null expert in the selection, [T, M]."""
        found = (self.lowest - self.log_selected()).exp().masked_fill(~self.taken(), 0)
        return torch.zeros_like(self.null).scatter(-1, null_order, found)
