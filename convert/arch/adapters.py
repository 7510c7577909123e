"""Linears of a model as data, and routed adapters beside them; see `modeling.adaptive_adapters`.

Two forms hold the same adapters. A standalone adaptive checkpoint names each linear in
`config.adaptive.sites`; a PEFT folder (peft_type "MOLORA") says once, in adapter_config.json, what
all of them are. `sites_of` gives the first from the second.

Letters: n inputs and m outputs of a linear, E adapters of rank r, d hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.arch import registry
from adaconvert.arch.base import ModelSpec, TensorSpec
from adaconvert.arch.family import Site
from adaconvert.arch.projections import networks_of, stock_spec
from adaconvert.arch.values import WHERE
from adaconvert.errors import SourceError
from adaconvert.io.names import escape

PEFT_TYPE = "MOLORA"
LORA, IA3 = "lora", "ia3"
READS = ("module", "layer", "shared")
#: roles of linears, attention and dense networks; experts of a mixture are no modules of their own.
_ATTENTION = ("q", "k", "v", "o", "qkv", "qkv_by_head", "q_down", "q_up", "kv_down", "kv_up")
_FFN = ("gate", "up", "gate_up", "down")
_SHARED = tuple(f"shared_{role}" for role in _FFN)
ROLES = (*_ATTENTION, *_FFN, *_SHARED)
DOWN = ("down", "shared_down")
#: linears outside blocks; adapters on them would be no part of a block.
_OUTER = ("head", "head_transform", "pair_head", "classifier", "span_head", "pooler")
_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
_TENSORS = {"a": "adapter_a", "b": "adapter_b", "vectors": "adapter_vectors"}
#: roles of the tensors routed adapters add.
ADAPTER_ROLES = frozenset({*_TENSORS.values(), "adapter_router"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One linear of one block.

    Attributes:
        path: its module in memory, in the architecture config.json names.
        stored: what names of its tensors begin with on disk.
        role: as in `base`.
        layer: index of the block.
        inputs, outputs: n and m.
        transposed: the weight is stored [n, m].
    """

    path: str
    stored: str
    role: str
    layer: int
    inputs: int
    outputs: int
    transposed: bool = False

    @property
    def weight(self) -> str:
        """Return the name of its matrix."""
        return f"{self.stored}.weight"

    @property
    def sizes(self) -> tuple[int, int]:
        """Return n and m."""
        return self.inputs, self.outputs


def linears(spec: ModelSpec) -> dict[str, Linear]:
    """Return the linears of a model's blocks by path, in the order of the modules in memory.

    Experts of a mixture are rows of one parameter in memory, and projections that a network
    replaced are gone: neither is among them.
    """
    replaced = {site.path for site, _ in networks_of(stock_spec(spec), spec.adaptive or {})}
    found = [
        _linear(spec, tensor)
        for tensor in spec.tensors
        if tensor.role in ROLES and tensor.layer is not None and tensor.name.endswith(".weight")
    ]
    order = registry.FAMILIES[spec.model_type].order
    if order:
        found.sort(key=lambda linear: (linear.layer, order.index(linear.role)))
    return {linear.path: linear for linear in found if linear.path not in replaced}


def _linear(spec: ModelSpec, tensor: TensorSpec) -> Linear:
    stored = tensor.name.removesuffix(".weight")
    rows, columns = reversed(tensor.shape) if tensor.transposed else tensor.shape
    family = registry.FAMILIES[spec.model_type]
    assert tensor.layer is not None
    path = _elsewhere(family.site, tensor.role)
    prefixed = "prefixed" in family.architectures[spec.architecture]
    if path:
        path = path.format(p=family.prefix if prefixed else "", layer=tensor.layer)
    else:
        bare = prefixed and not stored.startswith(family.prefix)
        path = (family.prefix if bare else "") + stored
    return Linear(
        path=path,
        stored=stored,
        role=tensor.role,
        layer=tensor.layer,
        inputs=columns,
        outputs=rows,
        transposed=tensor.transposed,
    )


