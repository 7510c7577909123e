"""Providers of the routing plan, of the router and of decoding by selected experts.

T tokens, K slots per token, E experts, d hidden size, f neurons, m neurons of one expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from cells import Cell
from timing import Case, Provider
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.kernels import dispatch
from adaconvert.kernels.plan import route_plan as our_plan
from adaconvert.kernels.routing import router_select as our_select

#: bytes of weights that the layers of a decoding case have together; several times the cache.
ROTATED = {"cpu": 150_000_000, "cuda": 500_000_000}
LEAST_LAYERS = {"cpu": 2, "cuda": 8}


def insisting(call: Callable[[int], Any]) -> Callable[[int], Any]:
    """Return the call with ADACONVERT_KERNELS=triton, so that it fails where Triton cannot run."""

    def run(layer: int) -> Any:
        before = os.environ.get(dispatch.VARIABLE)
        os.environ[dispatch.VARIABLE] = "triton"
        try:
            return call(layer)
        finally:
            if before is None:
                del os.environ[dispatch.VARIABLE]
            else:
                os.environ[dispatch.VARIABLE] = before

    return run


def route_plan(cell: Cell, device: str) -> Case:
    """Return the case of sorting pairs; the baseline is what one writes without a plan."""
    scores = torch.rand(cell.tokens, cell.experts, device=device)
    experts_of = scores.topk(cell.slots).indices.int()

    def eager(_: int) -> tuple[Tensor, ...]:
        flat = experts_of.flatten().long()
        pairs = flat.sort(stable=True).indices
        ends = torch.bincount(flat, minlength=cell.experts).cumsum(0)
        return pairs, pairs // cell.slots, ends, pairs.argsort().view(experts_of.shape)

    def ours(_: int) -> tuple[Tensor, ...]:
        plan = our_plan(experts_of, cell.experts)
        return plan.pairs, plan.tokens, plan.ends, plan.places

    providers = [
        Provider(name="torch sort, bincount, cumsum", forward=eager),
        Provider(name="adaconvert auto", forward=ours),
        Provider(name="adaconvert triton", forward=insisting(ours)),
    ]
    pairs = cell.tokens * cell.slots
    return Case(providers=providers, recorded=False, moved=4.0 * pairs + 3 * 8.0 * pairs)


def router_select(cell: Cell, device: str) -> Case:
    """Return the case of softmax, top-k, shares and the sums of a balance loss."""
    logits = torch.randn(cell.tokens, cell.experts, device=device).requires_grad_()
    at_weights = torch.randn(cell.tokens, cell.slots, device=device)
    at_sums = torch.randn(cell.experts, device=device)

    def eager(_: int) -> tuple[Tensor, ...]:
        logits.grad = None
        probabilities = logits.float().softmax(-1)
        values, experts_of = probabilities.topk(cell.slots)
        weights = values / values.sum(-1, keepdim=True)
        counts = torch.bincount(experts_of.flatten(), minlength=cell.experts)
        return weights, probabilities.sum(0), experts_of, counts

    def ours(_: int) -> tuple[Tensor, ...]:
        logits.grad = None
        found = our_select(logits, top_k=cell.slots, normalise="selected")
        return found.weights, found.probability_sums, found.experts, found.counts

    def backward(out: tuple[Tensor, ...]) -> None:
        torch.autograd.backward(out[:2], [at_weights, at_sums])

    providers = [
        Provider(name="torch softmax, topk", forward=eager, backward=backward),
        Provider(name="adaconvert auto", forward=ours, backward=backward),
        Provider(name="adaconvert triton", forward=insisting(ours), backward=backward),
    ]
    return Case(providers=providers, moved=4.0 * logits.numel() + 12.0 * at_weights.numel())


# -- decoding


class Layers:
    """Random networks that together exceed the caches; experts are neighbours in them."""

    def __init__(self, cell: Cell, device: str) -> None:
        neurons, hidden = cell.experts * cell.width, cell.hidden
        size = 3 * hidden * neurons * cell.dtype.itemsize
        self.bytes = size
        self.count = max(LEAST_LAYERS[device], round(ROTATED[device] / size))

        def matrix() -> Tensor:
            return torch.randn(neurons, hidden, device=device).mul_(hidden**-0.5).to(cell.dtype)

        self.gate_up = [torch.cat([matrix(), matrix()]) for _ in range(self.count)]
        #: [f, d], by rows of neurons, and [d, f] as checkpoints hold it.
        self.down_rows = [matrix() for _ in range(self.count)]
        self.down = [rows.t().contiguous() for rows in self.down_rows]
        self.routers = [
            torch.randn(cell.experts, hidden, device=device).to(cell.dtype)
            for _ in range(self.count)
        ]
        self.x = torch.randn(cell.tokens, hidden, device=device).to(cell.dtype)
        self.ids = [
            torch.rand(cell.tokens, cell.experts, device=device).topk(cell.slots).indices
            for _ in range(self.count)
        ]

    def dense(self, layer: int) -> Tensor:
        gate, up = functional.linear(self.x, self.gate_up[layer]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down[layer])


def dynk_decode(cell: Cell, device: str) -> Case:
    """Return the case of a few tokens through their experts; random experts, or a router's."""
    layers = Layers(cell, device)
    build = _on_gpu if device == "cuda" else _on_cpu
    share = cell.slots / cell.experts
    dense = Provider(name="dense linear", forward=layers.dense, exact=False, work=1 / share)
    return Case(
        providers=[dense, *build(cell, layers)],
        layers=layers.count,
        graphed=True,
        recorded=False,
        flops=2.0 * cell.tokens * share * layers.bytes / cell.dtype.itemsize,
        # of one token; several may touch more
        moved=share * layers.bytes,
    )


