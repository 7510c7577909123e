"""What the cells of the granularity table need from training text, layer by layer.

Everything goes into one file per layer of a work folder, so a stopped run goes on from there.
Shapes: T tokens, f neurons, E experts, Q points of a distribution.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from bench.granularity_cells import ROUTER_WIDTH, Cell
from torch.nn.functional import linear

from adaconvert.clustering import routers, splits
from adaconvert.data.tokens import TokenBlocks
from adaconvert.io.source import Source
from adaconvert.layerwise.ffn_data import FfnLayer, ffn_layers, run_digest
from adaconvert.layerwise.ffn_weights import FfnWeights
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.d2dmoe.fit import fit_layer_router
from adaconvert.methods.d2dmoe.router import RouterSettings
from adaconvert.methods.d2dmoe.router import scores as contribution_scores
from adaconvert.methods.moefy.config import Sizes

#: tokens that thresholds are read off.
PROBE = 2048
#: shares of (token, expert) pairs at which score distributions are kept.
POINTS = numpy.linspace(0, 1, 201)
Arrays = dict[str, Any]


def key(*parts: object) -> str:
    """Return the name of an array in a layer's file."""
    return "|".join(str(part) for part in parts)


def fit(
    folder: Path, tokens: TokenBlocks, cells: Iterable[Cell], work: Path, *, steps: int, seed: int
) -> list[Arrays]:
    """Return what each layer's cells need, from the work folder where it is there already.

    Args:
        folder: the dense checkpoint.
        tokens: training text.
        cells: of the table.
        work: the folder.
        steps: of each contribution router.
        seed: of random splits and routers.
    """
    wanted = list(cells)
    source = Source.open(folder)
    facts = sorted({(c.split, c.width, c.router) for c in wanted})
    store = WorkFolder(work, run_digest(source, tokens, facts, steps, seed))
    started = time.monotonic()
    for layer in ffn_layers(source, tokens, work=store):
        store.save(f"layer.{layer.index}", fit_layer(layer, wanted, steps, seed))
        seconds = time.monotonic() - started
        print(f"layer {layer.index} fitted after {seconds:.0f} s", file=sys.stderr, flush=True)
    store.discard_states()
    return [store.load(f"layer.{index}") for index in range(store.next_block)]


