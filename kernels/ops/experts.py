"""The expert modules of transformers' mixture-of-experts models, run by `grouped_ffn`.

transformers is not imported: a module is known by the attributes that its decorator
`use_experts_implementation` sets, and by the classes of its parts. What is not known is refused
with a reason, and the caller runs something else.

T tokens, K slots per token, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional

from adaconvert.kernels import grouped_gemm
from adaconvert.kernels.expert_activations import Activation
from adaconvert.kernels.grouped import grouped_ffn
from adaconvert.kernels.plan import route_plan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)
_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE
#: attributes that the decorator sets, then those of the module's own.
_OF_DECORATOR = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
_MARKS = ("num_experts", *_OF_DECORATOR, "act_fn")
#: classes of transformers.activations; the four of "gelu_tanh" are one function.
_OF_TRANSFORMERS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "ReLUSquaredActivation": "relu2",
}
_OF_TORCH: dict[type, Activation] = {nn.SiLU: "silu", nn.ReLU: "relu"}
_OF_GELU: dict[str, Activation] = {"none": "gelu", "tanh": "gelu_tanh"}
_OF_FUNCTIONS: dict[Callable[..., Tensor], Activation] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
}


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the experts' output, [T, d], for a call that `refuses` lets pass.

    As in transformers' own implementations the input takes the dtype of the weights, the output
    that of the input.

    Args:
        module: the experts.
        hidden_states: [T, d].
        top_k_index: [T, K]; below 0 or from `num_experts` on (expert parallelism): no expert.
        top_k_weights: [T, K].
    """
    first, down = _matrices(module)
    name = "gate_up" if module.has_gate else "up"
    given: dict[str, Any] = {name: first, "down": down}
    if module.has_bias:
        given[f"{name}_bias"] = getattr(module, f"{name}_proj_bias")
        given["down_bias"] = module.down_proj_bias
    activation = activation_of(module.act_fn)
    assert activation is not None
    # before transformers 5.23 the module does not say whether slots can be without an expert; one
    # with null experts says so itself
    may_drop = getattr(module, "_is_expert_parallel", True) or getattr(module, "drops_slots", False)
    out = grouped_ffn(
        hidden_states.to(down.dtype),
        top_k_weights,
        route_plan(top_k_index, module.num_experts, may_drop=may_drop),
        **given,
        activation=activation,
        glu=module.has_gate,
    )
    return out.to(hidden_states.dtype)


