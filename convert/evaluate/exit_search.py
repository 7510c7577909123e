"""Which rules of leaving early are worth measuring, and which of them is chosen.

Thresholds are quantiles of confidence on the ordering split: one for all exits, or one of each.
What is promised is tested as for experts: see `calibration_search` and `testing_sequence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_data import CalibrationData
from adaconvert.evaluate.calibration_search import Search
from adaconvert.evaluate.calibration_settings import CalibrationSettings
from adaconvert.evaluate.exit_records import ExitMeasurer, Record, pooled
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import ALL, Select, Setting
from adaconvert.modeling.adaptive_exit_schema import MEASURES
from adaconvert.modeling.adaptive_knobs import EXITS

#: shares of the tokens that stay, at the thresholds that are tried.
_STAY: Final = tuple(float(share) for share in np.linspace(0.99, 0.01, 30))
#: the same where each exit has its own, fewer because every exit tries them all.
_STAY_EACH: Final = (0.98, 0.9, 0.8, 0.65, 0.5, 0.35, 0.2, 0.05)
_WHOLE: Final = "no early exit"


def check_exit_settings(settings: CalibrationSettings) -> None:
    """Return only when a model with exits can be calibrated as asked.

    Raises:
        OptionError: options are about experts or blocks.
    """
    if settings.rules or settings.values:
        raise OptionError(
            "is about experts, and this model has exits alone", where="--rule, --values"
        )
    if settings.evolves:
        raise OptionError(
            "is about experts and blocks that tokens skip: what a model with exits costs does not "
            "stay where one threshold rises and another falls",
            where="--search",
            expected="greedy",
            found=settings.search,
        )


class ExitSearch(Search):
    """One calibration of a model with exits; see `Search`."""

    def __init__(
        self, model: Any, data: CalibrationData, settings: CalibrationSettings, risk: Risk | None
    ) -> None:
        super().__init__(model, data, settings, risk)
        self._exits: Mapping[str, Any] = model.adaptive_runtime.exits
        self._measure = settings.measure or str(self._exits["decide"]["measure"])
        self.whole_name = self._reference_name = _WHOLE
        blind = not all(head["confidence"] for head in self._exits["heads"])
        if self._measure == "classifier" and blind:
            raise OptionError("an exit has no classifier of confidence", where="--measure")
        self._runs = ExitMeasurer(model, data.blocks, measure=self._measure, **self._given())
        self._measurer = self._runs

    def _try_all(self) -> None:
        """Measure every rule worth a look on the ordering split."""
        if self._measure == "patience":
            few = range(1, len(self._exits["heads"]))
            self._try([self._setting(None, patience=number) for number in few])
            return
        records = self._runs.records(self.data.ordering.blocks)
        self._try(self._alike(records))
        if self.settings.per_layer:
            self._each(records)

    def _alike(self, records: Sequence[Record]) -> list[Setting]:
        """Return settings of one threshold for all exits, and of equal shares that leave."""
        every = pooled(records)
        settings = [self._setting([self._level(every, s)] * len(self._runs.places)) for s in _STAY]
        own = [pooled(records, column) for column in range(len(self._runs.places))]
        settings += [self._setting([self._level(one, s) for one in own]) for s in _STAY]
        return settings

    def _each(self, records: Sequence[Record]) -> None:
        """Lower one exit's threshold after another, the one that saves most for what it risks."""
        own = [pooled(records, column) for column in range(len(self._runs.places))]
        levels: list[float | None] = [None] * len(own)
        steps = [0] * len(own)
        while True:
            tries = [
                (
                    column,
                    [
                        *levels[:column],
                        self._level(own[column], _STAY_EACH[step]),
                        *levels[column + 1 :],
                    ],
                )
                for column, step in enumerate(steps)
                if step < len(_STAY_EACH)
            ]
            if not tries:
                return
            found = [self._setting(one) for _, one in tries]
            self._try(found)
            best = min(range(len(tries)), key=lambda at: self._price(found[at]))
            column, levels = tries[best]
            steps[column] += 1

    def _price(self, setting: Setting) -> float:
        """Return the risk of a setting for each FLOP it saves."""
        at = next(n for n, tried in enumerate(self.tried) if tried.select == setting.select)
        saved = self.whole - self._ordering[at].compute
        risk = float(self._losses.risks(self.data.ordering, self._ordering[at]).mean())
        return risk / saved if saved > 0 else float("inf")

    def _level(self, ordered: Floats, stay: float) -> float | None:
        """Return the threshold at which a share of tokens stays; None for an exit nobody takes."""
        if not len(ordered):
            return None
        low, high = MEASURES[self._measure]
        at = min(len(ordered) - 1, int(stay * len(ordered)))
        return float(np.clip(ordered[at], low, high))

    def _setting(
        self, levels: Sequence[float | None] | None, *, patience: int | None = None
    ) -> Setting:
        decide = self._exits["decide"]
        thresholds: list[float | None] = [None] * len(self._exits["heads"])
        if patience is not None and decide["measure"] == "patience":
            # from which likeness exits agree stays as configured (F-PABEE)
            thresholds = list(decide["thresholds"])
        for order, level in zip(self._runs.orders, levels or (), strict=levels is not None):
            thresholds[order] = level
        rule = {
            "measure": self._measure,
            "thresholds": thresholds,
            "decay": decide["decay"],
            "patience": patience,
            "kv": self._exits["kv"],
        }
        shown = [level for level in levels or () if level is not None]
        name = f"exits, patience {patience}"
        if patience is None:
            told = [f"{level:.4g}" for level in shown]
            said = told[0] if len(set(told)) == 1 else " / ".join(told) or "never"
            name = f"exits, {self._measure} above {said}"
        select: Select = {**ALL, EXITS: rule}
        return Setting(rule="exits", name=name, select=select)
