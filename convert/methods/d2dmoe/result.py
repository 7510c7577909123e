"""What a finished `d2dmoe` run says: the conversion, and how good each layer's router is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from adaconvert.methods.d2dmoe.distil import DistilQuality, NetworkQuality
from adaconvert.methods.d2dmoe.quality import RouterQuality


class Converted(Protocol):
    """What is known of a finished conversion."""

    @property
    def destination(self) -> Path: ...

    def to_json(self) -> dict[str, object]: ...

    def lines(self) -> list[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class D2dmoeResult:
    """A finished run.

    Attributes:
        conversion: the conversion's own result.
        routers: by module path, how good the fitted router is; empty when none was fitted.
        networks: by module path, how good each network in place of a projection is.
    """

    conversion: Converted
    routers: Mapping[str, RouterQuality]
    networks: Mapping[str, NetworkQuality] = field(default_factory=dict)

    @classmethod
    def of(cls, conversion: Converted) -> D2dmoeResult:
        """Return the result, with the routers' quality as the checkpoint states it."""
        config = json.loads((conversion.destination / "config.json").read_text("utf-8"))
        found = {
            path: RouterQuality(**slots["ffn"]["router"]["quality"])
            for path, slots in sorted(config["adaptive"]["sites"].items(), key=_in_order)
            if "quality" in slots.get("ffn", {}).get("router", {})
        }
        return cls(conversion=conversion, routers=found, networks=_networks(config))

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        routers = {path: quality.to_json() for path, quality in self.routers.items()}
        networks = {path: quality.to_json() for path, quality in self.networks.items()}
        return {**self.conversion.to_json(), "routers": routers, "networks": networks}

    def lines(self) -> list[str]:
        """Return the result as text, one line per router."""
        both: dict[str, RouterQuality | NetworkQuality] = {**self.routers, **self.networks}
        table = [f"{path:<28} {quality.line()}" for path, quality in both.items()]
        return [*table, *([""] if table else []), *self.conversion.lines()]


def _networks(config: Mapping[str, Any]) -> dict[str, NetworkQuality]:
    """Return the quality of networks in place of projections, as config.json states it."""
    found = {}
    for path, slots in sorted(config["adaptive"]["sites"].items(), key=_in_order):
        mlp = (slots.get("linear") or {}).get("mlp")
        if mlp is not None:
            own, router = mlp.get("quality"), mlp["router"].get("quality")
            found[path] = NetworkQuality(
                distilled=None if own is None else DistilQuality(**own),
                router=None if router is None else RouterQuality(**router),
            )
    return found


def _in_order(site: tuple[str, object]) -> list[int]:
    """Return the numbers in a module path, so that block 10 comes after block 9."""
    return [int(part) for part in site[0].split(".") if part.isdigit()]