def _elsewhere(site: Site | None, role: str) -> str:
    """Return the path of a linear that files call otherwise; "" for none."""
    if site is None:
        return ""
    child = site.children.get(role)
    return site.attention.get(role, "") if child is None else f"{site.path}.{child}"


def outer_linears(spec: ModelSpec) -> tuple[str, ...]:
    """Return the paths of linears outside blocks: heads, poolers, classifiers."""
    # the head of a decoder has this name in memory, whatever it is called on disk
    found = ["lm_head"] if spec.kind == "decoder" else []
    found += [t.name.removesuffix(".weight") for t in spec.tensors if t.role in _OUTER]
    return tuple(dict.fromkeys(found))


def block_of(path: str) -> str:
    """Return the path of the block a linear is in: up to its first number; "" for no block."""
    found = _BLOCK.match(path)
    return "" if found is None else found.group()


def is_named(path: str, name: str) -> bool:
    """Tell whether a module is named by an entry of PEFT's `target_modules`."""
    return path == name or path.endswith(f".{name}")


def feedforward(spec: ModelSpec, paths: Sequence[str]) -> list[str]:
    """Return those of the linears whose input "ia3" scales: what reads hidden units."""
    known = linears(spec)
    return [path for path in paths if known[path].role in DOWN]


def sites_of(
    config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]], *, hidden: int = 0
) -> dict[str, dict[str, Any]]:
    """Return the slots of `config.adaptive.sites` that an adapter_config.json means.

    Args:
        config: num_experts, r, lora_alpha, scaling, experts_kind, share, feedforward_modules,
            router and select, as adapter_config.json has them.
        linears: path -> (n, m) of every adapted linear, in the order of the modules.
        hidden: d, what a router that is read by "layer" or "shared" has for its width.

    Returns:
        By path, {"linear": {"adapters", "router", "select"}}; see `modeling.adaptive_schema`.
    """
    owners = _owners(config["router"], list(linears))
    return {
        path: {
            "linear": {
                "adapters": _adapters(config, path, sizes),
                "router": _router(config["router"], owners[path], hidden, sizes[0]),
                "select": dict(config["select"]),
            }
        }
        for path, sizes in linears.items()
    }


def _owners(router: Mapping[str, Any], paths: Sequence[str]) -> dict[str, str | None]:
    """Return the linear that holds the router of each; None where each has its own, or none."""
    reads = router.get("reads", "module")
    if router["kind"] == "none" or reads == "module":
        return dict.fromkeys(paths)
    first: dict[str, str] = {}
    found: dict[str, str | None] = {}
    for path in paths:
        found[path] = first.setdefault(block_of(path) if reads == "layer" else "", path)
    return found


def _adapters(config: Mapping[str, Any], path: str, sizes: tuple[int, int]) -> dict[str, Any]:
    inputs, outputs = sizes
    common = {"count": int(config["num_experts"]), "input": inputs, "output": outputs}
    if config.get("experts_kind", LORA) == IA3:
        on = "input" if _is_scaled(path, config.get("feedforward_modules") or ()) else "output"
        return {"kind": IA3, **common, "on": on}
    scaling = config.get("scaling")
    if scaling is None:
        scaling = config["lora_alpha"] / config["r"]
    return {
        "kind": LORA,
        **common,
        "rank": int(config["r"]),
        "share": config.get("share"),
        "scaling": scaling,
    }


def _is_scaled(path: str, wanted: str | Sequence[str]) -> bool:
    """Tell whether a linear is among modules named as PEFT does: ends of paths, or an
    expression."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(is_named(path, name) for name in wanted)


def _router(
    router: Mapping[str, Any], owner: str | None, hidden: int, inputs: int
) -> dict[str, Any]:
    if router["kind"] == "none":
        return {"kind": "none"}
    return {
        "kind": "linear",
        "reads": router.get("reads", "module"),
        "score": router.get("score", "dot"),
        "norm": router.get("norm", "none"),
        "scale": router.get("scale", 1.0),
        "of": owner,
        "input": inputs if owner is None else hidden,
    }


def shapes_of(path: str, slot: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors a linear's adapters and router have, by their names after the linear's.

    Args:
        path: of the linear.
        slot: its "linear" slot.
    """
    adapters, router = slot["adapters"], slot["router"]
    count, inputs, outputs = (adapters[name] for name in ("count", "input", "output"))
    found: dict[str, tuple[int, ...]]
    if adapters["kind"] == LORA:
        rank, first = adapters["rank"], 1 if adapters.get("share") == "a" else count
        found = {"adapters.a": (first, rank, inputs), "adapters.b": (count, outputs, rank)}
    else:
        found = {"adapters.vectors": (count, inputs if adapters["on"] == "input" else outputs)}
    if router["kind"] == "linear" and router.get("of") in (None, path):
        reads = inputs if router["reads"] == "module" else router["input"]
        found["router.weight"] = (count, reads)
    return found


