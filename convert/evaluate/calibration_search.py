"""Measures settings on the splits of the calibration data, tests them, and decides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from adaconvert.errors import OptionError
from adaconvert.evaluate.allocation import LEVELS, sensitivities
from adaconvert.evaluate.calibration_data import CalibrationData, Part, too_small
from adaconvert.evaluate.calibration_losses import UnitLosses, out_of_reach
from adaconvert.evaluate.calibration_result import Row
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.candidates import (
    Family,
    between,
    coarse,
    ffn_alone,
    of_these_alone,
    per_layer,
    rules_for,
    uniform,
)
from adaconvert.evaluate.null_grid import STORED, NullGrid, NullSite
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import ALL, REFERENCE, Grid, Measured, Measurer, Setting, given
from adaconvert.evaluate.testing_sequence import (
    Certified,
    best_within,
    certify,
    frontier,
)
from adaconvert.evaluate.whole_compute import chooses, whole_compute, whole_flops
from adaconvert.modeling.adaptive_schema import routed_specs
from adaconvert.progress import Bar, bar

#: blocks a site's sensitivity is measured on.
SENSITIVITY_BLOCKS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The table, by rising compute, the position of the chosen row, and what to say about it."""

    rows: tuple[Row, ...]
    chosen: int | None
    notes: tuple[str, ...] = ()


