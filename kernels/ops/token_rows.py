"""Taking some tokens of a sequence out and adding results back to them.

For blocks that only some tokens pass (mixture of depths) and for exits. Both functions are
differentiable without atomics: every row is written at most once, so a second call gives the same
bits.

T tokens of a sequence, C places for chosen ones, d hidden size; "..." any leading dimensions.

Source: mixture of depths, Raposo et al. 2024, arXiv 2404.02258, section 3.4: the chosen tokens keep
their order, and each result is added to its token with the router's weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of the chosen tokens, [..., C, d]; zeros at places of no token.

    Args:
        x: [..., T, d].
        indices: [..., C] integers, rising within a sequence, so that causal order holds. One that
            is negative or T or more is of no token: sequences may choose fewer than C.

    Raises:
        ValueError: shapes disagree or, looked at on the CPU only, a sequence's tokens do not rise.
        TypeError: the indices are not integers.
    """
    flat = _flat_indices(x, indices)
    rows: Tensor = _Gather.apply(x.flatten(0, -2), flat)  # type: ignore[no-untyped-call]
    return rows.view(*indices.shape, x.shape[-1])


def scatter_add_rows(
    x: Tensor, rows: Tensor, indices: Tensor, gate: Tensor | None = None
) -> Tensor:
    """Return x with gate * rows added at the chosen tokens, [..., T, d]; x itself is kept.

    Args:
        x: [..., T, d].
        rows: [..., C, d], of the dtype of x; what is at places of no token is not used, and its
            gradient is 0. The same holds for `gate`.
        indices: [..., C], as of `gather_rows`.
        gate: [..., C] of any float dtype, 1 by default. The product is made in the wider dtype of
            the two, and its gradient is summed in at least float32.

    Raises:
        ValueError: shapes disagree or, looked at on the CPU only, a sequence's tokens do not rise.
        TypeError: the indices are not integers, or x and rows differ in dtype.
    """
    flat = _flat_indices(x, indices)
    expected = (*indices.shape, x.shape[-1])
    if rows.shape != expected:
        raise ValueError(f"rows are {list(rows.shape)}; expected {list(expected)}")
    if rows.dtype != x.dtype:
        raise TypeError(f"rows are {rows.dtype}, x is {x.dtype}")
    if gate is not None and gate.shape != indices.shape:
        raise ValueError(f"gate is {list(gate.shape)}; expected {list(indices.shape)}")
    weights = None if gate is None else gate.reshape(-1)
    out: Tensor = _ScatterAdd.apply(  # type: ignore[no-untyped-call]
        x.flatten(0, -2), rows.flatten(0, -2), flat, weights
    )
    return out.view(x.shape)


class _Gather(torch.autograd.Function):
    """Rows [N, d] at flat indices [M], of which N stands for no row, and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flat: Tensor) -> Tensor:
        ctx.save_for_backward(flat)
        ctx.tokens = x.shape[0]
        return _take(x, flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (flat,) = ctx.saved_tensors
        # one row more, for places of no token
        wide = grad.new_zeros(ctx.tokens + 1, grad.shape[1])
        return wide.index_copy_(0, flat, grad)[: ctx.tokens], None


class _ScatterAdd(torch.autograd.Function):
    """x [N, d] with gate [M] times rows [M, d] added at flat indices [M]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, flat: Tensor, gate: Tensor | None) -> Tensor:
        # without a gate nothing but the indices is needed again
        ctx.save_for_backward(flat, gate, rows if gate is not None else None)
        out = x.clone(memory_format=torch.contiguous_format)
        if not out.numel() or not flat.shape[0]:
            return out
        added = rows if gate is None else rows * gate[:, None]
        at, added, source = _without_no_token(flat, added, x.shape[0])
        if source is None and added.dtype == x.dtype:
            # each row once, so nothing is added in an order
            return out.index_add_(0, at, added)
        # read, add and write in place of adding atomically
        sums = (x.index_select(0, at) + added).to(x.dtype)
        if source is not None:
            at, sums = at.index_select(0, source), sums.index_select(0, source)
        return out.index_copy_(0, at, sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat, gate, rows = ctx.saved_tensors
        of_x, of_rows, of_gate = grad if ctx.needs_input_grad[0] else None, None, None
        at_rows = _take(grad, flat)
        if ctx.needs_input_grad[1]:
            of_rows = at_rows if gate is None else (at_rows * gate[:, None]).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            wide = torch.promote_types(gate.dtype, torch.float32)
            of_gate = (at_rows.to(wide) * rows).sum(-1).to(gate.dtype)
        if gate is not None and not _all_known(flat < grad.shape[0]):
            # 0 times what is there need not be 0
            lost = flat == grad.shape[0]
            of_rows = None if of_rows is None else of_rows.masked_fill_(lost[:, None], 0)
            of_gate = None if of_gate is None else of_gate.masked_fill_(lost, 0)
        return of_x, of_rows, None, of_gate


def _take(x: Tensor, flat: Tensor) -> Tensor:
    """Return the rows [M, d] of x [N, d] at indices [M], zeros at the index N."""
    tokens = x.shape[0]
    if not tokens:
        return x.new_zeros(flat.shape[0], x.shape[1])
    if _all_known(flat < tokens):
        return x.index_select(0, flat)
    rows = x.index_select(0, flat.clamp(max=tokens - 1))
    return rows.masked_fill_((flat == tokens)[:, None], 0)


def _without_no_token(
    flat: Tensor, added: Tensor, tokens: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return indices below N, what is added there, and the place whose sum each place writes.

    A place of no token writes again what the first place of a token does; where there is none, it
    adds 0 to the last token.
    """
    known = flat < tokens
    if _all_known(known):
        return flat, added, None
    places = torch.arange(flat.shape[0], device=flat.device)
    source = torch.where(known, places, known.to(torch.int8).argmax())
    return flat.clamp(max=tokens - 1), added.masked_fill(~known[:, None], 0), source


def _all_known(known: Tensor) -> bool:
    """Return whether each place is of a token, where looking does not stall; else False."""
    if known.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bool(known.all())


def _flat_indices(x: Tensor, indices: Tensor) -> Tensor:
    """Return the indices as rows of all sequences' tokens, [M] int64; their number for no token."""
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"the indices are {indices.dtype}; expected integers")
    if x.dim() < 2 or indices.dim() != x.dim() - 1 or indices.shape[:-1] != x.shape[:-2]:
        raise ValueError(f"indices {list(indices.shape)} are not those of x {list(x.shape)}")
    tokens, sequences = x.shape[-2], x.shape[:-2].numel()
    # int64, because the number of all tokens need not fit in the type of the indices
    wide = indices.to(torch.int64).reshape(sequences, indices.shape[-1])
    known = (wide >= 0) & (wide < tokens)
    if wide.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_order(wide, known)
    starts = torch.arange(sequences, device=wide.device)[:, None] * tokens
    return torch.where(known, wide + starts, sequences * tokens).reshape(-1)


def _check_order(wide: Tensor, known: Tensor) -> None:
    """Raise ValueError where a known index is not above the known ones before it."""
    so_far = torch.where(known, wide, -1).cummax(-1).values
    if bool((known[:, 1:] & (wide[:, 1:] <= so_far[:, :-1])).any()):
        raise ValueError("the indices of a sequence do not rise, or one is there twice")
