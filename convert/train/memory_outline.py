"""What a forward pass keeps for the backward one, counted by running a model without numbers.

Shapes: B sequences, S positions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from adaconvert.layerwise.names import block_of
from adaconvert.layerwise.quiet import quiet

_BLOCK = re.compile(r"(?:[A-Za-z_]\w*\.)+\d+")
_ATTENTION = "adaconvert_outline"


class _Fused(torch.autograd.Function):
    """Attention that keeps what fused kernels keep: what goes in and what comes out.

    With dropout inside attention, as in GPT-2, the CPU has none and keeps more.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    function: Any = _Fused
    return function.apply(query, key, value).transpose(1, 2).contiguous(), None


def _outline(model: Any) -> None:
    """Make attention in `model` keep what fused kernels do, where it would use them."""
    from transformers import AttentionInterface

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, _attention)
        model.config._attn_implementation = _ATTENTION


class _Watch:
    """Counts what a forward pass keeps, by block; each storage once.

    Attributes:
        kept: block -> storage -> bytes.
    """

    def __init__(self, model: Any, scale: float) -> None:
        self.kept: dict[int | None, dict[int, int]] = {}
        self._place: int | None = None
        self._scale = scale
        self._own = {p.untyped_storage()._cdata for p in model.parameters()}

    def enter(self, place: int) -> Any:
        """Return a hook that says which block runs from now on."""
        return lambda *_: setattr(self, "_place", place)

    def leave(self, *_: Any) -> None:
        """Say that no block runs."""
        self._place = None

    def keep(self, value: Any) -> Any:
        """Count a tensor and return it."""
        storage = value.untyped_storage()
        is_mask = value.dim() == 4 and value.shape[1] == 1 and value.shape[2] == value.shape[3]
        if storage._cdata not in self._own and not is_mask:
            size = storage.nbytes() * (self._scale if value.element_size() == 2 else 1)
            # the storages live as long as the graph does, so their addresses tell them apart
            self.kept.setdefault(self._place, {})[storage._cdata] = int(size)
        return value


def kept_by_block(model: Any, shape: tuple[int, int], *, scale: float) -> dict[int | None, int]:
    """Return the bytes each block keeps, None for what lies outside; empty if it cannot be run.

    It runs in bfloat16, because products of stacked experts know no other dtype without numbers.

    Args:
        model: on the meta device; its dtypes are others afterwards.
        shape: (B, S).
        scale: bytes of a value that is computed in bfloat16 here, over two.
    """
    model.to(torch.bfloat16).train()
    _outline(model)
    watch = _Watch(model, scale)
    hooks = list(_watched(model, watch))
    mask = torch.zeros(shape[0], 1, shape[1], shape[1], device="meta", dtype=torch.bfloat16)
    ids = torch.zeros(shape, dtype=torch.long, device="meta")
    try:
        hooked = torch.autograd.graph.saved_tensors_hooks(watch.keep, lambda value: value)
        with quiet(), hooked:
            # held until everything is counted
            kept = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    del kept
    return {place: sum(found.values()) for place, found in watch.kept.items()}


def _watched(model: Any, watch: _Watch) -> Iterator[Any]:
    for path, module in model.named_modules():
        place = block_of(f"{path}.weight")
        if place is not None and _BLOCK.fullmatch(path):
            yield module.register_forward_pre_hook(watch.enter(place))
            yield module.register_forward_hook(watch.leave)