class Search:
    """One calibration of one model on one division of the data.

    Args:
        model: an adaptive model, in evaluation mode.
        data: the splits.
        settings: what is asked for.
        risk: what is to be promised, None for nothing.

    Attributes:
        tried: every setting that was measured on the ordering split.
        whole: compute of running every expert, as a fraction of the reference's; networks in place
            of projections cost a little more or less than the matrices did.
    """

    def __init__(
        self, model: Any, data: CalibrationData, settings: CalibrationSettings, risk: Risk | None
    ) -> None:
        self.data = data
        self.settings = settings
        self.risk = risk
        self.tried: list[Setting] = []
        sites = routed_specs(model.config.adaptive)
        self.whole = whole_compute(model.config.adaptive)
        self._specs: dict[str, dict[str, Any]] = {
            path: spec for path, spec in sites.items() if chooses(spec)
        }
        self._nulled = any("mixture" in spec for spec in self._specs.values())
        self.whole_name = _NO_NULLS if self._nulled else "every expert"
        self._reference_name = _NO_NULLS if self._nulled else REFERENCE.name
        self._model = model
        self._routes_all = len(self._specs) == len(sites)
        self._measurer = Measurer(model, data.blocks, **self._given())
        self._ordering: list[Measured] = []

    def _given(self) -> dict[str, Any]:
        """Return what a measurer is told besides model and blocks."""
        data = self.data
        return {
            "batch": self.settings.batch_size,
            "names": data.names,
            "hidden": data.hidden,
            "labels": data.labels,
        }

    def run(self) -> Found:
        """Return the table and the choice.

        Raises:
            DataError: the data are too small to certify what they suggest; says how many would do.
            OptionError: no rule can choose, nothing is as cheap as the budget, or nothing keeps a
                limit the reference itself may break.
            SourceError: a loss is not finite.
        """
        self._try_all()
        if self.risk is not None and not self.risk.compares:
            self._try([REFERENCE])
        found = None if self.risk is None else self._test(self.risk)
        settings, rows = self._rows(found)
        if found is not None:
            cheapest = None if found.cheapest == self._whole_at else found.cheapest
            chosen = settings.index(cheapest)
            sure = cheapest is not None
            notes = () if sure else (f"{_UNCERTIFIED} {self.whole_name}",)
            return Found(rows=rows, chosen=chosen, notes=notes)
        budget = self.settings.budget
        best = None if budget is None else self._within(budget, settings, rows)
        return Found(rows=rows, chosen=best)

    def _within(self, budget: float, settings: Sequence[int | None], rows: Sequence[Row]) -> int:
        """Return the position of the best row within a budget, judged by the ordering split.

        Of the evaluation split only the compute counts, so that no row above the budget is taken.

        Raises:
            OptionError: none is that cheap.
        """
        computes, risks = self._computes(), self._ordering_risks()
        costs = [
            row.compute if at is None else max(row.compute, computes[at])
            for at, row in zip(settings, rows, strict=True)
        ]
        best = best_within(costs, [0.0 if at is None else risks[at] for at in settings], budget)
        if best is None:
            raise OptionError(
                "nothing this model can do is that cheap",
                where="--budget",
                expected=f"{math.ceil(min(costs) * 1000) / 1000:.3f} or more",
                found=budget,
            )
        return best

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

    # -- what is tried

    def _try_all(self) -> None:
        """Measure every setting worth a look on the ordering split."""
        if self.settings.values:
            rule = rules_for(self._specs, self.settings.rules)[0]
            self._try([self._own(given(rule, value)) for value in self.settings.values])
            return
        families = self._families()
        if self._nulled:
            self._try([self._own(STORED)])
        for family in families:
            self._try(coarse(family))
        for family in families:
            self._try(between(family, self._fits, first=self.risk is not None))

    def _families(self) -> list[Family]:
        """Return the ways to spend a share of the experts.

        Raises:
            OptionError: no rule can choose.
        """
        rules = rules_for(self._specs, self.settings.rules)
        grid = self._grid()
        families = [self._of_routed(uniform(grid, rule)) for rule in rules]
        if isinstance(grid, NullGrid):
            families += [self._of_routed(grid.pooled)] if "null" in rules else []
        ffn = [path for path, spec in self._specs.items() if "output" not in spec]
        if isinstance(grid, Grid) and 0 < len(ffn) < len(self._specs):
            families += [ffn_alone(grid, rule, ffn) for rule in rules]
        if self.settings.per_layer:
            cost = {path: whole_flops(spec) for path, spec in self._specs.items()}
            curves = self._curves(grid, rules[0])
            families.append(self._of_routed(per_layer(grid, rules[0], curves, cost)))
        return families

    def _grid(self) -> Grid | NullGrid:
        """Return what makes settings, from scores on the ordering split."""
        blocks = self.data.ordering.blocks
        if self._nulled:
            # margins depend on what the blocks before ran, and most settings run less than all
            scores = self._measurer.scores(blocks, select=self._own(STORED).select)
            sites = self._model.adaptive_sites()
            return NullGrid({path: NullSite.of(sites[path]) for path in self._specs}, scores)
        experts = {path: int(spec["experts"]["count"]) for path, spec in self._specs.items()}
        return Grid(experts, self._measurer.scores(blocks))

    def _of_routed(self, family: Family) -> Family:
        """Return a family that leaves sites nothing can choose at with every expert on."""

        def own(share: float) -> Setting | None:
            setting = family(share)
            return None if setting is None else self._own(setting)

        return own

    def _own(self, setting: Setting) -> Setting:
        return setting if self._routes_all else of_these_alone(setting, self._specs)

    def _curves(self, grid: Grid | NullGrid, rule: str) -> dict[str, list[tuple[float, float]]]:
        """Return how the loss rises as each site alone runs fewer experts."""
        blocks = self.data.ordering.blocks[:SENSITIVITY_BLOCKS]
        weights = self._losses.weights(blocks)

        def increase(shares: Mapping[str, float]) -> float:
            setting = grid.per_site(rule, shares, name=f"{rule}, one layer")
            # a count that rounds to all of them changes nothing
            own = REFERENCE if setting is None else self._own(setting)
            rise = self._measurer.measure(own, blocks).loss - self._losses.reference(blocks)
            return float(np.average(rise, weights=weights))

        levels = None
        if isinstance(grid, NullGrid):
            levels = {path: grid.levels(path, LEVELS) for path in self._specs}
        total = len(LEVELS) * len(self._specs) * len(blocks)
        with self._shown(total, "layers"):
            return sensitivities(list(self._specs), increase, levels)

    def _fits(self, setting: Setting) -> bool:
        """Return whether a setting that was tried keeps to what was asked for."""
        at = next(n for n, tried in enumerate(self.tried) if tried.select == setting.select)
        if self.risk is not None:
            return self._ordering_risks()[at] <= self.risk.limit
        budget = self.settings.budget
        return budget is not None and self._ordering[at].compute <= budget

    def _try(self, settings: Sequence[Setting]) -> None:
        """Measure settings on the ordering split, those left out that were measured already."""
        fresh: list[Setting] = []
        for setting in settings:
            if all(setting.select != known.select for known in [*self.tried, *fresh]):
                fresh.append(setting)
        with self._phase("ordering", fresh, self.data.ordering):
            for setting in fresh:
                self._ordering.append(self._measurer.measure(setting, self.data.ordering.blocks))
                self.tried.append(setting)

    # -- losses

    def _phase(self, name: str, settings: Sequence[object], *parts: Part) -> Bar:
        return self._shown(len(settings) * sum(len(part.blocks) for part in parts), name)

    def _shown(self, total: int, name: str) -> Bar:
        shown = bar(total, name, "blocks", enabled=self.settings.progress)
        self._measurer.shown = shown
        return shown

    @property
    def _losses(self) -> UnitLosses:
        return UnitLosses(measurer=self._measurer, risk=self.risk)

    @property
    def _whole_at(self) -> int | None:
        """Return the position of the reference among what was tried, None where it was not."""
        return next((at for at, s in enumerate(self.tried) if s.select == ALL), None)

    def _computes(self) -> list[float]:
        found = [measured.compute for measured in self._ordering]
        if self._whole_at is not None:
            found[self._whole_at] = self.whole
        return found

    def _ordering_risks(self) -> list[float]:
        return [float(self._losses.risks(self.data.ordering, m).mean()) for m in self._ordering]

    # -- testing

    def _test(self, risk: Risk) -> Certified:
        """Return what the testing split certifies, of the settings cheaper than the reference and
        of the reference itself where that can break the limit.

        Raises:
            DataError: more data would certify something.
            OptionError: nothing can be certified, the reference included.
        """
        cheaper = self._cheaper()
        ordering = [self._losses.risks(self.data.ordering, self._ordering[at]) for at in cheaper]
        part = self.data.testing

        def losses(candidate: int) -> Floats:
            measured = self._measurer.measure(self.tried[cheaper[candidate]], part.blocks)
            return self._losses.risks(part, measured)

        with self._phase("testing", cheaper, part):
            found = certify([self._computes()[at] for at in cheaper], ordering, losses, risk)
        if not found.passed:
            self._refuse_if_too_small(risk, ordering)
            if not risk.compares:
                best = min(float(one.mean()) for one in ordering)
                raise out_of_reach(risk, self.settings.promise, best, self._reference_name)
        return found.renamed(cheaper)

    def _cheaper(self) -> list[int]:
        """Return what was tried and costs less than the reference, and that if it was tried."""
        whole, computes = self._whole_at, self._computes()
        return [at for at, cost in enumerate(computes) if cost < self.whole or at == whole]

    def _refuse_if_too_small(self, risk: Risk, ordering: Sequence[Floats]) -> None:
        """Return only when more data would not certify anything cheaper than the reference either.

        Raises:
            DataError: they would; says about how much.
        """
        guesses = [risk.needed(float(one.mean()), float(one.std())) for one in ordering]
        needed = min((guess for guess in guesses if guess is not None), default=None)
        if needed is None or needed <= self.data.testing.units:
            return
        what = f"the most careful setting within a limit of {risk.limit:g}"
        raise too_small(self.data, needed, self.settings.shares, self.settings.promise, what)

    # -- the table

    def _rows(self, found: Certified | None) -> tuple[list[int | None], tuple[Row, ...]]:
        """Return frontier, certified settings and reference by rising compute, and what they are.

        A setting is its position among those tried, None for the reference.
        """
        cheaper = self._cheaper()
        computes, risks = self._computes(), self._ordering_risks()
        best = frontier([computes[at] for at in cheaper], [risks[at] for at in cheaper])
        kept = sorted({cheaper[at] for at in best} | set(found.passed if found else ()))
        kept = [at for at in kept if at != self._whole_at]
        part = self.data.evaluation
        base = self._losses.means(part, self._losses.reference(part.blocks))
        rows: list[tuple[int | None, Row]] = [(None, self._reference_row(base, found))]
        with self._phase("evaluation", kept, part):
            rows += [(at, self._row(at, base, found)) for at in kept]
        rows.sort(key=lambda row: (row[1].compute, row[1].loss))
        return [at for at, _ in rows], tuple(row for _, row in rows)

    def _reference_row(self, base: Floats, found: Certified | None) -> Row:
        whole, measured = self._whole_at, self._measurer.reference(self.data.evaluation.blocks)
        # it is what most promises compare with; of the others it is tested too
        kept = self.risk is not None and self.risk.compares
        return Row(
            name=self._reference_name,
            select=REFERENCE.select,
            compute=self.whole,
            loss=float(base.mean()),
            loss_increase=0.0,
            changed=0.0,
            guaranteed=kept or (found is not None and whole in found.passed),
            p_value=None if found is None or whole is None else found.p_values.get(whole),
            label_error=self._losses.label_error(self.data.evaluation, measured),
        )

    def _row(self, at: int, base: Floats, found: Certified | None) -> Row:
        part = self.data.evaluation
        measured = self._measurer.measure(self.tried[at], part.blocks)
        loss = self._losses.means(part, measured.loss)
        return Row(
            name=self.tried[at].name,
            select=self.tried[at].select,
            compute=measured.compute,
            loss=float(loss.mean()),
            loss_increase=float((loss - base).mean()),
            changed=float(self._losses.means(part, measured.changed).mean()),
            clipped=self._losses.clipped(part, measured),
            guaranteed=found is not None and at in found.passed,
            p_value=None if found is None else found.p_values.get(at),
            label_error=self._losses.label_error(part, measured),
        )


_UNCERTIFIED: Final = "no setting below full compute could be certified: the default runs"
_NO_NULLS: Final = "no null experts"
