"""The operator `adaconvert::dynk_decode`: its arguments, its torch form, and who computes it.

Shapes: B tokens, M slots, E experts, S neurons of one expert, C shared neurons, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels import dispatch, triton_support
from adaconvert.kernels.expert_activations import ACTIVATIONS


class Call(NamedTuple):
    """The tensors of one call.

    Attributes:
        x: [B, D].
        ids: [B, M] int32 or int64; below 0 or from E on: no expert.
        counts: [B] int32 or int64, how many of the ids count.
        gate, up: [E, S, D], of any strides; no gate for plain experts.
        down_rows: [E, S, D], of any strides.
        gate_bias, up_bias: [E, S] or None.
        down_bias: [E, D] or None, part of the experts' outputs.
        out_bias: [D] or None, added once.
        weights_of: [B, M] or None for one.
        shared_gate, shared_up, shared_down_rows: [C, D] or None.
        shared_gate_bias, shared_up_bias: [C] or None.
        activation: one of `ACTIVATIONS`.
    """

    x: Tensor
    ids: Tensor
    counts: Tensor
    gate: Tensor | None
    up: Tensor
    down_rows: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    out_bias: Tensor | None
    weights_of: Tensor | None
    shared_gate: Tensor | None
    shared_up: Tensor | None
    shared_down_rows: Tensor | None
    shared_gate_bias: Tensor | None
    shared_up_bias: Tensor | None
    activation: str


def run(call: Call) -> Tensor:
    """Return the output, [B, D], by what `dispatch` chooses."""
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.adaconvert.dynk_decode(*call)
        return out
    return _run(call)


def _run(call: Call) -> Tensor:
    if call.x.device.type == "cpu" and dispatch.wanted() != "triton":
        return by_torch(call)
    kernel = dispatch.select("dynk_decode", **facts_of(call))
    out: Tensor = by_torch(call) if kernel is None else kernel(call)
    return out


def check(call: Call) -> None:
    """Raise ValueError, TypeError or RuntimeError as `decode.dynk_decode` says, else nothing."""
    if call.activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation {call.activation!r}; expected one of {known}")
    for name, (dims, shape) in _shapes(call).items():
        tensor = getattr(call, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; expected {dims} = {list(shape)}")
    tensors = {name: t for name, t in call._asdict().items() if isinstance(t, Tensor)}
    for name in ("ids", "counts"):
        if tensors[name].dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} is {tensors[name].dtype}; expected int32 or int64")
    for name, tensor in tensors.items():
        if name not in ("ids", "counts", "weights_of") and tensor.dtype != call.x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, x is {call.x.dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise RuntimeError("dynk_decode has no gradients; call it under torch.no_grad()")


def by_torch(call: Call) -> Tensor:
    """Return the output by torch, [B, D]: all experts run, those not selected count zero times."""
    wide = _wide(call)
    factors = _factors(call)
    hidden = _hidden(call.x, (call.gate, call.gate_bias), (call.up, call.up_bias), call.activation)
    # what is left out may be infinite, and infinity times zero is not zero
    hidden = torch.where(factors[..., None] != 0, hidden * factors[..., None], 0)
    rows = hidden.flatten(1).to(call.x.dtype)
    out = (rows @ call.down_rows.flatten(0, 1)).to(wide)
    if call.shared_up is not None and call.shared_down_rows is not None:
        gate = (call.shared_gate, call.shared_gate_bias)
        always = _hidden(call.x, gate, (call.shared_up, call.shared_up_bias), call.activation)
        out = out + (always.to(call.x.dtype) @ call.shared_down_rows).to(wide)
    if call.down_bias is not None:
        out = out + factors @ call.down_bias.to(wide)
    if call.out_bias is not None:
        out = out + call.out_bias.to(wide)
    return out.to(call.x.dtype)


def activate(gate: Tensor | None, up: Tensor, activation: str) -> Tensor:
    """Return hidden values of pre-activations of one shape."""
    function = _FUNCTIONS[activation]
    return function(up) if gate is None else function(gate) * up


def facts_of(call: Call) -> dict[str, Any]:
    """Return what `dispatch.select` asks about a call."""
    experts, width, hidden = call.up.shape
    shared = 0 if call.shared_up is None else call.shared_up.shape[0]
    device = call.x.device
    return {
        "device": device.type,
        "dtype": call.x.dtype,
        "capability": triton_support.capability_on(device),
        "grad": False,
        "glu": call.gate is not None,
        **{"tokens": call.x.shape[0], "hidden": hidden, "experts": experts, "width": width},
        **{"selected": call.ids.shape[1], "shared": shared, "neurons": shared + experts * width},
    }


def by_triton(call: Call) -> Tensor:
    """Return the output by Triton's kernels, [B, D]."""
    from adaconvert.kernels import triton_decode

    return triton_decode.run(call)