def adapted(
    spec: ModelSpec, adaptive: Mapping[str, object]
) -> Iterator[tuple[Linear, dict[str, Any]]]:
    """Yield the linears of an adaptive checkpoint that have routed adapters, with their slots.

    Args:
        spec: of the stock model underneath.
        adaptive: `config.adaptive`.

    Raises:
        SourceError: a slot is malformed, or lies where the model has no linear.
    """
    sites = adaptive.get("sites")
    slots = {
        path: found["linear"]
        for path, found in (sites if isinstance(sites, dict) else {}).items()
        if isinstance(found, dict)
        and isinstance(found.get("linear"), dict)
        and "adapters" in found["linear"]
    }
    known = linears(spec) if slots else {}
    for path in slots:
        if path not in known:
            raise SourceError(
                f"adaptive.sites names {escape(path, 80)!r}, where a {spec.architecture} has no "
                "linear",
                where=WHERE,
            )
    for path, linear in known.items():
        if path in slots:
            yield linear, _checked(linear, slots[path], set(slots))


def _checked(linear: Linear, slot: dict[str, Any], paths: set[str]) -> dict[str, Any]:
    try:
        usable = _is_usable(linear, slot, paths)
    except (KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise SourceError(
            f"adaptive.sites[{escape(linear.path, 80)}].linear is not usable",
            where=WHERE,
            expected=f"adapters of {linear.inputs} inputs and {linear.outputs} outputs, router and "
            "select",
        )
    return slot


def _is_usable(linear: Linear, slot: dict[str, Any], paths: set[str]) -> bool:
    """Return whether a slot says all that it must; raises what its types do otherwise."""
    adapters, router = slot["adapters"], slot["router"]
    shapes = shapes_of(linear.path, slot)
    numbers = [size for shape in shapes.values() for size in shape]
    return (
        (adapters["input"], adapters["output"]) == linear.sizes
        and adapters["kind"] in (LORA, IA3)
        and router["kind"] in ("none", "linear")
        and all(type(size) is int and 0 < size < 2**31 for size in numbers)
        and (router.get("of") is None or router["of"] in paths)
        and isinstance(slot["select"]["rule"], str)
    )


def adapter_tensors(spec: ModelSpec, adaptive: Mapping[str, object]) -> Iterator[TensorSpec]:
    """Yield the tensors routed adapters add to a checkpoint; args and errors as for `adapted`."""
    for linear, slot in adapted(spec, adaptive):
        for name, shape in shapes_of(linear.path, slot).items():
            yield TensorSpec(
                name=f"{linear.stored}.{name}",
                role=_TENSORS.get(name.removeprefix("adapters."), "adapter_router"),
                shape=shape,
                layer=linear.layer,
            )


def active_adapters(spec: ModelSpec) -> dict[str, float]:
    """Return, by tensor, the share of adapters a token runs as configured; all of them where that
    depends on the token."""
    if spec.adaptive is None:
        return {}
    found = {}
    for linear, slot in adapted(stock_spec(spec), spec.adaptive):
        count, select = slot["adapters"]["count"], slot["select"]
        chosen = min(select["k"], count) if select["rule"] == "top-k" else count
        for name, shape in shapes_of(linear.path, slot).items():
            if name.startswith("adapters.") and shape[0] == count:
                found[f"{linear.stored}.{name}"] = chosen / count
    return found
