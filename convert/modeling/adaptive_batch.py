"""Several tokens through a whole feed-forward network, what they did not select zeroed, compiled.

Uncompiled, activation, product of gate and up, and mask are passes over the hidden units of their
own, and router and selection are ten operations that take longer to start than to run. Compiled it
is one graph, which pays for what routing costs. The first call of a shape takes seconds and needs a
C++ compiler; where that fails or differs, the caller runs it uncompiled.

Shapes: T tokens, d hidden size, f neurons, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive_compiled import (
    agrees,
    arguments,
    choose,
    compile_wanted,
    facts,
    new_name,
    own_scores,
    report,
)
from .adaptive_gather import ExpertWeights, Run, observed
from .adaptive_inductor import Inductor, compiled

#: tokens of the batch a graph is traced with.
TRACED = 32

#: graphs by what they were compiled for; None where that did not work.
_BATCHES: dict[tuple[object, ...], BatchGraph | None] = {}
_LOCK = threading.Lock()


def batch(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None, plainly: Run
) -> Tensor:
    """Return what every token gets from its experts, [T, d], T at least 2.

    For plain CPU tensors of one dtype with nothing recorded or traced.

    Args:
        mask: [T, E] bool.
        gated: [T, f] activated gate (`up` without gate) where it is known already.
        plainly: the same uncompiled, of the same arguments.
    """
    varying = [x, mask] if gated is None else [x, mask, gated]
    if observed() or not all(tensor.is_contiguous() for tensor in varying):
        return plainly(x, weights, mask, gated)
    at_hand = weights.graphs
    case = (gated is None, torch.get_num_threads(), torch.is_inference_mode_enabled())
    if case not in at_hand:
        at_hand[case] = _found(x, weights, mask, gated, plainly)
    run = at_hand[case]
    if run is not None:
        try:
            return run(*varying)[0]
        except Exception as error:
            report(error)
            at_hand[case] = None
    return plainly(x, weights, mask, gated)


def _found(
    x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None, plainly: Run
) -> Callable[..., tuple[Tensor, ...]] | None:
    """Return what runs batches of this network, None where nothing compiled does."""
    key = (layout(weights), None if gated is None else gated.dtype, *facts(x, weights))
    with _LOCK:
        if key not in _BATCHES:
            _BATCHES[key] = None
            if compile_wanted(weights):
                graph = BatchGraph(weights, None, None)
                if graph.right(weights, plainly, like={"x": x, "mask": mask, "gated": gated}):
                    _BATCHES[key] = graph
        graph_or_none = _BATCHES[key]
    if graph_or_none is None:
        return None
    return graph_or_none.bound(weights, ("x", "mask") if gated is None else ("x", "mask", "gated"))


def layout(weights: ExpertWeights) -> tuple[object, ...]:
    """Return how the matrices lie in memory, which a graph is compiled for."""
    matrices = (weights.up if weights.gate is None else weights.gate, weights.up, weights.down)
    # `down` may have more or fewer rows than tokens have numbers: a network in a projection's place
    return tuple((matrix.shape, matrix.stride()) for matrix in matrices)


class BatchGraph:
    """The compiled form of one case, for any number of tokens.

    Args:
        score: of the router; None where the network's own gate scores, or the mask is given.
        rule: selection; None where the mask is given.
    """

    def __init__(
        self, weights: ExpertWeights, score: Callable[..., Tensor] | None, rule: str | None
    ) -> None:
        self._backend = Inductor()
        step = _make_step(weights, score, rule)
        self._step = compiled(step, new_name("batch"), self._backend)

    def right(
        self,
        weights: ExpertWeights,
        plainly: Run,
        *,
        like: Mapping[str, Tensor | None],
        value: Tensor | None = None,
        tensors: Sequence[Tensor] = (),
    ) -> bool:
        """Compile it, and return whether it gives what `plainly` does.

        Args:
            like: "x", and "gated" and "mask" where they are given: random ones like them are
                tried, so that nothing depends on which batch was first.
        """
        tried = {name: None if t is None else _stand_in(t) for name, t in like.items()}
        varying = [name for name, tensor in tried.items() if tensor is not None]
        x, gated, mask = (tried.get(name) for name in ("x", "gated", "mask"))
        try:
            with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
                self._step(x, *arguments(weights, by_rows=False), gated, mask, value, *tensors)
            run = self.bound(weights, varying, value, tensors)
            if run is None or x is None:
                return False
            out, *chosen = run(*[tried[name] for name in varying])
            return agrees(out, plainly(x, weights, chosen[0] if mask is None else mask, gated))
        except Exception as error:
            report(error)
            return False

    def bound(
        self,
        weights: ExpertWeights,
        varying: Sequence[str],
        value: Tensor | None = None,
        tensors: Sequence[Tensor] = (),
    ) -> Callable[..., tuple[Tensor, ...]] | None:
        """Return what was compiled as a function of `varying`, see `Inductor.bound`: to the output,
        and the mask [T, E] unless that is given."""
        named = dict(zip(_WEIGHTS, arguments(weights, by_rows=False), strict=True)) | {
            "value": value
        }
        named |= {f"tensors_{i}": tensor for i, tensor in enumerate(tensors)}
        size = value.shape[0] if value is not None and value.dim() else 0
        return self._backend.bound(named, size, varying)


def _stand_in(tensor: Tensor) -> Tensor:
    """Return random numbers like those of a tensor [T, n] for `TRACED` tokens, T left open."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(TRACED, tensor.shape[1], generator=generator)
    made = drawn > 0 if tensor.dtype == torch.bool else drawn.to(tensor.dtype)
    torch._dynamo.decorators.mark_dynamic(made, 0)
    return made


_WEIGHTS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


def _make_step(
    weights: ExpertWeights, score: Callable[..., Tensor] | None, rule: str | None
) -> Callable[..., tuple[Tensor, ...]]:
    activation, width, shared = weights.activation, weights.width, weights.shared

    def step(
        x: Tensor,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        gated: Tensor | None,
        mask: Tensor | None,
        value: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        if gated is None:
            first = (up, up_bias) if gate is None else (gate, gate_bias)
            gated = activation(functional.linear(x, *first))
        chosen = mask
        if chosen is None:
            assert rule is not None
            assert value is not None
            own = own_scores(gated, width, shared) if score is None else score(x, *tensors)
            chosen = choose(own, rule, value)
        hidden = gated if gate is None else gated * functional.linear(x, up, up_bias)
        parts = torch.unflatten(hidden[:, shared:], -1, (-1, width))
        routed = torch.where(chosen.unsqueeze(-1), parts, 0).flatten(1)
        hidden = torch.cat([hidden[:, :shared], routed], dim=-1) if shared else routed
        out = functional.linear(hidden, down, down_bias)
        return (out,) if mask is not None else (out, chosen)

    return step
