"""How sites are filled: one class per slot, mixed into the stock class of the module.

A filled module keeps its place, its child modules and every tensor name, is still an instance of
the stock class, and answers to the stock class's name (device maps and FSDP wrap by name). Slots of
one module, and of modules inside one another, are filled from the inside out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adaptive_depth import DepthLayer
from .adaptive_ffn import AdaptiveFFN
from .adaptive_linear import AdaptiveLinear
from .adaptive_mixed import mixed_class
from .adaptive_mixture import AdaptiveMixture
from .adaptive_projection import AdaptiveProjection
from .adaptive_schema import SLOT_ORDER, AdaptiveConfigError
from .adaptive_stages import StagedLayer

#: what chooses experts.
SITES = (AdaptiveFFN, AdaptiveMixture)
#: slot -> class, but for mixtures; it has `adaptive_init(path, spec)` and overrides `forward`. One
#: with an `adaptive_stock` is mixed into that class instead of the module's own.
SLOTS: dict[str, type[nn.Module]] = {
    "linear": AdaptiveProjection,
    "ffn": AdaptiveFFN,
    "layer": DepthLayer,
}


def fill(model: nn.Module, adaptive: Mapping[str, Any], prefix: str) -> dict[str, nn.Module]:
    """Fill the sites of a stock model; return path -> module of those that choose experts, have
    routed adapters, or are blocks that tokens may skip.

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
        sites = [(path, slots) for path, slots in adaptive["sites"].items() if slot in slots]
        # adapters may be on the matrices of a network in place of a projection
        for path, slots in sorted(sites, key=lambda site: "adapters" in site[1][slot]):
            own = path.removeprefix(inside) if bare else path
            module = _module(model, own)
            if slot not in SLOTS:
                raise AdaptiveConfigError(f"site {path!r}: this code cannot fill slot {slot!r}")
            chosen = _class_for(slot, slots[slot])
            stock = getattr(chosen, "adaptive_stock", type(module))
            if isinstance(module, StagedLayer):
                # stages say which blocks run at all
                parts: Any = stock
                inner = mixed_class(chosen, parts.adaptive_parts[-1])
                setattr(module, "__class__", mixed_class(StagedLayer, inner))  # noqa: B010
            else:
                module.__class__ = mixed_class(chosen, stock)
            module.adaptive_init(path, slots[slot])  # type: ignore[operator]
            if isinstance(module, (*SITES, AdaptiveLinear, DepthLayer)):
                found[path] = module
            if slot == "ffn":
                _name_down(model, module, slots[slot].get("down_path"), inside if bare else "")
    return found


def _class_for(slot: str, spec: Mapping[str, Any]) -> type[nn.Module]:
    """Return the class that fills a slot."""
    if "mixture" in spec:
        return AdaptiveMixture
    return AdaptiveLinear if "adapters" in spec else SLOTS[slot]


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
