"""Who computes a grouped expert feed-forward: the GEMMs, and the kernels around them.

T tokens, K slots per token, E experts, d hidden size, i intermediate size of one expert.
"""

from __future__ import annotations

from typing import Any, Literal, cast, get_args

from torch import Tensor

from adaconvert.kernels import dispatch, grouped_gemm, triton_support
from adaconvert.kernels.expert_activations import Activation
from adaconvert.kernels.grouped_gemm import Backend
from adaconvert.kernels.grouped_steps import Inputs, Kind

#: what a caller may ask for; "triton" is Triton's kernels around the GEMMs of the other two.
Asked = Literal["auto", "loop", "grouped_mm", "triton"]
ASKED: tuple[str, ...] = get_args(Asked)
_GEMMS: tuple[str, ...] = get_args(Backend)


def choose_backend(x: Tensor, first: Tensor, down: Tensor) -> tuple[Backend, str]:
    """Return the backend of the GEMMs for these tensors, and why.

    On a CPU both take the same time (measured with torch 2.13, float32 and bfloat16, 8 and 64
    experts), so the one that takes any size and dtype runs.
    """
    if x.device.type == "cpu":
        return "loop", "on cpu it is as fast as grouped_mm and takes every size"
    reason = grouped_gemm.refuses(x, first, down)
    if reason is None:
        return "grouped_mm", "it runs these tensors"
    return "loop", reason


def kind_of(
    inputs: Inputs, asked: str, activation: str, *, glu: bool, grad: bool, compact: bool
) -> Kind:
    """Return who computes a call, and what.

    Args:
        asked: one of `ASKED`.
        grad: the call will be differentiated.
        compact: see `Kind`.

    Raises:
        ValueError: the backend asked for cannot run this.
        RuntimeError: ADACONVERT_KERNELS is "triton" and its kernels cannot run this.
    """
    gemm = choose_backend(inputs.x, inputs.first, inputs.down)[0]
    triton = False
    if asked in _GEMMS:
        gemm = _insisted(inputs, asked)
    elif asked == "triton" or _looks(inputs.x):
        triton = _triton(facts_of(inputs, activation, glu=glu, grad=grad), asked)
    return Kind(
        activation=cast(Activation, activation),
        glu=glu,
        backend=gemm,
        triton=triton,
        compact=compact,
    )


def facts_of(inputs: Inputs, activation: str, *, glu: bool, grad: bool) -> dict[str, Any]:
    """Return what `dispatch.select` asks about a call."""
    device, (experts, hidden, width) = inputs.x.device, inputs.down.shape
    tokens, slots = inputs.weights_of.shape
    return {
        "device": device.type,
        "dtype": inputs.x.dtype,
        "capability": triton_support.capability_on(device),
        "grad": grad,
        "activation": activation,
        "glu": glu,
        **{"tokens": tokens, "slots": slots, "experts": experts, "hidden": hidden, "width": width},
    }


def _looks(x: Tensor) -> bool:
    """Return whether a Triton kernel is thought of: on a CPU only where it is insisted on."""
    return x.device.type != "cpu" or dispatch.wanted() == "triton"


def _triton(facts: dict[str, Any], asked: str) -> bool:
    if asked == "auto":
        return dispatch.select("grouped_ffn", **facts) is not None
    for kernel in dispatch.KERNELS["grouped_ffn"]:
        reason = kernel.refuses(facts) or kernel.limits(facts)
        if reason is not None:
            raise ValueError(f"triton cannot run this: {reason}")
    return True


def _insisted(inputs: Inputs, asked: str) -> Backend:
    if asked == "grouped_mm":
        reason = grouped_gemm.refuses(inputs.x, inputs.first, inputs.down)
        if reason is not None:
            raise ValueError(f"grouped_mm cannot run this: {reason}")
    return cast(Backend, asked)
