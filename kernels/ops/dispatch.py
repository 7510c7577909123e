"""Which kernel runs an operation, and why.

`select` answers per call from the facts of the call; None means that the caller's own torch code
runs. ADACONVERT_KERNELS overrides: "torch" never uses a kernel, "triton" insists on one, "auto"
(the default) uses one where `measured` says that it is faster. Nothing here changes results beyond
the tolerance a kernel states.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from adaconvert.kernels import measured, triton_support

#: raised when `select` or a kernel's signature changes in a way that older callers cannot follow.
API_VERSION = 1
VARIABLE = "ADACONVERT_KERNELS"
CHOICES = ("auto", "torch", "triton")

#: tokens that the kernels for decoding take: of more, few experts are selected by none.
DECODED_TOKENS = 8

Facts = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of one operation.

    Attributes:
        backend: "triton".
        call: takes and returns what the operation's torch code does.
        refuses: why the kernel cannot run a call of these facts, None when it can. Cheap.
        loses: why torch is faster for these facts, None when the kernel is.
        limits: what `refuses` says, by the kernel's own module; asked last, may import Triton.
        outside: why a call of these facts is none that the kernel is made for, None when it is. It
            runs by torch even where a kernel is insisted on.
    """

    backend: str
    call: Callable[..., Any]
    refuses: Callable[[Facts], str | None]
    loses: Callable[[Facts], str | None]
    limits: Callable[[Facts], str | None] = lambda facts: None
    outside: Callable[[Facts], str | None] = lambda facts: None


def _triton(
    op: str, module: str, function: str, outside: Callable[[Facts], str | None] | None = None
) -> Kernel:
    """Return the Triton kernel `function` of a module that is imported when it is needed.

    The module's function `refuses`, where it has one, takes the facts and returns why they cannot
    run; `refuses_<op>` goes before it.
    """
    path = f"adaconvert.kernels.{module}"

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(path), function)(*args, **options)

    def limits(facts: Facts) -> str | None:
        owner = importlib.import_module(path)
        own = getattr(owner, f"refuses_{op}", None) or getattr(owner, "refuses", None)
        return None if own is None else own(facts)

    return Kernel(
        backend="triton",
        call=call,
        refuses=triton_support.refuses,
        loses=functools.partial(measured.loses, op, "triton"),
        limits=limits,
        outside=outside or (lambda facts: None),
    )


def _no_decoding(facts: Facts) -> str | None:
    """Return why a call is not the decoding of a few tokens."""
    tokens = facts.get("tokens")
    if facts.get("grad"):
        return "it has no gradients"
    if tokens is None or tokens <= DECODED_TOKENS:
        return None
    return f"{tokens} tokens; it takes up to {DECODED_TOKENS}"


#: operation -> its kernels, best first. "expert_ffn" is `reference.expert_ffn`, which the adaptive
#: runtime calls; the others are the functions of these names, called by their torch wrappers.
KERNELS: dict[str, tuple[Kernel, ...]] = {
    "expert_ffn": (_triton("expert_ffn", "decode", "expert_ffn", _no_decoding),),
    "dynk_decode": (_triton("dynk_decode", "decode", "by_triton", _no_decoding),),
    "route_plan": (_triton("route_plan", "triton_plan", "route_plan"),),
    "router_select": (_triton("router_select", "triton_routing", "router_select"),),
    "grouped_ffn": (_triton("grouped_ffn", "triton_grouped", "run"),),
}


def select(op: str, **facts: Any) -> Callable[..., Any] | None:
    """Return the kernel that runs `op` for these facts, None for the caller's torch code.

    While torch.compile traces the caller no kernel is chosen. The operators of `torch.library` ask
    when they run, so they are not affected.

    Args:
        op: operation, a key of `KERNELS`.
        facts: of the call: device (its type), dtype, capability (of the current device when it is
            not given), grad, and sizes: tokens, slots, experts, hidden, width and so on.

    Raises:
        KeyError: unknown operation.
        ValueError: ADACONVERT_KERNELS is not one of `CHOICES`.
        RuntimeError: ADACONVERT_KERNELS is "triton" and no kernel can run this, though one is made
            for such calls. Not while torch.compile traces, where only operators have kernels.
    """
    # reasons are made of sizes, which a graph may leave open
    tracing = torch.compiler.is_compiling()
    kernel, reason = (None, "torch.compile is tracing") if tracing else _decide(op, facts)
    insists = wanted() == "triton" and not tracing
    if kernel is None and insists and not _outside(op, facts):
        raise RuntimeError(f"{VARIABLE}=triton, but {op} cannot: {reason}")
    return None if kernel is None else kernel.call


def why(op: str, **facts: Any) -> str:
    """Return in words what `select` does for these facts; raises as it does, but RuntimeError."""
    kernel, reason = _decide(op, facts)
    return f"{op}: {'torch' if kernel is None else kernel.backend}, because {reason}"


def refuses(op: str, **facts: Any) -> str | None:
    """Return why no kernel can run `op` for these facts, None when one can, faster or not."""
    reasons = []
    for kernel in KERNELS[op]:
        reason = kernel.outside(facts) or kernel.refuses(facts) or kernel.limits(facts)
        if reason is None:
            return None
        reasons.append(f"{kernel.backend}: {reason}")
    return "; ".join(reasons) or "no kernel is installed for it"


def wanted() -> str:
    """Return what ADACONVERT_KERNELS asks for.

    Raises:
        ValueError: it is not one of `CHOICES`.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}; expected one of {', '.join(CHOICES)}")
    return value


def _outside(op: str, facts: Facts) -> bool:
    """Return whether there are kernels and none is made for such calls."""
    kernels = KERNELS[op]
    return bool(kernels) and all(kernel.outside(facts) is not None for kernel in kernels)


def _decide(op: str, facts: Facts) -> tuple[Kernel | None, str]:
    choice = wanted()
    kernels = KERNELS[op]
    if choice == "torch":
        return None, f"{VARIABLE}=torch"
    if not kernels:
        return None, "no kernel is installed for it"
    reasons = []
    for kernel in kernels:
        reason = kernel.outside(facts) or kernel.refuses(facts)
        if reason is None and choice == "auto":
            reason = kernel.loses(facts)
        if reason is None:
            reason = kernel.limits(facts)
        if reason is None:
            return kernel, f"{VARIABLE}={choice} and it runs these facts"
        reasons.append(f"{kernel.backend}: {reason}")
    return None, "; ".join(reasons)
