"""Router tensors read off the weights of a split layer, without any data.

Names and meaning are those of the adaptive runtime. Arrays are float32, `order` is the split's
[f], `rows` and `gate`, `up` are the dense model's, in its own order of neurons.

Shapes: f neurons, d model width, N experts of m neurons.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaconvert.clustering.analytic import check_shared
from adaconvert.clustering.checks import check_matrix
from adaconvert.clustering.splits import unit_rows

Floats = NDArray[np.float32]
WEIGHTS = "weights of the router"


def param_center(
    rows: NDArray[Any], order: NDArray[np.int64], num_experts: int, shared: int = 0
) -> dict[str, Floats]:
    """Return `weight` [N, d], the mean of an expert's rows at unit length.

    An expert of rows that disagree has a short mean, and scores low for every input.

    Raises:
        OptionError: the routed neurons cannot be cut into N experts.
        SourceError: a weight is NaN or infinite.

    Source: MoEfication, 2110.01786, section 3.3, "parameter center".
    """
    check_matrix(rows, WEIGHTS)
    return {"weight": expert_means(unit_rows(rows), order, num_experts, shared)}


def similarity(
    rows: NDArray[Any], order: NDArray[np.int64], num_experts: int, shared: int = 0
) -> dict[str, Floats]:
    """Return `weight` [N, d], the mean of an expert's rows as they are, at unit length.

    Long rows weigh more than in `param_center`; how much they agree does not count.

    Raises:
        OptionError: the routed neurons cannot be cut into N experts.
        SourceError: a weight is NaN or infinite.

    Source: MoEfication, 2110.01786, section 3.3, "similarity".
    """
    check_matrix(rows, WEIGHTS)
    return {"weight": unit_rows(expert_means(rows, order, num_experts, shared))}


def analytic(
    gate: NDArray[Any] | None,
    up: NDArray[Any],
    order: NDArray[np.int64],
    num_experts: int,
    shared: int = 0,
    *,
    representatives: NDArray[np.int64] | None = None,
) -> dict[str, Floats]:
    """Return `up` and, of a GLU, `gate` [N, d], unit rows of one neuron per expert, `bias` [N].

    Args:
        gate: [f, d], or None for a plain feed-forward layer.
        up: [f, d].
        order: of the neurons.
        num_experts: N.
        shared: neurons in front that are always on.
        representatives: the neuron [N] that stands for each expert, by its number in the dense
            model; None takes the one whose row the activation follows is nearest to the mean of
            its expert's.

    Raises:
        OptionError: the routed neurons cannot be cut into N experts.
        SourceError: a weight is NaN or infinite.

    Source: CMoE, 2502.04416, section 3.3; representatives from weights are ours.
    """
    for rows in (up,) if gate is None else (gate, up):
        check_matrix(rows, WEIGHTS)
    if representatives is None:
        first = up if gate is None else gate
        representatives = central_neurons(first, order, num_experts, shared)
    tensors = {} if gate is None else {"gate": unit_rows(gate[representatives])}
    tensors["up"] = unit_rows(up[representatives])
    tensors["bias"] = np.zeros(num_experts, dtype=np.float32)
    return tensors


def expert_means(
    rows: NDArray[Any], order: NDArray[np.int64], num_experts: int, shared: int
) -> Floats:
    """Return the mean [N, d] of the rows of each routed expert."""
    check_shared(len(order), num_experts, shared)
    experts = order[shared:].reshape(num_experts, -1)
    total = np.zeros((num_experts, rows.shape[1]))
    for neurons in experts.T:
        total += rows[neurons]
    return (total / experts.shape[1]).astype(np.float32)


def central_neurons(
    rows: NDArray[Any], order: NDArray[np.int64], num_experts: int, shared: int
) -> NDArray[np.int64]:
    """Return the neuron [N] of each expert that points most like the mean of its unit rows."""
    unit = unit_rows(rows)
    means = expert_means(unit, order, num_experts, shared)
    experts = order[shared:].reshape(num_experts, -1)
    likeness = np.stack([(unit[neurons] * means).sum(axis=1) for neurons in experts.T], axis=1)
    central: NDArray[np.int64] = experts[np.arange(num_experts), likeness.argmax(axis=1)]
    return central
