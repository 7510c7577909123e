"""Which kernel runs an operation, and why.

`select` answers per call from the facts of the call; None means that the caller's own torch code
runs. ADACONVERT_KERNELS overrides: "torch" never uses a kernel, "triton" insists on one, "auto"
(the default) uses one where it is known to be faster. Nothing here changes results beyond the
tolerance a kernel states.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: raised when `select` or a kernel's signature changes in a way that older callers cannot follow.
API_VERSION = 1
VARIABLE = "ADACONVERT_KERNELS"
CHOICES = ("auto", "torch", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel of one operation.

    Attributes:
        backend: "triton".
        call: takes and returns what the operation's reference does.
        refuses: why the kernel cannot run a call of these facts, None when it can.
        loses: why torch is faster for these facts, None when the kernel is.
    """

    backend: str
    call: Callable[..., Any]
    refuses: Callable[[dict[str, Any]], str | None]
    loses: Callable[[dict[str, Any]], str | None]


#: operation -> its kernels, best first. The operations are the functions of `reference`.
KERNELS: dict[str, tuple[Kernel, ...]] = {"expert_ffn": ()}


def select(op: str, **facts: Any) -> Callable[..., Any] | None:
    """Return the kernel that runs `op` for these facts, None for the caller's torch code.

    Args:
        op: operation, a key of `KERNELS`.
        facts: of the call: device, dtype, sizes, grad.

    Raises:
        KeyError: unknown operation.
        ValueError: ADACONVERT_KERNELS is not one of `CHOICES`.
        RuntimeError: ADACONVERT_KERNELS is "triton" and no kernel can run this.
    """
    kernel, reason = _decide(op, facts)
    if kernel is None and wanted() == "triton":
        raise RuntimeError(f"{VARIABLE}=triton, but {op} cannot: {reason}")
    return None if kernel is None else kernel.call


def why(op: str, **facts: Any) -> str:
    """Return in words what `select` does for these facts; raises as it does, but RuntimeError."""
    kernel, reason = _decide(op, facts)
    return f"{op}: {'torch' if kernel is None else kernel.backend}, because {reason}"


def wanted() -> str:
    """Return what ADACONVERT_KERNELS asks for.

    Raises:
        ValueError: it is not one of `CHOICES`.
    """
    value = os.environ.get(VARIABLE) or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE} is {value!r}; expected one of {', '.join(CHOICES)}")
    return value


def _decide(op: str, facts: dict[str, Any]) -> tuple[Kernel | None, str]:
    choice = wanted()
    kernels = KERNELS[op]
    if choice == "torch":
        return None, f"{VARIABLE}=torch"
    if not kernels:
        return None, "no kernel is installed for it"
    reasons = []
    for kernel in kernels:
        reason = kernel.refuses(facts)
        if reason is None and choice == "auto":
            reason = kernel.loses(facts)
        if reason is None:
            return kernel, f"{VARIABLE}={choice} and it runs these facts"
        reasons.append(f"{kernel.backend}: {reason}")
    return None, "; ".join(reasons)
