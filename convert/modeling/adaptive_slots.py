"""How sites are filled: one class per slot, mixed into the stock class of the module.

A filled module keeps its place, its child modules and every tensor name, is still an instance of
the stock class, and answers to the stock class's name (device maps and FSDP wrap by name). Slots of
one module, and of modules inside one another, are filled from the inside out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adaptive_ffn import AdaptiveFFN
from .adaptive_projection import AdaptiveProjection
from .adaptive_schema import SLOT_ORDER, AdaptiveConfigError

#: slot -> class; it has `adaptive_init(path, spec)` and overrides `forward`. One with an
#: `adaptive_stock` is mixed into that class instead of the module's own.
SLOTS: dict[str, type[nn.Module]] = {"linear": AdaptiveProjection, "ffn": AdaptiveFFN}
_MIXED: dict[tuple[type[Any], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(slot: type[Any], stock: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of both; one per pair, so that instances of a model share it."""
    known = _MIXED.get((slot, stock))
    if known is None:
        body = {
            "__module__": stock.__module__,
            "__reduce_ex__": _reduce,
            "adaptive_parts": (slot, stock),
        }
        known = _MIXED[slot, stock] = type(stock.__name__, (slot, stock), body)
    return known


def _blank(slot: type[nn.Module], stock: type[nn.Module]) -> nn.Module:
    made = mixed_class(slot, stock)
    module: nn.Module = made.__new__(made)
    return module


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    # the class is made at run time, so pickle and deepcopy rebuild it from the two it is made of
    state = {name: value for name, value in self.__dict__.items() if name != "adaptive_kept"}
    return _blank, self.adaptive_parts, state


def fill(model: nn.Module, adaptive: Mapping[str, Any], prefix: str) -> dict[str, nn.Module]:
    """Fill the sites of a stock model; return path -> module of those that choose experts.

    Args:
        model: the stock model.
        adaptive: a checked `config.adaptive`.
        prefix: name of the backbone in the model the paths were written for; it is left out when
            `model` is the backbone alone.

    Raises:
        AdaptiveConfigError: a path or a slot is not there.
    """
    inside = f"{prefix}."
    bare = bool(prefix) and not hasattr(model, prefix)
    found: dict[str, nn.Module] = {}
    for slot in SLOT_ORDER:
        for path, slots in adaptive["sites"].items():
            if slot not in slots:
                continue
            own = path.removeprefix(inside) if bare else path
            module = _module(model, own)
            if slot not in SLOTS:
                raise AdaptiveConfigError(f"site {path!r}: this code cannot fill slot {slot!r}")
            stock = getattr(SLOTS[slot], "adaptive_stock", type(module))
            module.__class__ = mixed_class(SLOTS[slot], stock)
            module.adaptive_init(path, slots[slot])  # type: ignore[operator]
            if isinstance(module, AdaptiveFFN):
                found[path] = module
            if slot == "ffn":
                _name_down(model, module, slots[slot].get("down_path"), inside if bare else "")
    return found


def _name_down(model: nn.Module, site: nn.Module, path: str | None, outside: str) -> None:
    """Let a site know its down projection in another module, which stays that module's child."""
    if path is not None:
        site.__dict__["adaptive_down"] = _module(model, path.removeprefix(outside))


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdaptiveConfigError(
            f"config.adaptive.sites names {path!r}, which {type(model).__name__} does not have"
        ) from None
