"""What a finished `d2dmoe` run says: the conversion, and how good each layer's router is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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
    """

    conversion: Converted
    routers: Mapping[str, RouterQuality]

    @classmethod
    def of(cls, conversion: Converted) -> D2dmoeResult:
        """Return the result, with the routers' quality as the checkpoint states it."""
        config = json.loads((conversion.destination / "config.json").read_text("utf-8"))
        found = {
            path: RouterQuality(**slots["ffn"]["router"]["quality"])
            for path, slots in sorted(config["adaptive"]["sites"].items(), key=_in_order)
            if "quality" in slots.get("ffn", {}).get("router", {})
        }
        return cls(conversion=conversion, routers=found)

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        routers = {path: quality.to_json() for path, quality in self.routers.items()}
        return {**self.conversion.to_json(), "routers": routers}

    def lines(self) -> list[str]:
        """Return the result as text, one line per router."""
        table = [f"{path:<28}{quality.line()}" for path, quality in self.routers.items()]
        return [*table, *([""] if table else []), *self.conversion.lines()]


def _in_order(site: tuple[str, object]) -> list[int]:
    """Return the numbers in a module path, so that block 10 comes after block 9."""
    return [int(part) for part in site[0].split(".") if part.isdigit()]
