"""Router, selection and experts of one network as one compiled graph.

Batch-1 decoding through a small model is mostly the cost of starting operations: scoring, selecting
and listing the experts are some twenty of them per layer. In one graph they are five calls.

Shapes: d hidden size, E experts.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive_batch import BatchGraph, layout
from .adaptive_compiled import (
    Graph,
    agrees,
    alike,
    arguments,
    compile_wanted,
    facts,
    gather_limit,
    is_small,
    report,
)
from .adaptive_gather import ExpertWeights, Run, observed, plain, uncompiled, unrecorded
from .adaptive_layout import find_rows
from .adaptive_routers import Router

#: rules that `decode_step` knows.
RULES = ("top-k", "dynamic-k", "threshold")

#: graphs by what they were compiled for; None where that did not work.
_DECODERS: dict[tuple[object, ...], Graph | None] = {}
_BATCHES: dict[tuple[object, ...], BatchGraph | None] = {}
_LOCK = threading.Lock()
#: settings (rule, number, threads) a decoder keeps ready.
_KEPT_STEPS = 64
#: x [T, d] -> output [T, d] and mask of the experts that made it [T, E]
Step = Callable[[Tensor], tuple[Tensor, ...]]


class Score:
    """A router as a pure function, without its tensors; equal for routers that compute alike.

    Args:
        order_only: numbers will do that order each token's experts as the scores do.
    """

    def __init__(self, router: nn.Module, *, order_only: bool = False) -> None:
        self._key = (alike(router), order_only)
        self._options = {"order_only": True} if order_only and isinstance(router, Router) else {}
        self._names = tuple(name for name, _ in _named(router))
        # tensors of `functional_call` may be no leaves, which cannot be copied
        bare: dict[int, Any] = {id(t): t.detach().to("meta") for _, t in _named(router)}
        self._router = copy.deepcopy(router, bare)

    def __call__(self, x: Tensor, *tensors: Tensor) -> Tensor:
        named = dict(zip(self._names, tensors, strict=True))
        scores: Tensor = torch.func.functional_call(self._router, named, (x,), self._options)
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
        dtype: of x.
        plain: the weights are ordinary CPU tensors of one dtype, gate and up by rows.
    """

    def __init__(self, weights: ExpertWeights, router: nn.Module | None) -> None:
        self.weights = weights
        self._score = None if router is None else Score(router)
        self._order = None if router is None else Score(router, order_only=True)
        self._tensors = () if router is None else tuple(tensor for _, tensor in _named(router))
        own = (weights.gate, weights.up, weights.down, weights.gate_bias, weights.up_bias)
        self._watched = [t for t in (*own, weights.down_bias, *self._tensors) if t is not None]
        self._steps: dict[tuple[object, ...], Step | None] = {}
        self._attach()

    def _attach(self) -> None:
        """Take the tensors as they are now."""
        weights = self.weights
        self.dtype = weights.up.dtype
        matrices = (weights.up, weights.up if weights.gate is None else weights.gate)
        ordinary = plain(weights) and all(tensor.is_cpu for tensor in self._tensors)
        self.plain = ordinary and all(matrix.stride(1) == 1 for matrix in matrices)
        self._rows, self._front = find_rows(weights.down), arguments(weights)
        self._pointers = [tensor.data_ptr() for tensor in self._watched]
        self._steps.clear()

    def refresh(self) -> None:
        """Notice memory that was replaced (another dtype, a new layout) since the last call."""
        moved = [tensor.data_ptr() for tensor in self._watched] != self._pointers
        if self._rows is None:
            changed = find_rows(self.weights.down) is not None
        elif self._rows.sample is None:
            changed = not self._rows.hold(self.weights.down)
        else:
            # a copy that `check_rows` dropped looks as if it held still
            changed = find_rows(self.weights.down) is not self._rows
        if moved or changed or len(self._steps) > _KEPT_STEPS:
            self._attach()

    def __call__(
        self, x: Tensor, rule: str, number: float, plainly: Run | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Return what `decode_step` does, None where that does not pay or did not compile.

        For `decode_step`, which sees to it that nothing is recorded or traced and that x is one
        ordinary token of `dtype`; with `plainly` for `batch_step`, several such tokens.
        """
        several = plainly is not None
        key = (rule, number, several, torch.get_num_threads(), torch.is_inference_mode_enabled())
        try:
            step = self._steps[key]
        except KeyError:
            made = self._batch(x, rule, number, plainly) if plainly else self._step(x, rule, number)
            step = self._steps[key] = made
        if step is None:
            return None
        try:
            out, mask = step(x)
            return out, mask
        except Exception as error:
            report(error)
            self._steps[key] = None
            return None

    def _step(self, x: Tensor, rule: str, number: float) -> Step | None:
        """Return what runs one token from now on, None where nothing compiled does."""
        graph = self._graph(x, rule, number)
        if graph is None:
            return None
        value = _value(rule, number)

        def checked(x: Tensor) -> tuple[Tensor, ...]:
            return graph.run(x, self._front, None, None, value, *self._tensors)

        bare = graph.bare(self._front, value, *self._tensors)
        if bare is None:
            return checked
        same = zip(bare(x), checked(x), strict=True)
        return bare if all(torch.equal(one, other) for one, other in same) else checked

    def _batch(self, x: Tensor, rule: str, number: float, plainly: Run) -> Step | None:
        """Return what runs several tokens from now on, None where nothing compiled does."""
        if rule not in RULES:
            return None
        value, score = _value(rule, number), self._scoring(rule)
        key = ("batch", score, rule, *self._layout(), layout(self.weights), *facts(x, self.weights))
        with _LOCK:
            if key not in _BATCHES:
                _BATCHES[key] = None
                if compile_wanted(self.weights):
                    graph = BatchGraph(self.weights, score, rule)
                    like, tensors = {"x": x}, self._tensors
                    if graph.right(self.weights, plainly, like=like, value=value, tensors=tensors):
                        _BATCHES[key] = graph
            found = _BATCHES[key]
        return None if found is None else found.bound(self.weights, ("x",), value, self._tensors)

    def _scoring(self, rule: str) -> Score | None:
        return self._order if rule == "top-k" else self._score

    def _layout(self) -> tuple[object, ...]:
        """Return how the tensors lie in memory."""
        tensors = [t for t in (*self._front, *self._tensors) if t is not None]
        return tuple((t.dtype, t.shape, t.stride()) for t in tensors)

    def _pays(self, rule: str, number: float) -> bool:
        weights = self.weights
        if rule == "top-k":
            share = (weights.shared + number * weights.width) / weights.up.shape[0]
            return share <= gather_limit(weights)
        # how much is selected shows only afterwards
        return is_small(weights)

    def _graph(self, x: Tensor, rule: str, number: float) -> Graph | None:
        """Return the graph of all layers that compute alike, once it gave a right output."""
        if rule not in RULES or not self._pays(rule, number):
            return None
        score = self._scoring(rule)
        key = (score, rule, self._layout(), *facts(x, self.weights))
        with _LOCK:
            if key not in _DECODERS:
                wanted = compile_wanted(self.weights)
                graph = Graph(self.weights, score, rule) if wanted else None
                right = graph is not None and self._right(graph, x, rule, number)
                _DECODERS[key] = graph if right else None
            return _DECODERS[key]

    def _right(self, graph: Graph, x: Tensor, rule: str, number: float) -> bool:
        value = _value(rule, number)
        try:
            found, mask = graph.run(x, self._front, None, None, value, *self._tensors)
        except Exception as error:
            report(error)
            return False
        return agrees(found, uncompiled(self.weights)(x, self.weights, mask[0], None))


def decode_step(
    x: Tensor, decoder: Decoder, rule: str, number: float
) -> tuple[Tensor, Tensor] | None:
    """Return what `run_experts` would for one token, router and selection included.

    All of it is one compiled graph; None where that is not possible or would not pay, and the
    caller scores, selects and calls `run_experts`.

    Args:
        x: [1, d].
        decoder: of the network.
        rule: "top-k", "dynamic-k" or "threshold", as in `adaptive_select`.
        number: k, tau or threshold.

    Returns:
        The output [1, d] and the mask of the experts that made it, bool [1, E].
    """
    return decoder(x, rule, number) if x.shape[0] == 1 and _takes(decoder, x) else None


def batch_step(
    x: Tensor, decoder: Decoder, rule: str, number: float, plainly: Run
) -> tuple[Tensor, Tensor] | None:
    """Return what `decode_step` does for several tokens, x [T, d] to [T, d] and [T, E].

    Everything runs and what is not selected is zeroed: for cases where no other path would pay.

    Args:
        plainly: the same uncompiled.
    """
    return decoder(x, rule, number, plainly) if _takes(decoder, x) else None


def _takes(decoder: Decoder, x: Tensor) -> bool:
    if observed():
        return False
    decoder.refresh()
    ordinary = type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.dtype == decoder.dtype
    return ordinary and decoder.plain and unrecorded()


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