def fit_layer(layer: FfnLayer, cells: Iterable[Cell], steps: int, seed: int) -> Arrays:
    """Return the arrays of one layer: orders, routers, score distributions, neuron importance."""
    weights, found = layer.weights, {}
    hidden = torch.cat([weights.hidden(x) for x in layer.chunks()])
    importance = hidden.abs().mean(dim=0) * weights.neuron_norms()
    found["importance"] = importance.numpy()
    found["scale"] = _scale(layer).numpy()
    for cell in cells:
        if cell.split in ("dense", "static"):
            continue
        name = key("order", *cell.partition)
        if name not in found:
            found[name] = _order(weights, cell, seed + layer.index)
        order = found[name]
        if cell.router == "contribution" and key("w1", *cell.partition) not in found:
            _add_router(found, layer, cell, order, steps, seed)
        if cell.router == "param-center" and key("center", *cell.partition) not in found:
            made = routers.param_center(weights.first.numpy(), order, len(order) // cell.width)
            found[key("center", *cell.partition)] = made["weight"]
        name = key("scores", *cell.partition, cell.router)
        if name not in found:
            found[name], found[key("ratios", *cell.partition, cell.router)] = _distributions(
                scores(
                    cell,
                    found,
                    x=layer.inputs[:PROBE],
                    hidden=hidden[:PROBE],
                    activated=weights.activated(layer.inputs[:PROBE]),
                    norms=weights.neuron_norms(),
                )
            )
    return found


def _scale(layer: FfnLayer) -> torch.Tensor:
    """Return what a neuron's activated gate is multiplied by on average, [f]."""
    weights = layer.weights
    if weights.gate is None:
        return weights.neuron_norms()
    size = sum(linear(x, weights.up, weights.up_bias).abs().sum(dim=0) for x in layer.chunks())
    return size / len(layer.inputs) * weights.neuron_norms()


def _order(weights: FfnWeights, cell: Cell, seed: int) -> Any:
    if cell.split == "balanced-kmeans":
        experts = weights.neurons // cell.width
        return splits.clustered_order(weights.first.numpy(), experts, seed)
    if cell.split == "random":
        return splits.random_order(weights.neurons, seed)
    return splits.contiguous_order(weights.neurons)


def _add_router(
    found: Arrays, layer: FfnLayer, cell: Cell, order: Any, steps: int, seed: int
) -> None:
    sizes = Sizes(experts=len(order) // cell.width, width=cell.width)
    settings = RouterSettings(width=ROUTER_WIDTH, steps=steps, seed=seed)
    w1, w2, quality = fit_layer_router(layer, order, sizes, settings)
    found[key("w1", *cell.partition)], found[key("w2", *cell.partition)] = w1, w2
    found[key("spearman", *cell.partition)] = numpy.array(quality.spearman)


def _distributions(values: torch.Tensor) -> tuple[Any, Any]:
    """Return the scores, and the ratios to a token's highest, that shares POINTS reach, [Q]."""
    ratios = values / values.amax(dim=1, keepdim=True).clamp_min(1e-30)
    return tuple(numpy.quantile(found.flatten().numpy(), 1 - POINTS) for found in (values, ratios))


def scores(
    cell: Cell,
    arrays: Mapping[str, Any],
    *,
    x: torch.Tensor,
    hidden: torch.Tensor,
    activated: torch.Tensor | None,
    norms: torch.Tensor,
) -> torch.Tensor:
    """Return the score of every expert for every token, [T, E], never negative.

    Args:
        cell: says which router and which experts.
        arrays: of the layer.
        x: what the FFN receives, [T, d].
        hidden: what its down projection receives, [T, f].
        activated: act(gate x), [T, f]; only the routers GATES read it.
        norms: length of each neuron's output weights, [f].
    """
    if cell.router == "contribution":
        w1, w2 = (torch.from_numpy(arrays[key(n, *cell.partition)]) for n in ("w1", "w2"))
        return contribution_scores(x.float(), w1, w2)
    if cell.router == "param-center":
        centers = torch.from_numpy(arrays[key("center", *cell.partition)])
        unit = torch.nn.functional.normalize(x.float(), dim=-1)
        return (unit @ centers.T).softmax(dim=-1)
    order = torch.from_numpy(arrays[key("order", *cell.partition)])
    if cell.router == "oracle":
        if cell.width == 1:
            return (hidden.float() * norms).abs()
        mass = (hidden.float() * norms).square()[:, order]
        return mass.reshape(len(mass), -1, cell.width).sum(dim=2).sqrt()
    assert activated is not None
    size = activated.float().abs()
    if cell.router == "gate-scaled":
        size = size * torch.from_numpy(arrays["scale"])
    if cell.width == 1:
        return size
    size = size[:, order]
    return size.reshape(len(size), -1, cell.width).sum(dim=2)


def threshold(arrays: Mapping[str, Any], cell: Cell, share: float) -> float:
    """Return the score that a share of one layer's (token, expert) pairs reaches."""
    known = arrays[key("scores", *cell.partition, cell.router)]
    return float(numpy.interp(share, POINTS, known))


def tau(layers: list[Arrays], cell: Cell, share: float) -> float:
    """Return the one tau at which a share of all layers' experts runs."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if _running(layers, cell, middle) > share else (low, middle)
    return (low + high) / 2


def _running(layers: list[Arrays], cell: Cell, tau: float) -> float:
    name = key("ratios", *cell.partition, cell.router)
    # ratios fall along POINTS, and interp wants them to rise
    return sum(float(numpy.interp(tau, a[name][::-1], POINTS[::-1])) for a in layers) / len(layers)
