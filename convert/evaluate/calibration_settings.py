"""What a calibration is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

from adaconvert.data.labels import LABEL_FIELD
from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_data import Reading
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.evaluate.risk import (
    Risk,
    disagreement_risk,
    label_error_increase_risk,
    label_error_risk,
    loss_increase_risk,
)
from adaconvert.evaluate.sweep import KNOB, given
from adaconvert.evaluate.testing_sequence import SHARES, SHARES_WITHOUT_TEST, UNITS
from adaconvert.io.names import escape
from adaconvert.modeling.adaptive_exit_schema import MEASURES

#: limits that can be promised, by the names of their options.
_PROMISES: Final = (
    "max_loss_increase",
    "max_disagreement",
    "max_label_error",
    "max_label_error_increase",
)
GREEDY: Final = "greedy"
EVOLVE: Final = "evolve"
SEARCHES: Final = (GREEDY, EVOLVE)
#: those that compare with labels.
_OF_LABELS: Final = ("max_label_error", "max_label_error_increase")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationSettings:
    """What is asked for.

    Attributes:
        reading: the data.
        budget: largest compute; the setting of least loss within it is chosen, nothing is promised.
        max_loss_increase: nats per token the loss may rise by; the cheapest setting for which that
            is certified is chosen.
        max_disagreement: the same for the share of top predictions that change.
        max_label_error: the same for the share of wrong labels, of a classifier.
        max_label_error_increase: the same for how much that share rises.
        confidence: of the promise, over the draw of the data.
        clip: rises are clipped to this, None for the default of `loss_increase_risk`.
        rules: selection rules to sweep, none for those that suit the routers.
        values: values of the one rule instead of shares of the experts.
        per_layer: also try giving each layer its own share, each exit its own threshold.
        search: how `per_layer` finds shares, see `SEARCHES`. "greedy": loss by share of each layer
            alone is measured, and taken to add up; "evolve": many divisions of the budget are
            measured, see `evolved`.
        generations, offspring: of an evolution.
        knob: what is calibrated of a model with blocks that tokens skip and experts to choose, see
            `knob_groups.KNOBS`; the other is left as it is.
        measure: how sure an exit is, of models with exits; None for as configured.
        batch_size: blocks at a time, None for what fits.
        dtype: torch name, "auto" for as stored.
        device: torch name, None for the accelerator there is, else the CPU.
        progress: show progress bars on a terminal.
    """

    reading: Reading
    budget: float | None = None
    max_loss_increase: float | None = None
    max_disagreement: float | None = None
    max_label_error: float | None = None
    max_label_error_increase: float | None = None
    confidence: float = 0.95
    clip: float | None = None
    rules: tuple[str, ...] = ()
    values: tuple[float, ...] = ()
    per_layer: bool = False
    search: str = GREEDY
    generations: int = 40
    offspring: int = 16
    knob: str | None = None
    measure: str | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    device: str | None = None
    progress: bool = False

    @staticmethod
    def of(data: Sequence[str], options: Mapping[str, Any]) -> CalibrationSettings:
        """Return the settings of options given by name, those of the data among them.

        Raises:
            TypeError: an option is unknown.
        """
        own = {field.name for field in fields(Reading)} - {"data", "progress"}
        rest = {name: value for name, value in options.items() if name not in own}
        given = {name: value for name, value in options.items() if name in own}
        if any(options.get(name) is not None for name in _OF_LABELS):
            given["label_field"] = given.get("label_field") or LABEL_FIELD
        reading = Reading(data=tuple(data), progress=bool(options.get("progress", False)), **given)
        return CalibrationSettings(reading=reading, **rest)

    def chosen_device(self) -> str:
        """Return the device to run on.

        Raises:
            OptionError: torch knows none of that name, or it is not here.
        """
        return EvaluateOptions(device=self.device).chosen_device()

    def check(self) -> None:
        """Return only when the options make sense together.

        Raises:
            OptionError: they do not.
        """
        names = ("budget", *_PROMISES)
        if sum(getattr(self, name) is not None for name in names) > 1:
            *flags, last = map(_flag, names)
            raise OptionError(
                f"only one of {', '.join(flags)} and {last} can be chosen by", where="calibrate"
            )
        for name in names:
            most = math.inf if name == "max_loss_increase" else 1
            _check_range(_flag(name), getattr(self, name), 0, most)
        _check_range("--confidence", self.confidence, 0, 1)
        if self.clip is not None and self.max_loss_increase is None:
            raise OptionError(
                "does nothing without --max-loss-increase: other risks lie between 0 and 1",
                where="--clip",
            )
        _check_range("--clip", self.clip, self.max_loss_increase or 0, math.inf)
        if self.reading.unit not in UNITS:
            raise OptionError(
                "unknown unit", where="--unit", expected=" or ".join(UNITS), found=self.reading.unit
            )
        if self.batch_size is not None and self.batch_size < 1:
            raise OptionError("is out of range", where="--batch-size", found=self.batch_size)
        if self.measure is not None and self.measure not in MEASURES:
            raise OptionError(
                "unknown measure",
                where="--measure",
                expected=", ".join(MEASURES),
                found=escape(self.measure),
            )
        for rule in self.rules:
            if rule not in KNOB:
                raise OptionError(
                    "unknown rule", where="--rule", expected=", ".join(KNOB), found=escape(rule)
                )
        if self.values and len(self.rules) != 1:
            raise OptionError("needs exactly one --rule", where="--values")
        for value in self.values:
            given(self.rules[0], value)
        self._check_search()

    def _check_search(self) -> None:
        if self.search not in SEARCHES:
            raise OptionError(
                "unknown search",
                where="--search",
                expected=" or ".join(SEARCHES),
                found=escape(self.search),
            )
        for name in ("generations", "offspring"):
            value, usual = getattr(self, name), type(self).__dataclass_fields__[name].default
            if not self.evolves and value != usual:
                raise OptionError("is about --search evolve", where=_flag(name), found=value)
            if value < 1:
                raise OptionError("is out of range", where=_flag(name), found=value)
        if not self.evolves:
            return
        if not self.per_layer or self.values:
            raise OptionError(
                "is how --per-layer finds shares, and --values are one for all layers"
                if self.values
                else "is how --per-layer finds shares: give that as well",
                where="--search",
                found=self.search,
            )
        if self.budget is None:
            raise OptionError(
                "needs --budget: it divides one compute among the layers",
                where="--search",
                found=self.search,
            )

    @property
    def evolves(self) -> bool:
        """Return whether shares per layer are found by evolution."""
        return self.search == EVOLVE

    @property
    def shares(self) -> tuple[float, float, float]:
        """Return the shares of the splits: without a promise nothing is tested."""
        return SHARES_WITHOUT_TEST if self.risk() is None else SHARES

    @property
    def promise(self) -> str:
        """Return the option that asks for a promise."""
        asked = (name for name in _PROMISES if getattr(self, name) is not None)
        return _flag(next(asked, "max_disagreement"))

    @property
    def of_labels(self) -> str | None:
        """Return the option that reads labels, None when none does."""
        asked = (name for name in _OF_LABELS if getattr(self, name) is not None)
        found = next(asked, None if self.reading.label_field is None else "label_field")
        return None if found is None else _flag(found)

    def risk(self, *, single: bool = False) -> Risk | None:
        """Return what is to be promised, None for nothing.

        Args:
            single: the model makes one prediction of a unit.
        """
        if self.max_loss_increase is not None:
            return loss_increase_risk(self.max_loss_increase, self.confidence, self.clip)
        if self.max_disagreement is not None:
            return disagreement_risk(self.max_disagreement, self.confidence, single=single)
        if self.max_label_error is not None:
            return label_error_risk(self.max_label_error, self.confidence)
        if self.max_label_error_increase is not None:
            return label_error_increase_risk(self.max_label_error_increase, self.confidence)
        return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _check_range(where: str, value: float | None, low: float, high: float) -> None:
    if value is None or (low < value < high):
        return
    upper = "" if math.isinf(high) else f" and below {high:g}"
    raise OptionError("is out of range", where=where, expected=f"above {low:g}{upper}", found=value)
