"""Router, selection and experts of one network as one compiled graph, for one token at a time.

Batch-1 decoding through a small model is mostly the cost of starting operations: scoring, selecting
and listing the experts are some twenty of them per layer. In one graph they are five calls.

Shapes: d hidden size, E experts.
"""

from __future__ import annotations

import copy
import functools
import threading

import torch
from torch import Tensor, nn

from .adaptive_compiled import Graph, agrees, alike, arguments, compile_wanted, facts, report
from .adaptive_gather import ExpertWeights, plain, uncompiled
from .adaptive_layout import rows_of

#: graphs by what they were compiled for; None where that did not work.
_DECODERS: dict[tuple[object, ...], Graph | None] = {}
_LOCK = threading.Lock()


class Score:
    """A router as a pure function, without its tensors; equal for routers that compute alike."""

    def __init__(self, router: nn.Module) -> None:
        self._key = alike(router)
        self._names = tuple(name for name, _ in _named(router))
        self._router = copy.deepcopy(router).to("meta")

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(self._names, tensors, strict=True))
        scores: Tensor = torch.func.functional_call(self._router, named, (x,))
        return scores

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Score) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def _named(router: nn.Module) -> list[tuple[str, Tensor]]:
    return [*router.named_parameters(), *router.named_buffers()]


class Decoder:
    """One network's router, selection and experts as one compiled graph, for one token at a time.

    Holds the tensors, so that a call costs little besides the graph; make a new one when a
    parameter is replaced. Networks that compute alike share graphs.

    Args:
        weights: the network's.
        router: x [1, d] -> scores [1, E], a pure function of x and its tensors; None where the
            network's own gate scores (see `own_scores`).

    Attributes:
        plain: the weights are ordinary CPU tensors of one dtype, gate and up by rows.
    """

    def __init__(self, weights: ExpertWeights, router: nn.Module | None) -> None:
        self.weights = weights
        matrices = (weights.up, weights.up if weights.gate is None else weights.gate)
        self.plain = plain(weights) and all(matrix.stride(1) == 1 for matrix in matrices)
        self._rows, self._front = rows_of(weights.down), arguments(weights)
        self._score = None if router is None else Score(router)
        self._tensors = () if router is None else tuple(tensor for _, tensor in _named(router))
        self._graphs: dict[tuple[object, ...], Graph | None] = {}

    def __call__(self, x: Tensor, rule: str, number: float) -> tuple[Tensor, Tensor] | None:
        """Return the output [1, d] and the mask of the experts that made it, bool [E].

        None where the compiled form does not run. The caller sees to it that nothing is recorded
        or traced and that x [1, d] has the weights' dtype and device.
        """
        rows = rows_of(self.weights.down)
        if rows is None or self._rows is None or rows.data_ptr() != self._rows.data_ptr():
            self._rows, self._front = rows, arguments(self.weights)
        key = (rule, rows is None, torch.get_num_threads(), torch.is_inference_mode_enabled())
        try:
            graph = self._graphs[key]
        except KeyError:
            graph = self._graphs[key] = self._shared_graph(x, rule, number)
        if graph is None:
            return None
        try:
            return self._run(graph, x, rule, number)
        except Exception as error:
            report(error)
            self._graphs[key] = None
            return None

    def _run(self, graph: Graph, x: Tensor, rule: str, number: float) -> tuple[Tensor, Tensor]:
        return graph.run(x, self._front, None, None, _value(rule, number), *self._tensors)

    def _shared_graph(self, x: Tensor, rule: str, number: float) -> Graph | None:
        """Return the graph of all layers that compute alike, once it gave a right output."""
        dtypes = tuple(t.dtype for t in self._tensors)
        key = (self._score, rule, dtypes, *facts(x, self.weights))
        with _LOCK:
            if key not in _DECODERS:
                graph = None
                if compile_wanted(self.weights):
                    graph = Graph(self.weights, self._score, rule)
                right = graph is not None and self._right(graph, x, rule, number)
                _DECODERS[key] = graph if right else None
            return _DECODERS[key]

    def _right(self, graph: Graph, x: Tensor, rule: str, number: float) -> bool:
        try:
            found, mask = self._run(graph, x, rule, number)
        except Exception as error:
            report(error)
            return False
        return agrees(found, uncompiled(self.weights)(x, self.weights, mask, None))


@functools.lru_cache(maxsize=4096)
def _value(rule: str, number: float) -> Tensor:
    """Return the rule's value in the form that the graph takes; k as a size, so that one graph
    serves every k."""
    with torch.inference_mode(False):
        if rule != "top-k":
            return torch.tensor(number, dtype=torch.float64)
        sized = torch.empty(int(number))
        torch._dynamo.decorators.mark_unbacked(sized, 0)
        return sized
