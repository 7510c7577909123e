"""Attention projections as data: where each lies, and the network that may stand in its place.

Letters: d inputs, o outputs, f neurons of the network, E experts of m neurons, w router width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaconvert.arch import registry
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

#: queries, keys, values, and what joins the heads again.
ROLES = ("q", "k", "v", "o")
#: roles of matrices that hold several projections.
FUSED = ("qkv", "qkv_by_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionSite:
    """One projection of one block.

    Attributes:
        layer: index of the block.
        role: of `ROLES`.
        path: its module in memory, in the architecture config.json names.
        stored: what names of its tensors begin with on disk.
        inputs, outputs: d and o.
        weight, bias: its tensors; no bias is None.
        transposed: the weight is stored [d, o].
    """

    layer: int
    role: str
    path: str
    stored: str
    inputs: int
    outputs: int
    weight: str
    bias: str | None
    transposed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A two-layer network in place of a projection; the "mlp" of a site's "linear" slot.

    Attributes:
        role: of the projection.
        hidden, output: d and o.
        experts, width: E and m; one expert is a network that is not split.
        up_bias, down_bias: which layers have one.
        split: how its neurons were put into experts.
        activation: transformers name.
        router: {"kind": ...} and what the kind needs.
        select: {"rule": ...} and the value the rule needs.
        quality: what was measured when it was fitted, see `methods.d2dmoe.distil.Distilled`.
    """

    role: str
    hidden: int
    output: int
    experts: int
    width: int
    up_bias: bool
    down_bias: bool
    split: str = "balanced-kmeans"
    activation: str = "relu"
    router: Mapping[str, object] = field(default_factory=lambda: {"kind": "none"})
    select: Mapping[str, object] = field(default_factory=lambda: {"rule": "all"})
    quality: Mapping[str, object] | None = None

    @property
    def neurons(self) -> int:
        """Return f."""
        return self.experts * self.width

    def content(self) -> dict[str, object]:
        """Return the network as config.json holds it."""
        return {
            "role": self.role,
            "weights": {"up": "up", "down": "down"},
            "bias": {"up": self.up_bias, "down": self.down_bias},
            "activation": self.activation,
            "hidden": self.hidden,
            "output": self.output,
            "intermediate": self.neurons,
            "partition": {"split": self.split, "permuted": False},
            "experts": {"count": self.experts, "width": self.width},
            "shared": 0,
            "router": dict(self.router),
            "select": dict(self.select),
            "quality": None if self.quality is None else dict(self.quality),
        }

    def shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return role and shape of each tensor, by its name after the site's."""
        neurons = self.neurons
        found: dict[str, tuple[str, tuple[int, ...]]] = {
            "up.weight": ("projection_up", (neurons, self.hidden)),
            "down.weight": ("projection_down", (self.output, neurons)),
        }
        if self.up_bias:
            found["up.bias"] = ("projection_up_bias", (neurons,))
        if self.down_bias:
            found["down.bias"] = ("projection_down_bias", (self.output,))
        if self.router["kind"] == "contribution":
            width = _size(self.router["width"])
            found["router.w1"] = ("projection_router", (width, self.hidden))
            found["router.w2"] = ("projection_router", (self.experts, width))
        return found

    def tensors(self, site: ProjectionSite) -> list[TensorSpec]:
        """Return the tensors a checkpoint holds of it."""
        return [
            TensorSpec(name=f"{site.stored}.{name}", role=role, shape=shape, layer=site.layer)
            for name, (role, shape) in self.shapes().items()
        ]


def projection_sites(spec: ModelSpec) -> dict[str, ProjectionSite]:
    """Return the projections of a stock model that are matrices of their own, by path."""
    biases = {t.name for t in spec.tensors if t.role in {f"{role}_bias" for role in ROLES}}
    found = (
        _site(spec, tensor, biases)
        for tensor in spec.tensors
        if tensor.role in ROLES and tensor.layer is not None
    )
    return {site.path: site for site in found}


