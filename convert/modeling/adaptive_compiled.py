"""One token through its selected experts, in one compiled graph.

`torch.compile` fuses the row gather of gate and up into their products with x, and `embedding_bag`
adds the selected rows of the neuron-major down matrix, weighted by the hidden units, so nothing is
copied. The first call of a shape costs seconds and needs a C++ compiler; where that fails, or the
result differs or is slow in a trial, the uncompiled forms run.

ADACONVERT_COMPILE=0 never compiles, 1 compiles whatever the size; otherwise large matrices only.

Shapes: d hidden size, f neurons, E experts, n selected neurons.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adaptive_gather import (
    Activation,
    ExpertWeights,
    selected_rows,
    uncompiled,
    weighted_rows,
)
from .adaptive_inductor import Inductor, compiled
from .adaptive_layout import rows_of

#: share of a network's neurons up to which its compiled form is faster than `linear` on all.
COMPILED_LIMIT = 0.8
#: bytes of one matrix up to which it is faster even with every expert on.
ANY_BYTES = 4 << 20
#: below this many bytes of weights a compilation is not worth its while.
COMPILE_BYTES = 1 << 20
#: different cases (shape, dtype, threads, router) compiled before the rest runs uncompiled.
COMPILE_CASES = 32
#: a trial fails when the compiled form takes this many times the other's time. Half is expected,
#: so only a compilation that went wrong fails.
SLOWEST = 2.0
#: largest difference, over the largest output, that the compiled form may have from the others.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}

_log = logging.getLogger(__name__)


def is_small(weights: ExpertWeights) -> bool:
    """Return whether the compiled form is faster than `linear` with every expert on."""
    return weights.up.numel() * weights.up.element_size() <= ANY_BYTES


def gather_limit(weights: ExpertWeights) -> float:
    """Return the share of the neurons up to which the compiled form is faster than `linear`."""
    return 1.0 if is_small(weights) else COMPILED_LIMIT


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
        self.compiled = compile_wanted(weights)
        self._graph = Graph(weights, None, None) if self.compiled else None
        self._tried = False
        self._lock = threading.Lock()

    def run(self, x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None) -> Tensor:
        """Return one token's output."""
        if self._graph is not None and not self._tried:
            with self._lock:
                if not self._tried:
                    self.compiled = self._trial(self._graph, x, weights, mask, gated)
                    self._tried = True
        if self.compiled and self._graph is not None:
            try:
                return self._graph.run(x, arguments(weights), gated, mask)[0]
            except Exception as error:
                self.compiled = False
                report(error)
        return uncompiled(weights)(x, weights, mask, gated)

    @staticmethod
    def _trial(
        graph: Graph, x: Tensor, weights: ExpertWeights, mask: Tensor, gated: Tensor | None
    ) -> bool:
        def compiled() -> Tensor:
            return graph.run(x, arguments(weights), gated, mask)[0]

        def plain() -> Tensor:
            return uncompiled(weights)(x, weights, mask, gated)

        try:
            right = agrees(compiled(), plain())
            taken, allowed = _seconds(compiled, plain)
        except Exception as error:
            report(error)
            return False
        if not right or taken > SLOWEST * allowed:
            _log.warning("decoding is not compiled: right %s, %.0e s", right, taken)
            return False
        return True


def report(error: Exception) -> None:
    """Log why something is not compiled."""
    _log.warning("decoding is not compiled: %s", str(error).partition("\n")[0][:200])


def agrees(found: Tensor, expected: Tensor) -> bool:
    """Return whether two outputs differ by rounding only."""
    limit = TOLERANCE[found.dtype] * expected.abs().max()
    return bool((found - expected).abs().max() <= limit)


def _seconds(*calls: Callable[[], object]) -> list[float]:
    """Return the best time of each of some calls; they take turns, so they share disturbances."""
    best = [float("inf")] * len(calls)
    for _ in range(8):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


_CASES: dict[tuple[object, ...], _Case] = {}


def _case(x: Tensor, weights: ExpertWeights, gated: Tensor | None) -> _Case:
    key = (gated is None, *facts(x, weights))
    found = _CASES.get(key)
    return _CASES.setdefault(key, _Case(weights)) if found is None else found


def facts(x: Tensor, weights: ExpertWeights) -> tuple[object, ...]:
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
        rows_of(weights.down) is None,
        _activation_key(weights.activation),
        torch.get_num_threads(),
        torch.is_inference_mode_enabled(),
    )


@functools.lru_cache(maxsize=4096)
def _activation_key(activation: Activation) -> object:
    """Return what is equal for activations that compute alike; each layer may have its own."""
    stateful = isinstance(activation, nn.Module) and any(True for _ in activation.parameters())
    return activation if stateful else alike(activation)


#: kinds of attributes that are equal where they do the same; gelu is a built-in function.
_COMPARABLE = (int, float, str, types.FunctionType, types.BuiltinFunctionType)


def _comparable(value: object) -> object:
    """Return what is equal for attributes that do the same, None where that is not known."""
    if isinstance(value, functools.partial):
        # gelu's tanh form: every module has a partial of its own
        settings = (*value.args, *sorted(value.keywords.items()))
        known = (*value.args, *value.keywords.values())
        return (value.func, settings) if all(isinstance(v, _COMPARABLE) for v in known) else None
    return value if isinstance(value, _COMPARABLE) else None


