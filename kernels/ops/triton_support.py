"""What is known of Triton without importing it, and what the wrappers of its kernels share.

Only the `triton_*` modules with kernels in them import Triton; they are imported when one runs.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from typing import Any

import torch

#: oldest Triton the kernels are written for: that of torch 2.11.
OLDEST = (3, 6)
#: oldest compute capability that they are compiled for.
CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: values of TRITON_INTERPRET that Triton takes for yes.
_YES = ("1", "true", "yes", "on", "y")


@functools.cache
def available() -> str | None:
    """Return why Triton cannot be used in this process, None when it can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    found = _version()
    if found is not None and found < OLDEST:
        return f"triton {found[0]}.{found[1]} is installed; expected {OLDEST[0]}.{OLDEST[1]} on"
    return None


def interpreting() -> bool:
    """Return whether Triton's kernels run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _YES


def upcast() -> bool:
    """Return UPCAST of the kernels: operands become the accumulator's dtype right after the load.

    The interpreter computes bfloat16 wrongly (Triton 3.6 to 3.9, issue 11585), loads it correctly.
    """
    return interpreting()


def accumulator(dtype: torch.dtype) -> Any:
    """Return ACC of the kernels, a Triton dtype: float64 for float64, else float32."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def refuses(facts: dict[str, Any]) -> str | None:
    """Return why no Triton kernel runs where these facts are, None when one may.

    Args:
        facts: "device" is needed; "dtype" and "capability" are looked at when given.
    """
    return available() or _refuses_device(facts) or _refuses_dtype(facts)


def capability_of(facts: dict[str, Any]) -> tuple[int, int] | None:
    """Return the compute capability of the facts, else of the current device; None without."""
    given: tuple[int, int] | None = facts.get("capability")
    if given is not None or facts.get("device") != "cuda" or not torch.cuda.is_available():
        return given
    return _capability(torch.cuda.current_device())


def capability_on(device: torch.device) -> tuple[int, int] | None:
    """Return the compute capability of a device, None where it has none."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _refuses_device(facts: dict[str, Any]) -> str | None:
    device = facts.get("device")
    if interpreting():
        return None if device in ("cpu", "cuda") else f"the interpreter cannot read {device}"
    if device != "cuda":
        return f"it runs on cuda, not on {device}"
    if torch.version.hip is not None:
        return "it has not been tried on ROCm"
    capability = capability_of(facts)
    if capability is not None and capability < CAPABILITY:
        return f"compute capability {_dotted(capability)} is below {_dotted(CAPABILITY)}"
    return None


def _refuses_dtype(facts: dict[str, Any]) -> str | None:
    dtype = facts.get("dtype")
    if dtype is None or not dtype.is_floating_point or dtype in DTYPES:
        return None
    return None if interpreting() and dtype == torch.float64 else f"it does not compute {dtype}"


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"


def _version() -> tuple[int, int] | None:
    """Return the two leading numbers of Triton's version, None when it says none."""
    try:
        major, minor = importlib.metadata.version("triton").split(".")[:2]
        return int(major), int(minor)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