def _on_gpu(cell: Cell, layers: Layers) -> list[Provider]:
    from adaconvert.kernels.decode import dynk_decode as our_decode

    counts = torch.full((cell.tokens,), cell.slots, dtype=torch.int32, device=layers.x.device)
    # [E, 2m, d], gate over up within each expert, and [E, m, d]
    firsts = []
    for matrix in layers.gate_up:
        gate, up = (half.unflatten(0, (cell.experts, -1)) for half in matrix.chunk(2))
        firsts.append(torch.cat([gate, up], 1))
    lasts = [rows.unflatten(0, (cell.experts, -1)) for rows in layers.down_rows]

    def selected(layer: int, ids: Tensor) -> Tensor:
        weights = {"gate_up": firsts[layer], "down_rows": lasts[layer]}
        return our_decode(layers.x, ids, counts, **weights, activation="silu", glu=True)

    def routed(layer: int) -> Tensor:
        scores = functional.linear(layers.x, layers.routers[layer])
        return selected(layer, scores.topk(cell.slots).indices)

    given = insisting(lambda layer: selected(layer, layers.ids[layer]))
    return [
        Provider(name="adaconvert triton", forward=given, exact=False),
        Provider(name="adaconvert triton, with router", forward=insisting(routed), exact=False),
    ]


def _on_cpu(cell: Cell, layers: Layers) -> list[Provider]:
    """Return the adaptive runtime's paths; a CPU has no kernel of its own for this."""
    from adaconvert.modeling.adaptive_execution import (
        Decoder,
        ExpertWeights,
        decode_step,
        run_experts,
    )
    from adaconvert.modeling.adaptive_layout import keep_rows
    from adaconvert.modeling.adaptive_routers import LinearRouter

    weights, masks, decoders = [], [], []
    for layer in range(layers.count):
        gate, up = layers.gate_up[layer].chunk(2)
        down = nn.Parameter(layers.down[layer], requires_grad=False)
        keep_rows(down)
        none = (None, None, None)
        weights.append(ExpertWeights(gate, up, down, *none, functional.silu, cell.width, 0))
        mask = torch.zeros(cell.tokens, cell.experts, dtype=torch.bool)
        masks.append(mask.scatter_(1, layers.ids[layer], True))
        router = LinearRouter(cell.hidden, cell.experts, normalised=False)
        router.weight.data.copy_(layers.routers[layer])
        decoders.append(Decoder(weights[-1], router))

    def ours(layer: int) -> Tensor:
        mask = None if cell.slots == cell.experts else masks[layer]
        return run_experts(layers.x, weights[layer], mask)[0]

    def routed(layer: int) -> Tensor:
        found = decode_step(layers.x, decoders[layer], "top-k", cell.slots)
        if found is None:
            raise RuntimeError("no compiled step for this")
        return found[0]

    providers = [Provider(name="adaconvert auto", forward=ours, exact=False)]
    if cell.slots < cell.experts:
        name = "adaconvert auto, with router"
        providers.append(Provider(name=name, forward=routed, exact=False))
    return providers