def alike(part: object) -> object:
    """Return what is equal for functions and modules that compute alike from their tensors."""
    if not isinstance(part, nn.Module):
        return part
    named = {k: v for k, v in vars(part).items() if not k.startswith("_") and k != "training"}
    own = {name: _comparable(value) for name, value in named.items()}
    if None in own.values():
        return part
    children = tuple((name, alike(child)) for name, child in part.named_children())
    return (type(part), tuple(sorted(own.items())), children)


def compile_wanted(weights: ExpertWeights) -> bool:
    """Return whether another graph should be compiled for these weights.

    Raises:
        ValueError: ADACONVERT_COMPILE is neither 0 nor 1 nor empty.
    """
    wanted = os.environ.get("ADACONVERT_COMPILE", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"ADACONVERT_COMPILE is {wanted!r}; expected 0, 1 or nothing")
    matrices = 2 if weights.gate is None else 3
    large = matrices * weights.up.numel() * weights.up.element_size() >= COMPILE_BYTES
    return wanted != "0" and len(_STEPS) < COMPILE_CASES and (large or wanted == "1")


# -- the graph

#: names of the graphs' functions.
_STEPS: list[str] = []


def new_name(kind: str) -> str:
    """Return a name for the function of another graph."""
    _STEPS.append(f"{kind}_{len(_STEPS)}")
    return _STEPS[-1]


def arguments(weights: ExpertWeights, *, by_rows: bool = True) -> tuple[Tensor | None, ...]:
    """Return a graph's view of the weights, in the order of `_ARGUMENTS`.

    Args:
        by_rows: down by rows [f, d] where it has them; [d, f] otherwise.
    """
    rows = rows_of(weights.down) if by_rows else None
    down = weights.down if rows is None else rows
    biases = (weights.gate_bias, weights.up_bias, weights.down_bias)
    return (weights.gate, weights.up, down, *biases)


class Graph:
    """The compiled form of one case.

    Args:
        score: of the router; None where the network's own gate scores, or the mask is given.
        rule: selection; None where the mask is given.
    """

    def __init__(
        self, weights: ExpertWeights, score: Callable[..., Tensor] | None, rule: str | None
    ) -> None:
        self._backend = Inductor()
        self._step = _make_step(weights, score, rule, self._backend)
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
        """Return the output [1, d] and the mask [1, E].

        Args:
            weights: of `arguments`.
            value: the rule's, as `choose` takes it.
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

    def bare(
        self, weights: tuple[Tensor | None, ...], value: Tensor, *tensors: Tensor
    ) -> Callable[[Tensor], tuple[Tensor, ...]] | None:
        """Return what Inductor compiled, bound to all its arguments but x, after a `run`.

        Checks nothing, which saves a third of the time of starting the graph: x must have the
        dtype of the run, be contiguous, and nothing may be recorded. None where the arguments of
        the compiled function are not recognised.
        """
        named = dict(zip(_ARGUMENTS, (*weights, None, None, value), strict=True))
        named |= {f"tensors_{i}": tensor for i, tensor in enumerate(tensors)}
        return self._backend.bound(named, value.shape[0] if value.dim() else 0)


#: arguments of a step after x.
_ARGUMENTS = (
    *("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "gated", "mask", "value"),
)


def _make_step(
    weights: ExpertWeights,
    score: Callable[..., Tensor] | None,
    rule: str | None,
    backend: Inductor,
) -> Callable[..., tuple[Tensor, Tensor]]:
    activation, width, shared = weights.activation, weights.width, weights.shared
    spread, bags = rows_of(weights.down) is None, torch.get_num_threads()

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
            chosen = choose(scores, rule, value)
            mask = chosen[0]
        else:
            chosen = mask.unsqueeze(0)
        rows = selected_rows(mask, width, shared)
        if whole is None:
            hidden = activation(_products(first, first_bias, wide, rows))
        else:
            hidden = whole[rows].to(wide.dtype)
        if gate is not None:
            hidden = hidden * _products(up, up_bias, wide, rows)
        hidden = hidden.to(x.dtype)
        if spread:
            full = hidden.new_zeros(down.shape[1]).scatter(0, rows, hidden)
            return functional.linear(full.unsqueeze(0), down, down_bias), chosen
        out = weighted_rows(down, rows, hidden, bags)
        return (out if down_bias is None else out + down_bias), chosen

    return compiled(step, new_name("step"), backend)


def _products(matrix: Tensor, bias: Tensor | None, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """Return x times the given rows, accumulated wide; compiled, the rows are never copied."""
    taken = matrix if rows is None else matrix[rows]
    out = (taken.to(x.dtype) * x).sum(dim=-1)
    if bias is None:
        return out
    return out + (bias if rows is None else bias[rows]).to(x.dtype)


def own_scores(gated: Tensor, width: int, shared: int) -> Tensor:
    """Return per expert the sum of the absolute activations, [T, f] -> [T, E]."""
    values = gated[:, shared:].abs()
    return values if width == 1 else torch.unflatten(values, -1, (-1, width)).sum(dim=-1)


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
