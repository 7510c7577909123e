"""Which settings of a model with experts to choose are worth measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Final

import numpy as np

from adaconvert.evaluate.allocation import LEVELS, allocate, sensitivities
from adaconvert.evaluate.calibration_data import CalibrationData
from adaconvert.evaluate.calibration_search import SENSITIVITY_BLOCKS, Evolving, Search
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.candidates import (
    Family,
    ffn_alone,
    of_these_alone,
    per_layer,
    rules_for,
    uniform,
)
from adaconvert.evaluate.evolved import STEPS, Way
from adaconvert.evaluate.null_grid import STORED, WHOLE, NullGrid, NullSite
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import REFERENCE, Grid, Setting, given
from adaconvert.evaluate.whole_compute import chooses, whole_flops
from adaconvert.modeling.adaptive_schema import routed_specs
from adaconvert.planning.evolution import Levels, Vector

_NO_NULLS: Final = "no null experts"
_HELD: Final = "every expert, blocks as configured"
#: rules with one value for all sites, under which each site runs a share of its own.
_COMPARING: Final = ("dynamic-k", "top-p")


class ExpertSearch(Search):
    """One calibration of a model with experts to choose; see `Search`."""

    def __init__(
        self, model: Any, data: CalibrationData, settings: CalibrationSettings, risk: Risk | None
    ) -> None:
        super().__init__(model, data, settings, risk)
        sites = routed_specs(model.config.adaptive)
        self._specs: dict[str, dict[str, Any]] = {
            path: spec for path, spec in sites.items() if chooses(spec)
        }
        self._routes_all = len(self._specs) == len(sites)
        self._nulled = any("mixture" in spec for spec in self._specs.values())
        if self._nulled:
            self.whole_name = self._reference_name = _NO_NULLS

    def matrix(self, shares: Sequence[float]) -> tuple[Floats, Floats, list[str]]:
        """Return computes, rises in loss of every unit and names, the reference first.

        Args:
            shares: of the experts, each by the model's best rule.
        """
        family = self._families()[0]
        settings = [setting for share in shares if (setting := family(share)) is not None]
        parts = (self.data.ordering, self.data.evaluation)
        computes, rows = [self.whole], [np.zeros(self.data.units)]
        with self._phase("measuring", settings, *parts):
            for setting in settings:
                measured = [(part, self._measurer.measure(setting, part.blocks)) for part in parts]
                computes.append(float(np.mean([one.compute for _, one in measured])))
                rows.append(np.concatenate([self._losses.rises(p, one) for p, one in measured]))
        return np.array(computes), np.array(rows), [s.name for s in [REFERENCE, *settings]]

    def _try_all(self) -> None:
        """Measure every setting worth a look on the ordering split."""
        if self.settings.values:
            rule = rules_for(self._specs, self.settings.rules)[0]
            self._try([self._own(given(rule, value)) for value in self.settings.values])
            return
        families = self._families()
        if self._nulled:
            self._try([self._own(STORED)])
        if self._held:
            self._try([self._own(replace(REFERENCE, name=_HELD))])
        self._sweep(families)
        if self.settings.evolves:
            self._evolve(self._evolving())

    def _families(self) -> list[Family]:
        """Return the ways to spend a share of the experts.

        Raises:
            OptionError: no rule can choose.
        """
        rules = rules_for(self._specs, self.settings.rules)
        grid = self._grid
        families = [uniform(grid, rule) for rule in rules]
        if isinstance(grid, NullGrid):
            families += [grid.pooled] if "null" in rules else []
        ffn = [path for path, spec in self._specs.items() if "output" not in spec]
        if isinstance(grid, Grid) and 0 < len(ffn) < len(self._specs):
            families += [ffn_alone(grid, rule, ffn) for rule in rules]
        if self.settings.per_layer:
            families.append(per_layer(grid, rules[0], self._curves, self._costs))
        return [self._of_routed(family) for family in families]

    @cached_property
    def _grid(self) -> Grid | NullGrid:
        """Return what makes settings, from scores on the ordering split."""
        if self._nulled:
            # margins depend on what the blocks before ran, and most settings run less than all
            scores = self._scores(self._own(STORED))
            sites = self._model.adaptive_sites()
            return NullGrid({path: NullSite.of(sites[path]) for path in self._specs}, scores)
        experts = {path: int(spec["experts"]["count"]) for path, spec in self._specs.items()}
        return Grid(experts, self._scores(self._with_held(REFERENCE)))

    def _scores(self, setting: Setting) -> dict[str, Floats]:
        """Return a sample of the routers' scores at a setting; in blocks that every token skips,
        those with every block run."""
        blocks = self.data.ordering.blocks
        found = self._measurer.scores(blocks, select=setting.select)
        if all(path in found for path in self._specs):
            return found
        free = {path: own for path, own in setting.select.items() if path not in self._held}
        return {**self._measurer.scores(blocks, select=free), **found}

    def _of_routed(self, family: Family) -> Family:
        """Return a family that leaves sites nothing can choose at with every expert on."""

        def own(share: float) -> Setting | None:
            setting = family(share)
            return None if setting is None else self._own(setting)

        return own

    def _own(self, setting: Setting) -> Setting:
        """Return a setting that leaves every other site, and what is not calibrated, as it is."""
        own = setting if self._routes_all else of_these_alone(setting, self._specs)
        return self._with_held(own)

    @property
    def _costs(self) -> dict[str, float]:
        """Return the FLOPs of all experts of each site for one token."""
        return {path: whole_flops(spec) for path, spec in self._specs.items()}

    @cached_property
    def _curves(self) -> dict[str, list[tuple[float, float]]]:
        """Return how the loss rises as each site alone runs fewer experts, by the first rule."""
        rule, grid = rules_for(self._specs, self.settings.rules)[0], self._grid
        blocks = self.data.ordering.blocks[:SENSITIVITY_BLOCKS]

        def increase(shares: Mapping[str, float]) -> float:
            setting = grid.per_site(rule, shares, name=f"{rule}, one layer")
            # a count that rounds to all of them changes nothing
            own = REFERENCE if setting is None else self._own(setting)
            return self._mean_rise(self._measurer.measure(own, blocks), blocks)

        levels = None
        if isinstance(grid, NullGrid):
            levels = {path: grid.levels(path, LEVELS) for path in self._specs}
        total = len(LEVELS) * len(self._specs) * len(blocks)
        with self._shown(total, "layers"):
            return sensitivities(list(self._specs), increase, levels)

    # -- evolution

    def _evolving(self) -> Evolving:
        """Return the shares of sites as levels, of the rule that suits best.

        Levels move between sites whose levels cost the same.
        """
        rule, grid = rules_for(self._specs, self.settings.rules)[0], self._grid
        paths = list(self._specs)
        high = [self._wholes[path] if rule == "top-k" else STEPS for path in paths]
        low = [self._lowest(path, whole) for path, whole in zip(paths, high, strict=True)]
        costs = list(self._costs.values())
        units = [(cost, whole) for cost, whole in zip(costs, high, strict=True)]
        kinds = sorted(set(units))
        levels = Levels(
            low=tuple(low), high=tuple(high), groups=tuple(kinds.index(unit) for unit in units)
        )

        def setting(vector: Vector) -> Setting | None:
            shares = {p: n / whole for p, n, whole in zip(paths, vector, high, strict=True)}
            share = share_of(vector)
            of = WHOLE if isinstance(grid, NullGrid) else "the experts"
            name = f"{rule} per layer by evolution, {share:.0%} of {of}"
            found = grid.per_site(rule, shares, name=name, share=share)
            return None if found is None else self._own(found)

        def share_of(vector: Vector) -> float:
            return float(np.average(np.array(vector) / np.array(high), weights=costs))

        def near(shares: Mapping[str, float], even: Vector) -> Vector:
            wanted = [shares[path] * whole for path, whole in zip(paths, high, strict=True)]
            return levels.nearest(wanted, even)

        def greedy(even: Vector) -> Vector | None:
            share = share_of(even)
            found = allocate(self._curves, self._costs, [share]).get(share)
            return None if found is None else near(found, even)

        def alike(even: Vector) -> Vector:
            """Return the levels that one value for all sites gives."""
            assert isinstance(grid, Grid)
            return near(grid.shares(grid.uniform(rule, share_of(even))), even)

        compares = rule in _COMPARING and isinstance(grid, Grid)
        ways: list[Way] = [greedy, alike] if compares else [greedy]
        return Evolving(levels=levels, setting=setting, ways=ways)

    @property
    def _wholes(self) -> dict[str, int]:
        """Return how many experts a token may run at each site."""
        grid = self._grid
        if isinstance(grid, NullGrid):
            return {path: site.source_k for path, site in grid.sites.items()}
        return grid.experts

    def _lowest(self, path: str, high: int) -> int:
        """Return the lowest level of a site: one expert, or what runs without any choice."""
        if not isinstance(self._grid, NullGrid) or high == self._wholes[path]:
            return max(1, math.ceil(high / self._wholes[path]))
        least = self._grid.levels(path, (0.0,))
        return math.ceil(least[0] * high) if least else high
