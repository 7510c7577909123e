"""What methods write that add parts beside those of a model, adaptive or not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.methods.sources import Described
from adaconvert.planning.estimate import reference


def config_beside(item: Described, sites: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Return config.json of a model with more slots; an adaptive one keeps its sites and exits, and
    loses a table that would be stale.

    Args:
        item: the source.
        sites: path -> kind of slot -> what it holds; a slot of the same kind is replaced.
    """
    if item.spec.adaptive is None:
        return adaptive.config_with(item.spec, sites, reference(item.spec, frozenset()))
    found: dict[str, Any] = copy.deepcopy(dict(item.source.config))
    found["auto_map"] = adaptive.auto_map(item.spec)
    known = found["adaptive"]
    known["calibration"] = None
    for path, slots in sites.items():
        known["sites"].setdefault(path, {}).update(slots)
    return found
