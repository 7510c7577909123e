"""Several tokens through a whole feed-forward network, what they did not select zeroed, compiled.

Uncompiled, activation, product of gate and up and mask are passes over the hidden units of their
own; compiled they are one, which pays for what routing costs. The first call of a shape takes
seconds and needs a C++ compiler; where that fails or differs, the caller runs it uncompiled.

Shapes: T tokens, d hidden size, f neurons, E experts.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive_compiled import agrees, compile_wanted, facts, new_name, report
from .adaptive_gather import ExpertWeights, Run
from .adaptive_inductor import Inductor, compiled

#: tokens of the batch a graph is traced with.
TRACED = 32
#: arguments of a graph; the number of tokens comes after them.
_ARGUMENTS = ("x", "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "gated", "mask")
#: graphs by what they were compiled for; None where that did not work.
_BATCHES: dict[tuple[object, ...], Run | None] = {}
_LOCK = threading.Lock()


def batch(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None, plainly: Run
) -> Tensor:
    """Return what every token gets from its experts, [T, d], T at least 2.

    For plain CPU tensors of one dtype, x and mask contiguous, and nothing recorded or traced.

    Args:
        mask: [T, E] bool.
        gated: [T, f] activated gate (`up` without gate) where it is known already.
        plainly: the same uncompiled, of the same arguments.
    """
    whole = gated is None or gated.is_contiguous()
    if not (whole and x.is_contiguous() and mask.is_contiguous()):
        return plainly(x, weights, mask, gated)
    at_hand = weights.graphs
    case = (gated is None, torch.get_num_threads(), torch.is_inference_mode_enabled())
    if case not in at_hand:
        at_hand[case] = _found(x, weights, mask, gated, plainly)
    run = at_hand[case]
    if run is not None:
        try:
            return run(x, weights, mask, gated)
        except Exception as error:
            report(error)
            at_hand[case] = None
    return plainly(x, weights, mask, gated)


def _found(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None, plainly: Run
) -> Run | None:
    """Return what runs batches of all networks that compute alike, None where nothing does."""
    matrices = (weights.up if weights.gate is None else weights.gate, weights.up, weights.down)
    layout = tuple(matrix.stride() for matrix in matrices)
    key = (layout, None if gated is None else gated.dtype, *facts(x, weights))
    with _LOCK:
        if key not in _BATCHES:
            _BATCHES[key] = _tried(x, weights, mask, gated, plainly)
        return _BATCHES[key]


def _tried(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None, plainly: Run
) -> Run | None:
    """Return what runs such batches from now on, once it gave a right output."""
    if not compile_wanted(weights):
        return None
    try:
        run = _made(x, weights, mask, gated)
        right = agrees(run(x, weights, mask, gated), plainly(x, weights, mask, gated))
    except Exception as error:
        report(error)
        return None
    return run if right else None


def _made(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Run:
    """Return the compiled graph, which checks nothing, for any number of tokens."""
    backend = Inductor()
    activation, shared = weights.activation, weights.shared

    def step(
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        gated: Tensor | None,
        mask: Tensor,
    ) -> Tensor:
        if gated is None:
            first = (up, up_bias) if gate is None else (gate, gate_bias)
            gated = activation(functional.linear(x, *first))
        hidden = gated if gate is None else gated * functional.linear(x, up, up_bias)
        parts = torch.unflatten(hidden[:, shared:], -1, (mask.shape[1], -1))
        routed = torch.where(mask.unsqueeze(-1), parts, 0).flatten(1)
        hidden = torch.cat([hidden[:, :shared], routed], dim=-1) if shared else routed
        return functional.linear(hidden, down, down_bias)

    # stand-ins, so that the graph does not depend on which batch was first
    alike = [None if t is None else t.new_zeros(TRACED, t.shape[1]) for t in (x, gated, mask)]
    for tensor in alike:
        if tensor is not None:
            torch._dynamo.decorators.mark_dynamic(tensor, 0)
    compiled(step, new_name("batch"), backend)(alike[0], *_tensors(weights), *alike[1:])
    made, order = backend.ordered(_ARGUMENTS)

    def run(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
        given = (x, *_tensors(weights), gated, mask, x.shape[0])
        out: Tensor = made(*[given[place] for place in order])[0]
        return out

    return run


def _tensors(weights: ExpertWeights) -> tuple[Tensor | None, ...]:
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return (weights.gate, weights.up, weights.down, *biases)