def _shapes(call: Call) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return what the shape of each tensor is called, and what it must be."""
    (tokens, slots), (experts, width, hidden) = call.ids.shape, call.up.shape
    shared = 0 if call.shared_up is None else call.shared_up.shape[0]
    sizes = {"B": tokens, "M": slots, "E": experts, "S": width, "C": shared, "D": hidden}
    found = {
        **{"x": "BD", "ids": "BM", "counts": "B", "weights_of": "BM", "out_bias": "D"},
        **{"gate": "ESD", "up": "ESD", "down_rows": "ESD", "down_bias": "ED"},
        **{"gate_bias": "ES", "up_bias": "ES", "shared_gate_bias": "C", "shared_up_bias": "C"},
        **{"shared_gate": "CD", "shared_up": "CD", "shared_down_rows": "CD"},
    }
    return {
        name: (f"[{', '.join(dims)}]", tuple(sizes[d] for d in dims))
        for name, dims in found.items()
    }


def _wide(call: Call) -> torch.dtype:
    return torch.float64 if call.x.dtype == torch.float64 else torch.float32


def _factors(call: Call) -> Tensor:
    """Return how many times each expert's output counts for each token, [B, E]."""
    experts, slots = call.up.shape[0], torch.arange(call.ids.shape[1], device=call.ids.device)
    runs = (slots < call.counts[:, None]) & (call.ids >= 0) & (call.ids < experts)
    # what runs no expert goes to a column of its own
    places = torch.where(runs, call.ids, experts).long()
    given = runs if call.weights_of is None else call.weights_of
    empty = torch.zeros(len(call.x), experts + 1, dtype=_wide(call), device=call.x.device)
    return empty.scatter_add(1, places, given.to(_wide(call)))[:, :experts]


def _hidden(
    x: Tensor,
    gate: tuple[Tensor | None, Tensor | None],
    up: tuple[Tensor, Tensor | None],
    activation: str,
) -> Tensor:
    """Return the hidden values of all neurons of matrices [..., D] in the wide dtype, [B, ...]."""

    def before(matrices: Tensor, biases: Tensor | None) -> Tensor:
        found = torch.matmul(matrices, x.t()).movedim(-1, 0)
        found = found if found.dtype == torch.float64 else found.float()
        return found if biases is None else found + biases

    first = None if gate[0] is None else before(gate[0], gate[1])
    return activate(first, before(*up), activation)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda values: functional.gelu(values, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda values: functional.relu(values).square(),
}


# -- the operator, which torch.compile and torch.export put into their graphs whole

_OPTIONAL = ("bias", "weights_of", "gate", "shared")
_ARGUMENTS = ", ".join(
    f"Tensor{'?' if any(part in name for part in _OPTIONAL) else ''} {name}"
    for name in Call._fields[:-1]
)


def _operate(*arguments: Any) -> Tensor:
    return _run(Call(*arguments))


def _fake(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[0], memory_format=torch.contiguous_format)


torch.library.custom_op(
    "adaconvert::dynk_decode",
    _operate,
    mutates_args=(),
    schema=f"({_ARGUMENTS}, str activation) -> Tensor",
).register_fake(_fake)
