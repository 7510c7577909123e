"""Time and memory of calls that take turns, on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: a median of fewer rounds is not written.
LEAST_ROUNDS = 20
#: seconds for which rounds go on at least.
LEAST_SECONDS = 1.0
#: rounds before those that count, by device.
WARM_ROUNDS = {"cpu": 1, "cuda": 3}
#: relative distance of two providers' results from which one of them is taken to be wrong.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
LOW_TOLERANCE = 4e-2


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute a case.

    Attributes:
        forward: takes the number of a layer, returns the result.
        backward: takes that result; None where there is nothing to differentiate.
        exact: it computes what the baseline does, so that results can be compared.
        work: how many times the flops and bytes of the case it needs; None where that is not told.
    """

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[Any], Any] | None = None
    exact: bool = True
    work: float | None = 1.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Providers of one operation at one shape.

    Attributes:
        providers: the first one is the baseline.
        parameters: not counted among what the forward keeps.
        layers: of different weights that take turns, so that caches do not hold them.
        graphed: on a GPU, one CUDA graph of all layers is timed.
        recorded: gradients are recorded.
        flops: of the forward; the backward has twice as many.
        moved: bytes the forward must read and write; the backward twice as many.
        skipped: provider -> why it does not run.
    """

    providers: Sequence[Provider]
    parameters: Sequence[Tensor] = ()
    layers: int = 1
    graphed: bool = False
    recorded: bool = True
    flops: float = 0.0
    moved: float = 0.0
    skipped: dict[str, str] = field(default_factory=dict)


#: provider -> direction -> seconds of every round; "cpu" is CPU time of the step.
Times = dict[str, dict[str, list[float]]]


def measure(case: Case, device: str, limit: float, least: int = LEAST_ROUNDS) -> Times:
    """Return times of the providers, which take turns until there are `least` rounds.

    Rounds go on for `LEAST_SECONDS` where they are quick, and end early after `limit` seconds. A
    provider of which `least` rounds would take more than half of the limit has none.
    """
    turns = {p.name: _turn(p, case, device) for p in case.providers}
    times: Times = {name: {} for name in turns}
    start = time.perf_counter()
    for turn in range(-WARM_ROUNDS[device], 10_000):
        for place, name in enumerate(list(turns)):
            began = time.perf_counter()
            # layers apart, so that nobody finds weights that the one before has just read
            found = turns[name]((turn + place * case.layers // len(turns)) % case.layers)
            if turn >= 0:
                for direction, seconds in found.items():
                    times[name].setdefault(direction, []).append(seconds)
            slow = (time.perf_counter() - began) * least > limit / 2
            if slow and turn == -1 and name != case.providers[0].name:
                del turns[name]
        used = time.perf_counter() - start
        if (turn + 1 >= least and used > min(LEAST_SECONDS, limit)) or used > limit:
            break
    return times


def wrong(case: Case) -> dict[str, str]:
    """Return what is wrong with providers that fail, or whose result is not the baseline's."""
    first, *others = case.providers
    with torch.set_grad_enabled(case.recorded):
        wanted = _first(first.forward(0)).detach().double()
        found = {}
        for provider in others:
            try:
                got = _first(provider.forward(0)).detach()
            except (RuntimeError, ValueError, TypeError) as error:
                found[provider.name] = str(error).partition("\n")[0]
                continue
            limit = TOLERANCE.get(got.dtype, LOW_TOLERANCE)
            distance = (
                float((got.double() - wanted).norm() / wanted.norm()) if provider.exact else 0
            )
            if not distance <= limit:
                found[provider.name] = f"its result is {distance:.1e} from {first.name}'s"
    return found


