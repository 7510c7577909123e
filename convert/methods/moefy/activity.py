"""What of a split is read off activations on text: groups of neurons, and thresholds.

Shapes: T tokens, f neurons, N experts of m neurons, s shared neurons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.methods.moefy.config import Sizes

if TYPE_CHECKING:
    import numpy
    import torch

    from adaconvert.layerwise.ffn_data import FfnLayer

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: activations per token that count as active for CMoE's markers (2502.04416, section 3.2).
MARKED = 10
#: scores a threshold is taken from; of more, every n-th token counts.
MOST_SCORES = 1 << 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An order [f] of neurons, and the neuron that stands for each expert, [N], if there is one."""

    order: Array
    representatives: Array | None = None


def split(layer: FfnLayer, kind: str, sizes: Sizes, seed: int) -> Found:
    """Return the order of one block's neurons by what they do on the tokens it receives."""
    import torch

    from adaconvert.clustering import analytic, splits

    if kind == "coactivation":
        blocks = (layer.weights.hidden(chunk).numpy() for chunk in layer.chunks())
        return Found(order=splits.coactivation_order(blocks, sizes.experts, seed))
    marks = torch.cat([_marks(layer, chunk) for chunk in layer.chunks()])
    order, representatives = analytic.shared_routed(
        marks.numpy(), num_experts=sizes.experts, shared=sizes.shared
    )
    return Found(order=order, representatives=representatives)


def _marks(layer: FfnLayer, inputs: torch.Tensor) -> torch.Tensor:
    """Return which neurons are among a token's most active, bool [T, f].

    Rows and inputs are normalised, so that long rows do not win by their length (2502.04416).
    """
    import torch
    from torch.nn.functional import normalize

    weights = layer.weights
    x = normalize(inputs, dim=-1)
    hidden = weights.activation(x @ normalize(weights.first, dim=-1).T)
    if weights.gate is not None:
        hidden = hidden * (x @ normalize(weights.up, dim=-1).T)
    best = hidden.abs().topk(min(MARKED, hidden.shape[1]), dim=-1).indices
    return torch.zeros_like(hidden, dtype=torch.bool).scatter_(-1, best, True)


def threshold(
    layer: FfnLayer,
    router: str,
    order: Array,
    sizes: Sizes,
    tensors: Mapping[str, Array],
    keep: float,
) -> float:
    """Return the score that a share `keep` of all (token, expert) pairs reaches.

    Args:
        layer: the network and what it receives.
        router: kind of the router.
        order: of the neurons.
        sizes: of the split.
        tensors: the router's, by name.
        keep: between 0 and 1; at 1 every expert runs.
    """
    import torch

    if keep >= 1:
        return 0.0
    tokens = max(MOST_SCORES // sizes.experts, 1)
    step = max(-(-len(layer.inputs) // tokens), 1)
    neurons = torch.from_numpy(order)
    scores = torch.cat(
        [
            _scores(layer, chunk, router, neurons, sizes, tensors).flatten()
            for chunk in torch.split(layer.inputs[::step], layer.weights.chunk())
        ]
    )
    kept = max(round(keep * len(scores)), 1)
    found = float(scores.kthvalue(len(scores) - kept + 1).values)
    return found if math.isfinite(found) else 0.0


def _scores(
    layer: FfnLayer,
    inputs: torch.Tensor,
    router: str,
    order: torch.Tensor,
    sizes: Sizes,
    tensors: Mapping[str, Array],
) -> torch.Tensor:
    """Return the scores [T, N] the runtime computes for these inputs."""
    import torch

    from adaconvert.modeling.adaptive_routers import grouped, make_router

    weights = layer.weights
    if router == "gate":
        gated = weights.activated(inputs)[:, order]
        return grouped(gated.abs(), sizes.experts, sizes.shared)
    if router == "oracle":
        hidden = (weights.hidden(inputs) * weights.neuron_norms())[:, order]
        return grouped(hidden * hidden, sizes.experts, sizes.shared).sqrt()
    made = make_router(
        {"kind": router},
        inputs.shape[1],
        sizes.experts,
        gated=weights.gate is not None,
        activation=weights.activation,
    )
    assert made is not None, router
    made.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
    with torch.no_grad():
        scores: torch.Tensor = made(inputs)
    return scores