def _site(spec: ModelSpec, tensor: TensorSpec, biases: set[str]) -> ProjectionSite:
    stored = tensor.name.removesuffix(".weight")
    rows, columns = reversed(tensor.shape) if tensor.transposed else tensor.shape
    family = registry.FAMILIES[spec.model_type]
    prefixed = "prefixed" in family.architectures[spec.architecture]
    bare = prefixed and not stored.startswith(family.prefix)
    assert tensor.layer is not None
    return ProjectionSite(
        layer=tensor.layer,
        role=tensor.role,
        path=(family.prefix if bare else "") + stored,
        stored=stored,
        inputs=columns,
        outputs=rows,
        weight=tensor.name,
        bias=f"{stored}.bias" if f"{stored}.bias" in biases else None,
        transposed=tensor.transposed,
    )


def stock_spec(spec: ModelSpec) -> ModelSpec:
    """Return the description of the stock model under an adaptive one."""
    if spec.adaptive is None:
        return spec
    return registry.describe(dict(spec.config), {tensor.name for tensor in spec.tensors})


def networks_of(
    spec: ModelSpec, adaptive: Mapping[str, object]
) -> Iterator[tuple[ProjectionSite, Network]]:
    """Yield the replaced projections of an adaptive checkpoint, block by block.

    Args:
        spec: of the stock model underneath.
        adaptive: `config.adaptive`.

    Raises:
        SourceError: one is malformed, or lies where the model has no such projection.
    """
    sites = adaptive.get("sites")
    linear = {
        path: slots["linear"]
        for path, slots in (sites if isinstance(sites, dict) else {}).items()
        if isinstance(slots, dict) and isinstance(slots.get("linear"), dict)
    }
    replaced = {path: slot["mlp"] for path, slot in linear.items() if "mlp" in slot}
    known = projection_sites(spec) if replaced else {}
    for path in replaced:
        if path not in known:
            raise SourceError(
                f"adaptive.sites names {escape(path, 80)!r}, where a {spec.architecture} has no "
                "projection of its own",
                where=WHERE,
            )
    for path, site in known.items():
        if path in replaced:
            yield site, _network(site, replaced[path])


def _network(site: ProjectionSite, mlp: Any) -> Network:
    try:
        found = Network(
            role=str(mlp["role"]),
            hidden=_size(mlp["hidden"]),
            output=_size(mlp["output"]),
            experts=_size(mlp["experts"]["count"]),
            width=_size(mlp["experts"]["width"]),
            up_bias=mlp["bias"]["up"] is True,
            down_bias=mlp["bias"]["down"] is True,
            split=str(mlp["partition"]["split"]),
            activation=str(mlp["activation"]),
            router=dict(mlp["router"]),
            select=dict(mlp["select"]),
            quality=None if mlp.get("quality") is None else dict(mlp["quality"]),
        )
        _size(found.router.get("width", 1))
        fits = (
            found.router["kind"] in {"contribution", "none", "gate", "oracle"}
            and (found.hidden, found.output) == (site.inputs, site.outputs)
            and mlp["intermediate"] == found.neurons
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise SourceError(
            f"adaptive.sites[{escape(site.path, 80)}].linear.mlp is not usable",
            where=WHERE,
            expected=f"a network of {site.inputs} inputs and {site.outputs} outputs",
        )
    return found


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise ValueError(value)
    return value


def replaced_tensors(spec: ModelSpec, adaptive: Mapping[str, object]) -> tuple[TensorSpec, ...]:
    """Return the tensors of a stock model with those of its replaced projections in their place.

    Args and errors as for `networks_of`.
    """
    networks = {site.weight: (site, net) for site, net in networks_of(spec, adaptive)}
    gone = {site.bias for site, _ in networks.values()}
    found: list[TensorSpec] = []
    for tensor in spec.tensors:
        if tensor.name in networks:
            site, network = networks[tensor.name]
            found += network.tensors(site)
        elif tensor.name not in gone:
            found.append(tensor)
    return tuple(found)


def active_shares(spec: ModelSpec) -> dict[str, float]:
    """Return, by tensor, the share of a replaced projection's neurons a token runs as configured;
    all of them where that depends on the token."""
    if spec.adaptive is None:
        return {}
    shares = {}
    for site, network in networks_of(stock_spec(spec), spec.adaptive):
        chosen = network.experts
        if network.select.get("rule") == "top-k":
            chosen = min(_size(network.select.get("k", chosen)), chosen)
        for name in ("up.weight", "up.bias", "down.weight"):
            shares[f"{site.stored}.{name}"] = chosen / network.experts
    return shares
