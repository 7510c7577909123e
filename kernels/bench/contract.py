"""Kernels on a device, held to their references in float64; run where they are to be measured.

What the interpreter cannot show: bfloat16 products on the tensor cores, races, synchronisation with
the host, addresses out of bounds. T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from routing_cases import insisting
from torch import Tensor

from adaconvert.kernels import grouped, plan, reference_decode, reference_grouped, routing
from adaconvert.kernels.decode_steps import Call

#: relative norms of errors: of outputs, of gradients.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 2e-2)}
#: (T, d, i, E, K): odd sizes, one token, a tile and one row, all experts selected.
SHAPES = ((1, 64, 32, 4, 2), (129, 96, 48, 5, 2), (64, 72, 40, 3, 3), (513, 128, 256, 16, 4))
BACKENDS = ("loop", "grouped_mm", "triton")
SANITIZERS = ("memcheck", "racecheck")
Differences = Iterator[tuple[str, float, float]]


def broken(ops: Iterable[str], device: str = "cuda", kernels: bool = True) -> dict[str, str]:
    """Return the operations that differ from their references on the device, and where.

    Args:
        ops: operations; those without a check here pass.
        device: torch's name of it.
        kernels: Triton's too.
    """
    found = {}
    for op in ops:
        for name, error, limit in CHECKS.get(op, _nothing)(device, kernels):
            if not error <= limit:
                found[op] = f"{name} on {device} is {error:.1e} from the reference"
    return found


def under_scrutiny(say: Callable[[str], None]) -> None:
    """Run the operations where a wait for the device is an error, and under compute-sanitizer."""
    for op, call in _calls("cuda").items():
        call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
            say(f"# {op}: no synchronisation with the host")
        except RuntimeError as error:
            say(f"# {op}: {str(error).partition(chr(10))[0]}")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    if shutil.which("compute-sanitizer") is None:
        say("# compute-sanitizer: not installed")
        return
    for tool in SANITIZERS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, str(Path(__file__).resolve())]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        except subprocess.TimeoutExpired:
            say(f"# compute-sanitizer {tool}: not finished in 120 s")
            continue
        lines = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        say(f"# compute-sanitizer {tool}: exit {done.returncode} {' '.join(lines)}")


def _plan(device: str, kernels: bool) -> Differences:
    for tokens, _, __, experts, slots in SHAPES:
        experts_of = _routing(tokens, experts, slots)
        wanted = plan.route_plan(experts_of, experts)
        call = partial(plan.route_plan, experts_of.to(device), experts)
        for name, run in _ways(call, kernels):
            got = run()
            live = int(wanted.ends[-1])
            pairs = [(getattr(got, key).cpu(), getattr(wanted, key)) for key in ("pairs", "tokens")]
            same = all(torch.equal(a[:live], b[:live]) for a, b in pairs)
            kept = experts_of >= 0
            same = same and torch.equal(got.places.cpu()[kept], wanted.places[kept])
            same = same and torch.equal(got.ends.cpu(), wanted.ends)
            yield f"route_plan {name} T={tokens}", float(not same), 0.0


def _router(device: str, kernels: bool) -> Differences:
    for tokens, _, __, experts, slots in SHAPES:
        logits = torch.randn(tokens, experts)
        upstream = torch.randn(tokens, slots)

        def step(given: Tensor, arriving: Tensor, k: int = slots) -> list[Tensor]:
            leaf = given.detach().requires_grad_()
            found = routing.router_select(leaf, top_k=k, normalise="selected")
            found.weights.backward(arriving)
            assert leaf.grad is not None
            return [found.weights, found.probability_sums, leaf.grad]

        wanted = step(logits.double(), upstream.double())
        there = (logits.to(device), upstream.to(device))
        for name, run in _ways(lambda there=there: step(*there), kernels):
            for got, known in zip(run(), wanted, strict=True):
                yield f"router_select {name} T={tokens}", _error(got, known), 1e-5


def _ffn(device: str, kernels: bool) -> Differences:
    for dtype, (limit, gradient_limit) in LIMITS.items():
        for tokens, hidden, width, experts, slots in SHAPES:
            experts_of = _routing(tokens, experts, slots).to(device)
            shapes = ((tokens, hidden), (experts, 2 * width, hidden), (experts, hidden, width))
            tensors = [(torch.randn(s, device=device) * s[-1] ** -0.5).to(dtype) for s in shapes]
            tensors.insert(1, torch.rand(tokens, slots, device=device))
            upstream = torch.randn(tokens, hidden, device=device).to(dtype)
            wanted = _gradients(_reference, tensors, upstream, experts_of, torch.float64)
            for backend in BACKENDS if kernels else BACKENDS[:2]:
                if backend == "grouped_mm" and device == "cuda" and dtype == torch.float32:
                    continue
                got = _gradients(_ours(backend), tensors, upstream, experts_of, None)
                for place, (a, b) in enumerate(zip(got, wanted, strict=True)):
                    name = f"grouped_ffn {backend} {dtype} T={tokens} result {place}"
                    yield name, _error(a, b), gradient_limit if place else limit


def _decode(device: str, kernels: bool) -> Differences:
    for dtype, (limit, _) in LIMITS.items():
        for tokens, experts, slots, width, hidden in ((1, 24, 6, 32, 128), (5, 9, 4, 17, 72)):
            shape = (experts, width, hidden)
            gate, up, down = (
                (torch.randn(shape, device=device) * hidden**-0.5).to(dtype) for _ in range(3)
            )
            x = torch.randn(tokens, hidden, device=device).to(dtype)
            ids = torch.rand(tokens, experts, device=device).topk(slots).indices
            counts = torch.arange(tokens, device=device).clamp(max=slots) + (tokens == 1) * slots
            none = (None,) * 5
            call = Call(x, ids, counts, gate, up, down, *none, *none, "silu")
            wanted = reference_decode.dynk_decode(_double(call))
            yield from _decoded(call, wanted, kernels, limit, f"{dtype} B={tokens}")


def _decoded(call: Call, wanted: Tensor, kernels: bool, limit: float, shape: str) -> Differences:
    from adaconvert.kernels import decode_steps

    for name, run in _ways(lambda: decode_steps.run(call), kernels):
        with torch.no_grad():
            yield f"dynk_decode {name} {shape}", _error(run(), wanted), limit


CHECKS: dict[str, Callable[[str, bool], Differences]] = {
    "route_plan": _plan,
    "router_select": _router,
    "grouped_ffn": _ffn,
    "dynk_decode": _decode,
}


def _nothing(device: str, kernels: bool) -> Differences:
    return iter(())


def _ways(call: Callable[[], Any], kernels: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    yield "auto", call
    if kernels:
        insisted = insisting(lambda _: call())
        yield "triton", lambda: insisted(0)


def _calls(device: str) -> dict[str, Callable[[], Any]]:
    """Return a call of each operation that must not wait for the device."""
    experts_of = _routing(129, 8, 2).to(device)
    logits = torch.randn(129, 8, device=device, requires_grad=True)
    shapes = ((129, 64), (129, 2), (8, 64, 64), (8, 64, 32))
    tensors = [torch.randn(shape, device=device).bfloat16() for shape in shapes]
    upstream = torch.randn(129, 64, device=device).bfloat16()

    def select() -> None:
        routing.router_select(logits, top_k=2, normalise="selected").weights.sum().backward()

    found = {}
    for name, run in (("route_plan", lambda: plan.route_plan(experts_of, 8)), ("router", select)):
        found |= {f"{name} {way}": call for way, call in _ways(run, True)}
    for backend in BACKENDS[1:]:
        args = (_ours(backend), tensors, upstream, experts_of, None)
        found[f"grouped_ffn {backend}"] = lambda args=args: _gradients(*args)
    return found


def _routing(tokens: int, experts: int, slots: int) -> Tensor:
    """Return experts of slots, [T, K] on the CPU; some slots have none."""
    found = torch.rand(tokens, experts).topk(slots).indices
    return found.masked_fill(torch.rand(tokens, slots) < 0.1, -1)


def _ours(backend: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, w: Tensor, gate_up: Tensor, down: Tensor, experts_of: Tensor) -> Tensor:
        made = plan.route_plan(experts_of, gate_up.shape[0])
        options = {"activation": "silu", "glu": True, "backend": backend}
        return grouped.grouped_ffn(x, w, made, gate_up=gate_up, down=down, **options)

    return run


def _reference(x: Tensor, w: Tensor, first: Tensor, down: Tensor, experts_of: Tensor) -> Tensor:
    options = {"activation": "silu", "glu": True}
    return reference_grouped.grouped_ffn(x, w, experts_of, first=first, down=down, **options)


def _gradients(
    function: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    upstream: Tensor,
    experts_of: Tensor,
    dtype: torch.dtype | None,
) -> list[Tensor]:
    leaves = [tensor.detach().to(dtype or tensor.dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves, experts_of)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def _double(call: Call) -> Call:
    return Call(
        *(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call)
    )


def _error(got: Tensor, wanted: Tensor) -> float:
    """Return the relative norm of the difference; NaN where there is one."""
    wanted = wanted.detach().double().cpu()
    return float((got.detach().double().cpu() - wanted).norm() / wanted.norm().clamp(min=1e-300))


if __name__ == "__main__":
    for op, reason in broken(CHECKS).items():
        sys.stdout.write(f"{op}: {reason}\n")