def refuses(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> str | None:
    """Return why `experts_forward` cannot run this call, None when it can."""
    reason = _refuses_module(module) or _refuses_watched()
    if reason is not None:
        return reason
    names = _weight_names(module)
    weights: list[Any] = [getattr(module, name, None) for name in names]
    for name, weight in zip(names, weights, strict=True):
        if weight is None:
            return f"the module has no {name}"
    call = (hidden_states, top_k_index, top_k_weights)
    return _refuses_tensors(weights, *call) or _refuses_shapes(module, weights, *call)


def refuses_grouped_mm(module: Any) -> str | None:
    """Return why torch's grouped_mm cannot run the module's matrices, None when it can.

    Weights that are not plain tensors, and a call that torch.compile traces, are let pass:
    transformers' implementation by grouped_mm has its own ways for those. On meta it runs bfloat16.
    """
    first = getattr(module, "gate_up_proj" if module.has_gate else "up_proj", None)
    down = getattr(module, "down_proj", None)
    if first is None or down is None:
        return "the module has no matrices of the usual names"
    if torch.compiler.is_compiling() or not {type(first), type(down)} <= set(_PLAIN):
        return None
    if torch.autograd.forward_ad._current_level >= 0:
        return "grouped_mm has no forward derivatives"
    if first.dim() != 3 or down.dim() != 3:
        return f"the matrices are {list(first.shape)} and {list(down.shape)}"
    if first.is_meta and {first.dtype, down.dtype} == {torch.bfloat16}:
        return None
    return grouped_gemm.refuses(first, first) or grouped_gemm.refuses(down, down)


def holds_experts(model: nn.Module) -> bool:
    """Return whether a module of the model is decorated, so that an implementation is chosen."""
    return any(all(hasattr(module, name) for name in _OF_DECORATOR) for module in model.modules())


def _refuses_module(module: Any) -> str | None:
    missing = [name for name in _MARKS if not hasattr(module, name)]
    if missing:
        return f"the module has no {missing[0]}"
    if module.has_gate and not module.is_concatenated:
        return "gate and up are interleaved"
    if getattr(module, "has_post_expert_norm", False):
        return "experts end in a norm"
    if module.has_gate and not _gates_as_usual(module):
        return f"{type(module).__name__} has a gate of its own"
    if activation_of(module.act_fn) is None:
        state = "hooked" if _hooked(module.act_fn) else "not known"
        return f"the activation {_name(module.act_fn)} is {state}"
    return None


def _refuses_watched() -> str | None:
    """Return who looks at each operation and cannot see into ours, None when nobody does.

    A mode that only counts, such as FlopCounterMode, sees enough. What torch.compile and
    torch.export trace has operators of ours instead.
    """
    if torch.compiler.is_compiling():
        return None
    if torch._C._is_tracing():
        return "torch.jit.trace records the call"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func runs the call"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward derivatives are taken"
    if torch._C._get_dispatch_mode(_FAKE) is not None:
        return "a mode of fake tensors runs the call"
    if torch._C._get_dispatch_mode(_PROXY) is not None:
        return "make_fx records the call"
    before = torch._ops._get_dispatch_mode_pre_dispatch(_PROXY)  # type: ignore[no-untyped-call]
    return None if before is None else "make_fx records the call"


def _refuses_tensors(
    weights: list[Any], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> str | None:
    floats = (hidden_states, top_k_weights, *weights)
    for tensor in (top_k_index, *floats):
        if type(tensor) not in _PLAIN and not _exported(tensor):
            return "tensors are not plain tensors"
    for tensor in floats:
        if tensor.dtype not in _DTYPES:
            return "tensors are not of floats"
    for weight in weights:
        if weight.dtype != weights[0].dtype:
            return f"the weights are of {weights[0].dtype} and of {weight.dtype}"
    index = top_k_index.dtype
    if index.is_floating_point or index.is_complex or index == torch.bool:
        return f"the experts of the slots are {index}"
    return None


def _exported(tensor: Any) -> bool:
    """Whether torch.export (non-strict) put it in the place of a plain tensor."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return exporting and type(tensor) is FakeTensor


def _refuses_shapes(
    module: Any,
    weights: list[Tensor],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> str | None:
    first, down, *biases = (weight.shape for weight in weights)
    if len(first) != 3 or len(down) != 3:
        return f"the matrices are {list(first)} and {list(down)}"
    # [E, outputs, inputs], of transposed matrices [E, inputs, outputs]
    hidden, width = down[:0:-1] if module.is_transposed else down[1:]
    wide = 2 * width if module.has_gate else width
    experts, inner = module.num_experts, (hidden, wide) if module.is_transposed else (wide, hidden)
    if down[0] != experts or first != (experts, *inner):
        return f"the matrices are {list(first)} and {list(down)}"
    if biases and biases != [(experts, wide), (experts, hidden)]:
        return f"the biases are {list(biases[0])} and {list(biases[1])}"
    slots = top_k_index.shape
    if len(slots) != 2 or top_k_weights.shape != slots or hidden_states.shape != (slots[0], hidden):
        return "the shapes of the call are not [T, d], [T, K], [T, K]"
    return None


def _weight_names(module: Any) -> tuple[str, ...]:
    """Return the names of the module's matrices, then of its biases if it has some."""
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return (*names, *(f"{name}_bias" for name in names)) if module.has_bias else names


def _matrices(module: Any) -> tuple[Tensor, Tensor]:
    """Return gate over up, or up, and down, as [E, outputs, inputs]."""
    first: Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    down: Tensor = module.down_proj
    return (first.transpose(1, 2), down.transpose(1, 2)) if module.is_transposed else (first, down)


def _gates_as_usual(module: Any) -> bool:
    """Whether the gate is the decorator's: activation of the first half times the second."""
    if "_apply_gate" in module.__dict__:
        return False
    # the function of the class and these two of its attributes, read plainly: torch.compile (2.13)
    # has no function of a bound method, finds __qualname__ unequal to anything, and answers a
    # getattr that has a default with the default
    gate = getattr(type(module), "_apply_gate", None)
    if not isinstance(gate, FunctionType) or gate.__name__ != "_default_apply_gate":
        return False
    return gate.__module__ == "transformers.integrations.moe"


def activation_of(function: Any) -> Activation | None:
    """Return the name of an activation; None when unknown, or hooked, so that more would happen."""
    if not isinstance(function, nn.Module):
        return _OF_FUNCTIONS.get(function)
    if _hooked(function):
        return None
    kind = type(function)
    if isinstance(function, nn.GELU):
        return _OF_GELU.get(function.approximate) if kind is nn.GELU else None
    if kind.__module__ == "transformers.activations":
        return _OF_TRANSFORMERS.get(kind.__name__)
    return _OF_TORCH.get(kind)


def _hooked(function: Any) -> bool:
    if not isinstance(function, nn.Module):
        return False
    before = function._forward_pre_hooks or function._backward_pre_hooks
    return bool(before or function._forward_hooks or function._backward_hooks)


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
