"""A stored setting of a model, set for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_knobs import DEPTH, EXITS, has_exits
from adaconvert.modeling.adaptive_schema import routed_layers, routed_specs


@contextmanager
def applied(model: Any, select: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Run the body with a stored selection.

    Raises:
        OptionError: a value means nothing at a site.
    """
    with ExitStack() as stack:
        try:
            if has_exits(model.config.adaptive):
                rule = dict(select.get(EXITS) or {"thresholds": None})
                stack.enter_context(model.set_exits(rule.pop("thresholds"), **rule))
            if routed_layers(model.config.adaptive):
                skip = dict(select.get(DEPTH) or {"rule": "all"})
                stack.enter_context(model.set_depth(skip.pop("rule"), **skip))
            routed = bool(routed_specs(model.config.adaptive))
            for path in sorted(select, key=lambda path: path != "*"):
                if path in (EXITS, DEPTH) or (path == "*" and not routed):
                    continue
                own = dict(select[path])
                sites = None if path == "*" else [path]
                stack.enter_context(model.set_select(own.pop("rule"), sites=sites, **own))
        except ValueError as error:
            raise OptionError(str(error), where="calibration") from error
        yield