def saved_bytes(forward: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes kept for the backward, each storage once, without those of `parameters`."""
    left_out = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # held until the end, so that no storage's place is used again
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        # detached: an output that keeps itself for the backward would never be freed
        detached = tensor.detach()
        if place not in left_out:
            kept[place] = detached
        return detached

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _Live(TorchDispatchMode):
    """Counts the bytes of storages that operations return, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        known = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _storage(tensor) not in known | self.seen:
                self.begin(tensor.untyped_storage())
        return out

    def begin(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        self.seen.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def end() -> None:
            self.seen.discard(place)
            self.now -= size

        weakref.finalize(storage, end)


def peak_bytes(provider: Provider, device: str) -> int:
    """Return by how much a step lets memory grow at most.

    On a GPU as its allocator counts; on a CPU of what operations return, so without what an
    operation needs for itself.
    """
    live = _Live()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with live if device == "cpu" else contextlib.nullcontext():
        out = provider.forward(0)
        if provider.backward is not None:
            provider.backward(out)
        del out
    if device == "cpu":
        return live.peak
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Ceilings:
    """What this device copies and multiplies per second, measured now."""

    def __init__(self, device: str) -> None:
        self.device = device
        #: elements of a copied buffer of one byte, and rows of a square product.
        self.copied, self.rows = (2**32, 8192) if device == "cuda" else (2**28, 1024)
        self._bandwidth: float | None = None
        self._flops: dict[torch.dtype, float] = {}

    def bandwidth(self) -> float:
        """Return bytes read plus written per second."""
        if self._bandwidth is None:
            source = torch.ones(self.copied, dtype=torch.uint8, device=self.device)
            target = torch.ones_like(source)
            self._bandwidth = 2 * self.copied / self._time(lambda i: target.copy_(source))
        return self._bandwidth

    def flops(self, dtype: torch.dtype) -> float:
        """Return floating-point operations per second of a square product."""
        if dtype not in self._flops:
            left = torch.randn(self.rows, self.rows, device=self.device).to(dtype)
            seconds = self._time(lambda i: left @ left)
            self._flops[dtype] = 2 * self.rows**3 / seconds
        return self._flops[dtype]

    def fraction(
        self, case: Case, provider: Provider, dtype: torch.dtype, direction: str, seconds: float
    ) -> str:
        """Return the least time there can be over the measured one; empty where it is unknown."""
        if provider.work is None or not (case.flops or case.moved):
            return ""
        times = {"forward": 1, "backward": 2, "step": 3}[direction]
        floor = max(case.flops / self.flops(dtype), case.moved / self.bandwidth())
        return f"{times * provider.work * floor / seconds:.3f}"

    def _time(self, call: Callable[[int], Any]) -> float:
        case = Case(providers=[Provider(name="ceiling", forward=call)], recorded=False)
        return statistics.median(measure(case, self.device, 5.0)["ceiling"]["forward"])


def _turn(provider: Provider, case: Case, device: str) -> Callable[[int], dict[str, float]]:
    """Return what runs a provider once and returns seconds by direction."""
    if device == "cuda":
        return _graphed(provider, case) if case.graphed else _on_gpu(provider, case)

    def on_cpu(layer: int) -> dict[str, float]:
        used, start = time.process_time(), time.perf_counter()
        with torch.set_grad_enabled(case.recorded):
            out = provider.forward(layer)
        middle = time.perf_counter()
        if provider.backward is not None:
            provider.backward(out)
        end = time.perf_counter()
        cpu = {"cpu": time.process_time() - used}
        if provider.backward is None:
            return {"forward": middle - start, **cpu}
        return {"forward": middle - start, "backward": end - middle, "step": end - start, **cpu}

    return on_cpu


def _on_gpu(provider: Provider, case: Case) -> Callable[[int], dict[str, float]]:
    def run(layer: int) -> dict[str, float]:
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        torch.cuda.synchronize()
        start.record()
        with torch.set_grad_enabled(case.recorded):
            out = provider.forward(layer)
        middle.record()
        if provider.backward is not None:
            provider.backward(out)
        end.record()
        torch.cuda.synchronize()
        spent = {"forward": start.elapsed_time(middle) / 1e3}
        if provider.backward is not None:
            spent["backward"] = middle.elapsed_time(end) / 1e3
            spent["step"] = start.elapsed_time(end) / 1e3
        return spent

    return run


def _graphed(provider: Provider, case: Case) -> Callable[[int], dict[str, float]]:
    """Return what replays one graph of all layers; a layer's time is its share."""
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for layer in range(case.layers):
            provider.forward(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for layer in range(case.layers):
            provider.forward(layer)

    def run(_: int) -> dict[str, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return {"forward": start.elapsed_time(end) / 1e3 / case.layers}

    return run


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]
