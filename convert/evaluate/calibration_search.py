"""Measures settings on the splits of the calibration data, tests them, and decides."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_data import CalibrationData, Part, too_small
from adaconvert.evaluate.calibration_losses import UnitLosses, out_of_reach
from adaconvert.evaluate.calibration_result import Row
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.candidates import Family, between, coarse
from adaconvert.evaluate.evolved import Allotment, Cost, Way
from adaconvert.evaluate.knob_groups import held
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import ALL, REFERENCE, Measured, Measurer, Setting
from adaconvert.evaluate.testing_sequence import (
    Certified,
    Integers,
    best_within,
    certify,
    frontier,
)
from adaconvert.evaluate.whole_compute import whole_compute
from adaconvert.planning.evolution import Levels, Vector
from adaconvert.progress import Bar, Silent, bar

#: blocks a site's sensitivity is measured on.
SENSITIVITY_BLOCKS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The table, by rising compute, the position of the chosen row, and what to say about it."""

    rows: tuple[Row, ...]
    chosen: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolving:
    """What an evolution may move.

    Attributes:
        levels: of each site or block.
        setting: levels -> what is measured, None where they cannot be had.
        ways: of dividing levels that may be better than the even one.
    """

    levels: Levels
    setting: Callable[[Vector], Setting | None]
    ways: Sequence[Way]


class Search(ABC):
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
        self.whole = whole_compute(model.config.adaptive)
        self.whole_name, self._reference_name = "every expert", REFERENCE.name
        self._model = model
        self._held = held(model.config.adaptive, settings.knob)
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

    # -- what is tried

    @abstractmethod
    def _try_all(self) -> None:
        """Measure every setting worth a look on the ordering split.

        Raises:
            OptionError: nothing can be chosen.
        """

    def _sweep(self, families: Sequence[Family]) -> None:
        """Measure the settings of families, coarsely, then finely around what was asked for."""
        for family in families:
            self._try(coarse(family))
        for family in families:
            self._try(between(family, self._fits, first=self.risk is not None))

    def _evolve(self, evolving: Evolving) -> None:
        """Measure what an evolution finds at the budget, and a little less of the same."""
        assert self.settings.budget is not None
        blocks = self.data.ordering.blocks

        def measure(vector: Vector, amount: int) -> Cost | None:
            setting = evolving.setting(vector)
            if setting is None:
                return None
            found = self._measurer.measure(setting, blocks[:amount])
            return Cost(loss=self._rise(found, amount), compute=found.compute)

        search = Allotment(
            levels=evolving.levels,
            measure=measure,
            amount=len(blocks),
            budget=self.settings.budget,
            ways=evolving.ways,
        )
        settings = self.settings
        total = search.steps(settings.generations)
        self._measurer.shown = Silent()
        with bar(total, "search", "steps", enabled=settings.progress) as search.shown:
            found = search.find(
                generations=settings.generations,
                offspring=settings.offspring,
                seed=settings.reading.seed,
            )
        self._try([setting for one in found if (setting := evolving.setting(one)) is not None])

    def _rise(self, measured: Measured, amount: int) -> float:
        """Return the mean rise in loss on the first blocks of the ordering split."""
        part = self.data.ordering
        if amount == len(part.blocks):
            return float(self._losses.rises(part, measured).mean())
        return self._mean_rise(measured, part.blocks[:amount])

    def _mean_rise(self, measured: Measured, blocks: Integers) -> float:
        """Return the mean rise in loss on some blocks, weighted by what they predict."""
        rise = measured.loss - self._losses.reference(blocks)
        return float(np.average(rise, weights=self._losses.weights(blocks)))

    def _with_held(self, setting: Setting) -> Setting:
        """Return a setting of what is calibrated with the rest as it is configured."""
        if not self._held:
            return setting
        return replace(setting, select={**setting.select, **self._held})

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
