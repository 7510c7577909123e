"""One token through its selected experts, in one compiled graph.

`torch.compile` fuses the row gather of gate and up into their products with x, and `embedding_bag`
adds the selected rows of the neuron-major down matrix, weighted by the hidden units, so nothing is
copied. `Decoder` has router and selection in the same graph, which spares some twenty small
operations per layer. The first call of a shape costs seconds and needs a C++ compiler; where that
fails, or the result differs or is slow in a trial, the uncompiled forms run.

ADACONVERT_COMPILE=0 never compiles, 1 compiles whatever the size; otherwise large matrices only.

Shapes: d hidden size, f neurons, E experts, n selected neurons.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adaptive_gather import (
    Activation,
    ExpertWeights,
    neuron_major,
    selected_rows,
    uncompiled,
    weighted_rows,
)

#: below this many bytes of weights a compilation is not worth its while.
COMPILE_BYTES = 1 << 20
#: different cases (shape, dtype, threads, router) compiled before the rest runs uncompiled.
COMPILE_CASES = 32
#: a trial fails when the compiled form takes this many times the other's time. Half is expected,
#: so only a compilation that went wrong fails.
SLOWEST = 1.25
#: largest difference, over the largest output, that the compiled form may have from the others.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

_log = logging.getLogger(__name__)
#: (x [1, d], the router's tensors) -> scores [1, E]; must be equal for layers that compute alike.
Score = Callable[..., Tensor]


def gather(x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
    """Return one token's output from its selected experts: [1, d], [E] -> [1, d].

    Args:
        gated: [1, f] activated gate (`up` without gate) where it is known already.
    """
    return _case(x, weights, gated).run(x, weights, mask, gated)


def compiles(x: Tensor, weights: ExpertWeights, gated: Tensor | None) -> bool:
    """Return whether `gather` runs, or would at its first call try, its compiled form."""
    return _case(x, weights, gated).compiled


class _Case:
    """One case of shape, dtype and threads.

    Attributes:
        compiled: the compiled form serves it, or is still to be tried.
    """

    def __init__(self, weights: ExpertWeights) -> None:
        self.compiled = _compile_wanted(weights)
        self._graph = _Graph(weights, None, None)
        self._tried = False
        self._lock = threading.Lock()

    def run(self, x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
        """Return one token's output."""
        if self.compiled and not self._tried:
            with self._lock:
                if not self._tried:
                    self.compiled = self._trial(x, weights, mask, gated)
                    self._tried = True
        if self.compiled:
            try:
                return self._graph.run(x, _arguments(weights), gated, mask)[0]
            except Exception as error:
                self.compiled = False
                _report(error)
        return uncompiled(weights)(x, weights, mask, gated)

    def _trial(self, x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> bool:
        plain = uncompiled(weights)
        try:
            found = self._graph.run(x, _arguments(weights), gated, mask)[0]
            taken = _seconds(lambda: self._graph.run(x, _arguments(weights), gated, mask))
        except Exception as error:
            _report(error)
            return False
        allowed = _seconds(lambda: plain(x, weights, mask, gated)) * SLOWEST
        right = _agrees(found, plain(x, weights, mask, gated))
        if not right or taken > allowed:
            _log.warning("decoding is not compiled: right %s, %.1e s", right, taken)
        return right and taken <= allowed


def _report(error: Exception) -> None:
    _log.warning("decoding is not compiled: %s", str(error).partition("\n")[0][:200])


def _agrees(found: Tensor, expected: Tensor) -> bool:
    limit = TOLERANCE[found.dtype] * expected.abs().max()
    return bool((found - expected).abs().max() <= limit)


def _seconds(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


_CASES: dict[tuple[object, ...], _Case] = {}
_DECODERS: dict[tuple[object, ...], _Graph | None] = {}
_LOCK = threading.Lock()


def _case(x: Tensor, weights: ExpertWeights, gated: Tensor | None) -> _Case:
    key = (gated is None, *_facts(x, weights))
    found = _CASES.get(key)
    return _CASES.setdefault(key, _Case(weights)) if found is None else found


def _facts(x: Tensor, weights: ExpertWeights) -> tuple[object, ...]:
    """Return what a graph is compiled for."""
    return (
        x.dtype,
        weights.up.shape,
        weights.up.stride(),
        weights.width,
        weights.shared,
        weights.gate is None,
        weights.gate_bias is None,
        weights.up_bias is None,
        weights.down_bias is None,
        neuron_major(weights.down),
        _activation_key(weights.activation),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
    )


@functools.lru_cache(maxsize=4096)
def _activation_key(activation: Activation) -> object:
    """Return what is equal for activations that compute alike; each layer may have its own."""
    if not isinstance(activation, nn.Module):
        return activation
    state = vars(activation)
    own = {k: v for k, v in state.items() if not k.startswith("_") and k != "training"}
    simple = all(isinstance(v, (int, float, str, types.FunctionType)) for v in own.values())
    if not simple or any(state[name] for name in ("_parameters", "_buffers", "_modules")):
        return activation
    return (type(activation), tuple(sorted(own.items())))


def _compile_wanted(weights: ExpertWeights) -> bool:
    wanted = os.environ.get("ADACONVERT_COMPILE", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"ADACONVERT_COMPILE is {wanted!r}; expected 0, 1 or nothing")
    matrices = 2 if weights.gate is None else 3
    large = matrices * weights.up.numel() * weights.up.element_size() >= COMPILE_BYTES
    room = len(_CASES) + len(_DECODERS) < COMPILE_CASES
    return wanted != "0" and room and (large or wanted == "1")


# -- the graph

_NAMES = itertools.count()
#: run-time checks of what guards check, and of indices that are right by construction.
_UNCHECKED = ("size_asserts", "scalar_asserts", "assert_indirect_indexing")


def _arguments(weights: ExpertWeights) -> tuple[Tensor | None, ...]:
    """Return the graph's view of the weights: down by rows [f, d] where it is neuron-major."""
    down = weights.down.t() if neuron_major(weights.down) else weights.down
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return (weights.gate, weights.up, down, *biases)


class _Graph:
    """The compiled form of one case.

    Args:
        score: of the router; None where the network's own gate scores, or the mask is given.
        rule: selection; None where the mask is given.
    """

    def __init__(self, weights: ExpertWeights, score: Score | None, rule: str | None) -> None:
        self._step = _make_step(weights, score, rule)
        self._warm = False

    def run(
        self,
        x: Tensor,
        weights: tuple[Tensor | None, ...],
        gated: Tensor | None,
        mask: Tensor | None,
        value: Tensor | None = None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the output [1, d] and the mask [E].

        Args:
            weights: of `_arguments`.
            value: of `_value`.
        """
        if self._warm:
            try:
                return self._step(x, *weights, gated, mask, value, *tensors)
            except Exception as error:
                # another stride or kind of tensor: compiled once more, below
                _log.info("compiled again: %s", error)
        # the number of selected experts is known only inside the graph
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            out = self._step(x, *weights, gated, mask, value, *tensors)
        self._warm = True
        return out


def _make_step(
    weights: ExpertWeights, score: Score | None, rule: str | None
) -> Callable[..., tuple[Tensor, Tensor]]:
    activation, width, shared = weights.activation, weights.width, weights.shared
    major, bags = neuron_major(weights.down), torch.get_num_threads()

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
    ) -> tuple[Tensor, Tensor]:
        wide = x[0].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        first, first_bias = (up, up_bias) if gate is None else (gate, gate_bias)
        whole = None if gated is None else gated[0]
        if mask is None:
            assert rule is not None
            assert value is not None
            if score is None:
                whole = activation(_products(first, first_bias, wide))
                scores = own_scores(whole.unsqueeze(0), width, shared)
            else:
                scores = score(x, *tensors)
            mask = choose(scores, rule, value)[0]
        rows = selected_rows(mask, width, shared)
        if whole is None:
            hidden = activation(_products(first, first_bias, wide, rows))
        else:
            hidden = whole[rows].to(wide.dtype)
        if gate is not None:
            hidden = hidden * _products(up, up_bias, wide, rows)
        hidden = hidden.to(x.dtype)
        if major:
            out = weighted_rows(down, rows, hidden, bags)
            return (out if down_bias is None else out + down_bias), mask
        spread = hidden.new_zeros(down.shape[1]).scatter(0, rows, hidden)
        return functional.linear(spread.unsqueeze(0), down, down_bias), mask

    # a code object of its own: torch counts recompilations per code object and gives up after a few
    own = types.FunctionType(
        step.__code__.replace(co_name=f"{step.__name__}_{next(_NAMES)}"),
        step.__globals__,
        closure=step.__closure__,
    )
    known = torch._inductor.list_options()
    options = {name: False for name in _UNCHECKED if name in known}
    # the facts of the case key stand in for all guards but those on tensors
    return torch.compile(own, fullgraph=True, options={**options, "guard_filter_fn": _on_tensors})


def _on_tensors(guards: Sequence[Any]) -> list[bool]:
    return [guard.guard_type == "TENSOR_MATCH" for guard in guards]


def _products(matrix: Tensor, bias: Tensor | None, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return x times the given rows, accumulated wide; compiled, the rows are never copied."""
    taken = matrix if rows is None else matrix[rows]
    out = (taken.to(x.dtype) * x).sum(dim=-1)
    if bias is None:
        return out
    return out + (bias if rows is None else bias[rows]).to(x.dtype)


# -- router, selection and experts at once


def own_scores(gated: Tensor, width: int, shared: int) -> Tensor:
    """Return per expert the sum of the absolute activations, [T, f] -> [T, E]."""
    values = gated[:, shared:].abs()
    return values if width == 1 else values.unflatten(-1, (-1, width)).sum(dim=-1)


def choose(scores: Tensor, rule: str, value: Tensor) -> Tensor:
    """Return which experts run, [T, E] -> bool [T, E]; the highest score's always does.

    Args:
        rule: "top-k", "dynamic-k" or "threshold".
        value: tau or threshold, a number; for top-k any tensor of k elements.
    """
    if rule == "top-k":
        best = scores.topk(value.shape[0], dim=-1, sorted=False).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)
    highest = scores.max(dim=-1, keepdim=True)
    limit = value * highest.values if rule == "dynamic-k" else value
    return (scores >= limit).scatter(-1, highest.indices, True)


class Decoder:
    """One network's router, selection and experts as one compiled graph, for one token at a time.

    Holds the tensors, so that a call costs little besides the graph; make a new one when a
    parameter is replaced.

    Args:
        weights: the network's.
        score: of the router, a pure function; layers that compute alike pass equal ones, so they
            share graphs. None where the network's own gate scores (see `own_scores`).
        tensors: the router's.
    """

    def __init__(
        self, weights: ExpertWeights, score: Score | None, tensors: tuple[Tensor, ...]
    ) -> None:
        self.weights, self._score, self._tensors = weights, score, tensors
        self._front = _arguments(weights)
        self._graphs: dict[tuple[object, ...], _Graph | None] = {}

    def __call__(self, x: Tensor, rule: str, number: float) -> tuple[Tensor, Tensor] | None:
        """Return the output [1, d] and the mask of the experts that made it, bool [E].

        None where the compiled form does not run. The caller sees to it that nothing is recorded
        or traced and that x [1, d] has the weights' dtype and device.
        """
        value = _value(rule, number)
        key = (rule, torch.get_num_threads(), torch.is_inference_mode_enabled())
        try:
            graph = self._graphs[key]
        except KeyError:
            graph = self._graphs[key] = self._shared_graph(x, rule, value)
        if graph is None:
            return None
        try:
            return graph.run(x, self._front, None, None, value, *self._tensors)
        except Exception as error:
            _report(error)
            self._graphs[key] = None
            return None

    def _shared_graph(self, x: Tensor, rule: str, value: Tensor) -> _Graph | None:
        """Return the graph of all layers that compute alike, once it gave a right output."""
        dtypes = tuple(t.dtype for t in self._tensors)
        key = (self._score, rule, dtypes, *_facts(x, self.weights))
        with _LOCK:
            if key not in _DECODERS:
                wanted = _compile_wanted(self.weights)
                graph = _Graph(self.weights, self._score, rule) if wanted else None
                right = graph is not None and self._right(graph, x, value)
                _DECODERS[key] = graph if right else None
            return _DECODERS[key]

    def _right(self, graph: _Graph, x: Tensor, value: Tensor) -> bool:
        try:
            found, mask = graph.run(x, self._front, None, None, value, *self._tensors)
        except Exception as error:
            _report(error)
            return False
        return _agrees(found, uncompiled(self.weights)(x, self.weights, mask, None))


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
