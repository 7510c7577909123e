"""Providers of adapters, cross-entropy and token rows.

T tokens, K slots per token, E adapters of rank r, d hidden size, m outputs, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from cells import Cell
from timing import Case, Provider
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels.cross_entropy import multi_head_cross_entropy
from adaconvert.kernels.lora import grouped_lora
from adaconvert.kernels.plan import route_plan
from adaconvert.kernels.token_rows import gather_rows, scatter_add_rows


def lora(cell: Cell, device: str) -> Case:
    """Return the case of routed adapters on a frozen linear; the baseline is the linear alone."""

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(cell.dtype)

    x, weight = made(cell.tokens, cell.hidden).requires_grad_(), made(cell.width, cell.hidden)
    a = made(cell.experts, cell.size, cell.hidden).requires_grad_()
    b = made(cell.experts, cell.width, cell.size).requires_grad_()
    scores = torch.rand(cell.tokens, cell.experts, device=device).topk(cell.slots)
    weights_of, experts_of = scores.values.softmax(-1).requires_grad_(), scores.indices
    upstream, leaves = made(cell.tokens, cell.width), (x, a, b, weights_of)

    def base() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return functional.linear(x, weight)

    def ours(form: Any) -> Tensor:
        plan = route_plan(experts_of, cell.experts, may_drop=False)
        return grouped_lora(x, base(), plan, weights_of, a=a, b=b, scaling=2.0, form=form)

    def loop(_: int) -> Tensor:
        out = base()
        for expert in range(cell.experts):
            share = (weights_of * (experts_of == expert)).sum(-1, keepdim=True)
            part = functional.linear(functional.linear(x, a[expert]), b[expert])
            out = out + 2.0 * share.to(x.dtype) * part
        return out

    def backward(out: Tensor) -> None:
        out.backward(upstream)

    def provider(name: str, forward: Any, *, exact: bool = True) -> Provider:
        return Provider(name=name, forward=forward, backward=backward, exact=exact)

    providers = [
        provider("linear alone", lambda _: base(), exact=False),
        provider("loop over adapters", loop, exact=False),
        *(
            provider(f"adaconvert {form}", lambda _, form=form: ours(form), exact=False)
            for form in ("auto", "sorted", "all")
        ),
    ]
    return Case(providers=providers, parameters=[weight, a, b])


def cross_entropy(cell: Cell, device: str) -> Case:
    """Return the case of the losses of heads that share a matrix; the baseline makes all logits."""
    targets = torch.randint(0, cell.size, (cell.tokens,), device=device)
    scale = cell.hidden**-0.5
    weight = torch.randn(cell.size, cell.hidden, device=device).mul_(scale).to(cell.dtype)
    weight.requires_grad_()
    shape = (cell.heads, cell.tokens, cell.hidden)
    hiddens = [
        h.requires_grad_() for h in torch.randn(shape, device=device).to(cell.dtype).unbind()
    ]

    def cleared() -> None:
        for leaf in (weight, *hiddens):
            leaf.grad = None

    def materialised(_: int) -> Tensor:
        cleared()
        logits = [functional.linear(hidden, weight).float() for hidden in hiddens]
        return torch.stack([functional.cross_entropy(each, targets) for each in logits])

    def ours(_: int) -> Tensor:
        cleared()
        return multi_head_cross_entropy(hiddens, weight, targets)

    def chunked(_: int) -> Tensor:
        cleared()
        return torch.stack([functional.linear_cross_entropy(h, weight, targets) for h in hiddens])

    def backward(out: Tensor) -> None:
        out.sum().backward()

    ways: dict[str, Any] = {"materialised logits": materialised, "adaconvert": ours}
    skipped = {}
    if hasattr(functional, "linear_cross_entropy"):
        ways["torch linear_cross_entropy"] = chunked
    else:
        skipped["torch linear_cross_entropy"] = "this torch has none"
    try:
        ways["liger"] = _liger(hiddens, weight, targets, cleared)
    except (ImportError, RuntimeError) as error:
        skipped["liger"] = str(error)
    providers = [Provider(name=name, forward=run, backward=backward) for name, run in ways.items()]
    flops = 2.0 * cell.heads * cell.tokens * cell.hidden * cell.size
    return Case(providers=providers, parameters=[weight], flops=flops, skipped=skipped)


def _liger(hiddens: list[Tensor], weight: Tensor, targets: Tensor, cleared: Any) -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if weight.device.type != "cuda":
        raise RuntimeError("it needs a GPU")
    loss = LigerFusedLinearCrossEntropyLoss()

    def run(_: int) -> Tensor:
        cleared()
        return torch.stack([loss(weight, hidden, targets) for hidden in hiddens])

    return run


def token_rows(cell: Cell, device: str) -> Case:
    """Return the case of a feed-forward network run on half of the tokens.

    The baseline is the network on rows that are there already: what is above it is the price of
    taking rows out and adding them back.
    """

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul_(shape[-1] ** -0.5).to(cell.dtype)

    x, chosen = made(cell.tokens, cell.hidden).requires_grad_(), cell.tokens // 2
    gate_up = made(2 * cell.width, cell.hidden).requires_grad_()
    down = made(cell.hidden, cell.width).requires_grad_()
    indices = torch.rand(cell.tokens, device=device).topk(chosen).indices.sort().values
    ready = made(chosen, cell.hidden).requires_grad_()
    share = torch.rand(chosen, device=device).requires_grad_()
    upstream = made(cell.tokens, cell.hidden)
    leaves = (x, gate_up, down, ready, share)

    def block(rows: Tensor) -> Tensor:
        gate, up = functional.linear(rows, gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, down)

    def cleared() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return x

    def ours(_: int) -> Tensor:
        given = cleared()
        return scatter_add_rows(given, block(gather_rows(given, indices)), indices, share)

    def plain(_: int) -> Tensor:
        given = cleared()
        added = block(given[indices]) * share[:, None].to(cell.dtype)
        return given.index_add(0, indices, added)

    def alone(_: int) -> Tensor:
        cleared()
        return block(ready)

    def backward(out: Tensor) -> None:
        out.backward(upstream[: len(out)])

    ways = {"block on its rows alone": alone, "torch index, index_add": plain, "adaconvert": ours}
    providers = [
        Provider(name=name, forward=run, backward=backward, exact=False)
        for name, run in ways.items()
    ]
    return Case(providers=providers, parameters=[gate_up, down])
