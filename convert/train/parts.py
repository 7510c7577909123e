"""Which parameters a fine-tune trains, by the names users give to parts of a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

#: part -> what a component of a parameter's name looks like in stock mixtures and ours.
_COMPONENTS: Mapping[str, re.Pattern[str]] = {
    "router": re.compile(r"router|gate|shared_expert_gate"),
    "adapters": re.compile(r"adapters?|lora_[AB]|lora_.*"),
    "exits": re.compile(r"exits?|exit_heads?"),
    "experts": re.compile(r"experts|shared_experts?|shared_mlp"),
}
PARTS = (*_COMPONENTS, "all")
#: GraniteMoE keeps its experts beside the router.
_GRANITE = re.compile(r"block_sparse_moe\.(input|output)_linear\.")


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


def choose(model: Any, wanted: Sequence[str]) -> Chosen:
    """Return what is trained; every other parameter of `model` asks for no gradient afterwards.

    Raises:
        OptionError: a part or expression matches nothing.
    """
    sites = tuple(model.adaptive_sites()) if hasattr(model, "adaptive_sites") else ()
    parts = {name: part_of(name, sites) for name, _ in model.named_parameters()}
    names: set[str] = set()
    for item in wanted:
        found = set(_matching(item, parts))
        if not found:
            held = sorted(set(parts.values()) - {"rest"})
            raise OptionError(
                "matches no parameter",
                where=f"--train {escape(item)}",
                expected=f"all, {', '.join([*held, 'or a regular expression'])}",
                hint=f"A parameter is called '{next(iter(parts))}', for example.",
            )
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


def _matching(item: str, parts: Mapping[str, str]) -> Iterator[str]:
    for name, part in parts.items():
        if item == "all" or item == part or (item not in PARTS and re.search(item, name)):
            yield name
