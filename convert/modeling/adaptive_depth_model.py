"""The part of an adaptive model that is about blocks some tokens skip."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .adaptive_checks import AdaptiveConfigError
from .adaptive_depth_schema import DEPTH_RULES, check_rule
from .adaptive_knobs import DEPTH, Setting


class DepthMixin:
    """What an adaptive model with routed blocks can do."""

    adaptive_runtime: Any

    def adaptive_depth(self) -> dict[str, Any]:
        """Return the blocks that tokens may skip, by path; empty without such."""
        own: Any = self
        return {path: own._at(path) for path in self.adaptive_runtime.routed}

    def set_depth(
        self,
        rule: str | None = None,
        *,
        threshold: float | Mapping[str, float] | None = None,
        capacity: float | Mapping[str, float] | None = None,
    ) -> Setting:
        """Let tokens skip blocks by this rule from now on; as a context manager, until its end.

        Args:
            rule: "all" (none is skipped), "none" (all are), "threshold" (a token runs a block where
                the logit that decides is above), "capacity" (the best share of each sequence, which
                looks ahead: a figure so measured is optimistic); None goes back to what the
                configuration says.
            threshold: of rule "threshold": of all blocks alike but those that nobody runs, or by
                path; of blocks that are not named the configuration's.
            capacity: of rule "capacity", likewise.

        Raises:
            ValueError: no such blocks, unknown rule, or a value out of range.
        """
        runtime = self.adaptive_runtime
        if not runtime.routed:
            raise AdaptiveConfigError("this model has no blocks that tokens may skip")
        before = runtime.kept()
        made = None
        given = {"threshold": threshold, "capacity": capacity}
        given = {name: value for name, value in given.items() if value is not None}
        if rule is not None:
            made = {"rule": rule, **given}
            check_rule("set_depth", made, set(runtime.routed))
        elif given:
            raise AdaptiveConfigError(
                f"set_depth: {', '.join(given)} needs a rule, known: {', '.join(DEPTH_RULES)}"
            )
        runtime.knobs = {path: knob for path, knob in runtime.knobs.items() if path != DEPTH}
        runtime.depth = made
        return Setting(runtime, before)
