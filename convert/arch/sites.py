"""Where the feed-forward network of a block lies: its module in memory, its tensors on disk.

Neuron j of a network is row j of gate and up, entry j of their biases and column j of down; the
bias of down belongs to no neuron.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaconvert.arch import registry
from adaconvert.arch.base import ModelSpec, TensorSpec

#: role -> axis of its neurons in [out, in] order, and how many runs of them it holds.
_NEURONS: Mapping[str, tuple[int, int]] = {
    "gate": (0, 1),
    "up": (0, 1),
    "gate_up": (0, 2),
    "gate_bias": (0, 1),
    "up_bias": (0, 1),
    "gate_up_bias": (0, 2),
    "down": (1, 1),
}
_MATRICES = ("gate", "up", "gate_up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stored tensor that holds something of every neuron.

    Attributes:
        tensor: name on disk.
        role: as in `base`.
        axis: along which the neurons lie as stored.
        runs: how often all neurons follow each other there (2: gate, then up).
    """

    tensor: str
    role: str
    axis: int
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FfnSite:
    """The feed-forward network of one block.

    Attributes:
        layer: index of the block.
        path: its module in memory, in the architecture config.json names.
        stored: what names of further tensors of that module begin with on disk.
        weights: role -> child module; without "down" where that lies in another module, and the
            module then returns the hidden units (BERT).
        down_path: that other module's path in memory, None where there is none.
        parts: every stored tensor its neurons lie in.
    """

    layer: int
    path: str
    stored: str
    weights: Mapping[str, str]
    parts: tuple[Part, ...]
    down_path: str | None = None


def ffn_site(spec: ModelSpec, layer: int) -> FfnSite:
    """Return where the dense feed-forward network of a block lies."""
    found = {t.role: t for t in spec.tensors if t.layer == layer and t.role in _NEURONS}
    anchor = found.get("up") or found["gate_up"]
    modules = {role: _module(found[role].name) for role in _MATRICES if role in found}
    stored, _ = _module(anchor.name)
    weights = {role: child for role, (module, child) in modules.items() if module == stored}
    path = _prefix(spec, stored) + stored
    down_path = None if "down" in weights else _prefix(spec, stored) + ".".join(modules["down"])
    family = registry.FAMILIES[spec.model_type]
    if family.site is not None:
        names = {"p": stored[: stored.index(f"{_stem(family.site.stored)}")], "layer": layer}
        path = family.site.path.format(**names)
        stored = family.site.stored.format(**names)
        weights, down_path = dict(family.site.children), None
    return FfnSite(
        layer=layer,
        path=path,
        stored=stored,
        weights=weights,
        down_path=down_path,
        parts=tuple(_part(tensor) for tensor in found.values()),
    )


def _module(name: str) -> tuple[str, str]:
    """Return module and child of the name of a child's weight."""
    module, child, _ = name.rsplit(".", 2)
    return module, child


def _stem(template: str) -> str:
    """Return what follows the prefix of a template, up to the layer."""
    return template.removeprefix("{p}").partition("{layer}")[0]


def _prefix(spec: ModelSpec, stored: str) -> str:
    """Return the prefix the module has in memory and a file saved from the bare body lacks."""
    family = registry.FAMILIES[spec.model_type]
    prefixed = "prefixed" in family.architectures[spec.architecture]
    return family.prefix if prefixed and not stored.startswith(family.prefix) else ""


def _part(tensor: TensorSpec) -> Part:
    axis, runs = _NEURONS[tensor.role]
    if tensor.transposed:
        axis = 1 - axis
    return Part(tensor=tensor.name, role=tensor.role, axis=axis, runs=runs)
