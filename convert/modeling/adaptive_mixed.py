"""Subclasses of stock classes that a filled module takes the place of its class by."""

from __future__ import annotations

from typing import Any

from torch import nn

_MIXED: dict[tuple[type[Any], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(slot: type[Any], stock: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of both; one per pair, so that instances of a model share it."""
    known = _MIXED.get((slot, stock))
    if known is None:
        body = {
            "__module__": stock.__module__,
            "__reduce_ex__": _reduce,
            "adaptive_parts": (slot, *getattr(stock, "adaptive_parts", (stock,))),
        }
        known = _MIXED[slot, stock] = type(stock.__name__, (slot, stock), body)
    return known


def _blank(*parts: type[nn.Module]) -> nn.Module:
    made = parts[-1]
    for slot in reversed(parts[:-1]):
        made = mixed_class(slot, made)
    module: nn.Module = made.__new__(made)
    return module


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # the class is made at run time, so pickle and deepcopy rebuild it from the two it is made of
    state = {name: value for name, value in self.__dict__.items() if name != "adaptive_kept"}
    return _blank, self.adaptive_parts, state
