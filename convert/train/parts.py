"""Which parameters a fine-tune trains, by the names users give to parts of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

#: part -> what a component of a parameter's name looks like in stock mixtures and ours.
_COMPONENTS: Mapping[str, re.Pattern[str]] = {
    "router": re.compile(r"router|gate|shared_expert_gate|null_experts"),
    "adapters": re.compile(r"adapters?|lora_[AB]|lora_.*"),
    "exits": re.compile(r"exits?|exit_heads?"),
    "experts": re.compile(r"experts|shared_experts?|shared_mlp"),
}
#: routers and adapters of blocks that tokens may skip; they count as those.
DEPTH = "depth"
PARTS = (*_COMPONENTS, DEPTH, "all")
#: GraniteMoE keeps its experts beside the router.
_GRANITE = re.compile(r"block_sparse_moe\.(input|output)_linear\.")
#: what PEFT puts into the names of what it wraps, and the names it gives to adapters.
_WRAPPED = ".base_layer"
_ADAPTER = re.compile(r"\.lora_[AB]\.default\.weight$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What is trained.

    Attributes:
        trained, frozen: numbers of parameters.
        by_part: trained parameters by part, "rest" for what has no name of its own.
        routers: names of the trained router parameters.
    """

    trained: int
    frozen: int
    by_part: Mapping[str, int]
    routers: frozenset[str]


def part_of(name: str, sites: Sequence[str] = ()) -> str:
    """Return the part a parameter belongs to.

    Args:
        name: in the model.
        sites: paths of adaptive feed-forward sites, whose matrices are experts.
    """
    components = name.split(".")
    for part, pattern in _COMPONENTS.items():
        if any(pattern.fullmatch(component) for component in components[:-1]):
            return part
    inside = any(name.startswith(f"{site}.") for site in sites)
    return "experts" if inside or _GRANITE.search(name) else "rest"


def sites_of(model: Any) -> tuple[str, ...]:
    """Return the paths of a model's adaptive feed-forward sites; none for other models."""
    return tuple(model.adaptive_sites()) if hasattr(model, "adaptive_sites") else ()


def is_depth(name: str) -> bool:
    """Return whether a parameter belongs to what lets tokens skip a block."""
    return DEPTH in name.split(".")[:-1]


def plain_name(name: str) -> str:
    """Return the name a parameter had before adapters were put on."""
    return name.replace(_WRAPPED, "")


def is_adapter(name: str) -> bool:
    """Return whether a parameter is a factor of an adapter put on for training."""
    return _ADAPTER.search(name) is not None


def choose(model: Any, wanted: Sequence[str]) -> Chosen:
    """Return what is trained; every other parameter of `model` asks for no gradient afterwards.

    Adapters put on for training are trained always; "all" means them alone where there are any.

    Raises:
        OptionError: a part or expression matches nothing, or a matrix that has an adapter.
    """
    sites = sites_of(model)
    plain = {name: plain_name(name) for name, _ in model.named_parameters()}
    parts = {name: part_of(own, sites) for name, own in plain.items()}
    names = {name for name in parts if is_adapter(name)}
    if names:
        wanted = [item for item in wanted if item != "all"]
    for item in wanted:
        found = {name for name, own in plain.items() if _fits(item, own, parts[name])}
        _check_found(item, found, parts)
        names |= found
    counts: dict[str, int] = {}
    frozen = 0
    for name, parameter in model.named_parameters():
        trained = name in names and parameter.is_floating_point()
        parameter.requires_grad_(trained)
        if trained:
            counts[parts[name]] = counts.get(parts[name], 0) + parameter.numel()
        else:
            frozen += parameter.numel()
    return Chosen(
        trained=sum(counts.values()),
        frozen=frozen,
        by_part=dict(sorted(counts.items())),
        routers=frozenset(name for name in names if parts[name] == "router"),
    )


def matching(model: Any, wanted: Sequence[str]) -> frozenset[str]:
    """Return the names of the parameters that `wanted` but "all" name."""
    sites = sites_of(model)
    return frozenset(
        name
        for name, _ in model.named_parameters()
        for item in wanted
        if item != "all" and _fits(item, plain_name(name), part_of(plain_name(name), sites))
    )


def _check_found(item: str, found: Collection[str], parts: Mapping[str, str]) -> None:
    if not found:
        held = sorted(set(parts.values()) - {"rest"})
        held += [DEPTH] if any(map(is_depth, parts)) else []
        raise OptionError(
            "matches no parameter",
            where=f"--train {escape(item)}",
            expected=f"all, {', '.join([*held, 'or a regular expression'])}",
            hint=f"A parameter is called '{next(iter(parts))}', for example.",
        )
    wrapped = (name for name in sorted(found) if _WRAPPED in name and not is_adapter(name))
    adapted = next((plain_name(name) for name in wrapped if not name.endswith(".bias")), None)
    if adapted is not None:
        raise OptionError(
            f"matches '{adapted}', which gets an adapter in its place",
            where=f"--train {escape(item)}",
            hint="Name other parts, or leave it out of --lora-targets.",
        )


def _fits(item: str, name: str, part: str) -> bool:
    if item == "all" or item == part or (item == DEPTH and is_depth(name)):
        return True
    return item not in PARTS and re.search(item, name) is not None
