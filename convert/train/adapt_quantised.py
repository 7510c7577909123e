"""Frozen matrices in 4 bits while adapters on them are trained (bitsandbytes, NF4).

Matrices of modules become bitsandbytes' own layers; stacked experts, which those do not cover, are
packed as a whole and unpacked where they are used. Every matrix
inside the blocks is packed or the model is refused: none stays large unnoticed.

Source: Dettmers et al. 2023, 2305.14314 (QLoRA), without its second quantisation of the scales.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_linear import AdaptiveLinear
from adaconvert.modeling.adaptive_mixed import mixed_class
from adaconvert.train.adapt import candidates

#: values that share one float32 scale.
BLOCK = 64
_HINT = "Leave --load-in-4bit out."


def packed_bytes(count: int) -> int:
    """Return the bytes of `count` values in 4 bits and of their scales."""
    return math.ceil(count / 2) + 4 * math.ceil(count / BLOCK)


def packable(model: Any, kept: Collection[str] = ()) -> list[str]:
    """Return the names of the weights that are packed: every matrix of a block but routers.

    Args:
        model: with nothing packed yet.
        kept: names of weights that are trained themselves.

    Raises:
        OptionError: a matrix cannot be packed.
    """
    found = []
    for name in candidates(model):
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        if name in kept:
            continue
        if getattr(module, own).dim() == 2 and not isinstance(module, nn.Linear):
            raise OptionError(
                f"a {type(module).__name__} cannot be held in 4 bits",
                where=f"--load-in-4bit: '{name}'",
                hint=_HINT,
            )
        found.append(name)
    return found


def pack(model: Any, names: Collection[str], *, device: Any, dtype: torch.dtype) -> None:
    """Put the weights `names` into 4 bits on `device`, one after the other.

    Args:
        model: changed in place, adapters already on; the rest of it stays where it is.
        names: as `packable` returned them before adapters were put on.
        device: where the packed weights go.
        dtype: what they are unpacked to.
    """
    for name in names:
        path, _, own = name.rpartition(".")
        outer = model.get_submodule(path)
        base = _base(outer)
        if not isinstance(base, nn.Linear):
            _pack_parameter(outer, base, own, device, dtype)
        elif base is outer:
            made = _packed_linear(base, device, dtype)
            if isinstance(base, AdaptiveLinear):
                _move_adapters(base, made)
            model.set_submodule(path, made)
        else:
            outer.base_layer = _packed_linear(base, device, dtype)


def _base(module: Any) -> Any:
    """Return what adapters were put on."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _packed_linear(module: nn.Linear, device: Any, dtype: torch.dtype) -> Any:
    from bitsandbytes import nn as packed

    library: Any = packed
    made = library.Linear4bit(
        *(module.in_features, module.out_features),
        bias=False,
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    made.weight = library.Params4bit(
        module.weight.data.to(dtype).contiguous(),
        requires_grad=False,
        blocksize=BLOCK,
        compress_statistics=False,
        quant_type="nf4",
        module=made,
    )
    made.bias = module.bias
    # moving there packs it
    made.weight = made.weight.to(device)
    return made


def _move_adapters(linear: AdaptiveLinear, packed: Any) -> None:
    """Let a packed matrix have the routed adapters of the linear it was; they stay as they are."""
    packed.__class__ = mixed_class(AdaptiveLinear, type(packed))
    packed.adapters, packed.router = linear.adapters, linear.router
    for name in ("adaptive_path", "adaptive_spec", "adaptive_first"):
        setattr(packed, name, getattr(linear, name))
    packed.train(linear.training)


def _pack_parameter(outer: Any, base: Any, own: str, device: Any, dtype: torch.dtype) -> None:
    """Pack a parameter that exists from now on only while `outer`, which adapts it, runs.

    bitsandbytes' own way, a parametrisation, does not work together with PEFT 0.21: an adapter is
    lost where another one is active, or stays and is added again.
    """
    from bitsandbytes import functional

    whole = getattr(base, own).data.to(device, dtype).contiguous()
    packed, state = functional.quantize_4bit(
        whole, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    base.register_buffer(f"{own}_packed", packed, persistent=False)
    base.register_buffer(f"{own}_scales", state.absmax, persistent=False)

    def unpack(*_: Any) -> None:
        state.absmax = getattr(base, f"{own}_scales")
        values = functional.dequantize_4bit(getattr(base, f"{own}_packed"), state)
        # a new parameter each time: the graph keeps those it needs
        base._parameters[own] = nn.Parameter(values, requires_grad=False)

    def drop(*_: Any) -> None:
        base._parameters[own] = nn.Parameter(whole.new_empty(0), requires_grad=False)

    whole = whole.new_empty(0)
    drop()
    outer.register_forward_pre_hook(unpack)
    # also where recomputation ends a forward pass early
    outer.register_forward_hook(drop, always_call=True)
