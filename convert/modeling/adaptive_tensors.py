"""Which modules are nothing but a matrix, and what is made of their tensors once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_PLAIN = (nn.Linear, Conv1D)


def is_untouched(child: nn.Module) -> bool:
    """Return whether a module is a plain matrix whose weight says all it does: no adapter, no
    quantisation, no hook, no forward of its own (offloading replaces it), and weights at hand."""
    # `vars`: each look-up through a module costs microseconds, and every pass makes dozens of them
    own = vars(child)
    if type(child) not in _PLAIN or is_hooked(child):
        return False
    weight: Any = own["_parameters"].get("weight")
    return isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta


def is_hooked(module: nn.Module) -> bool:
    """Return whether more or something else than the forward of its class runs."""
    own = vars(module)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    return bool(hooks) or "forward" in own or "_hf_hook" in own


def tensors_of(children: Iterable[nn.Module]) -> list[Any]:
    """Return the weight and the bias of each, None where there is none."""
    found: list[Any] = []
    for child in children:
        own = vars(child)["_parameters"]
        found += [own.get("weight"), own.get("bias")]
    return found


class Made:
    """What was made of parameters, None where nothing could be, and the parameters.

    It may hold views of them, which stay behind when a parameter gets other memory.
    """

    def __init__(self, made: Any, tensors: list[Any]) -> None:
        self.made = made
        self._tensors = tensors
        self._pointers = self._places(tensors)

    def holds(self, tensors: list[Any]) -> bool:
        """Return whether these are those parameters, where they were."""
        # a parametrised or adapted router has fewer of its own
        if len(self._tensors) != len(tensors):
            return False
        for one, other in zip(self._tensors, tensors, strict=True):
            if one is not other:
                return False
        return self._pointers == self._places(tensors)

    def _places(self, tensors: list[Any]) -> list[int]:
        # where nothing was made nothing was read, and quantised tensors may have no address
        return [] if self.made is None else [t.data_ptr() for t in tensors if t is not None]
