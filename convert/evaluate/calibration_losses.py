"""Losses of units: what was measured block by block, as a promise is about it.

Shapes: n blocks of a split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaconvert.errors import OptionError
from adaconvert.evaluate.calibration_data import Part
from adaconvert.evaluate.risk import Floats, Risk
from adaconvert.evaluate.sweep import Measured, Measurer
from adaconvert.evaluate.testing_sequence import Integers


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitLosses:
    """Makes losses of units from what a measurer measured.

    Attributes:
        measurer: knows what the reference does.
        risk: what is to be promised, None for nothing.
    """

    measurer: Measurer
    risk: Risk | None

    def reference(self, blocks: Integers) -> Floats:
        """Return the reference's loss of each block, [n]."""
        return self.measurer.reference(blocks).loss

    def weights(self, blocks: Integers) -> Floats:
        """Return how much each block counts, [n]."""
        return self.measurer.predicted[blocks].astype(np.float64)

    def means(self, part: Part, values: Floats) -> Floats:
        """Return the mean of each unit, [units], of values of the blocks of a split."""
        return part.means(values, self.weights(part.blocks))

    def rises(self, part: Part, measured: Measured) -> Floats:
        """Return the rise in loss of each unit, not clipped."""
        return self.means(part, measured.loss - self.reference(part.blocks))

    def risks(self, part: Part, measured: Measured) -> Floats:
        """Return the clipped loss of each unit that the promise is about."""
        if self.risk is None:
            return self.rises(part, measured)
        if self.risk.kind == "disagreement":
            return self.means(part, measured.changed)
        if self.risk.kind == "label-error":
            return self.means(part, _wrong(measured))
        if self.risk.kind == "label-error-increase":
            before = _wrong(self.measurer.reference(part.blocks))
            return self.means(part, _wrong(measured) - before)
        return self.means(part, self.risk.clip(measured.loss - self.reference(part.blocks)))

    def clipped(self, part: Part, measured: Measured) -> float | None:
        """Return the share of blocks whose rise in loss is clipped; None where none ever is."""
        if self.risk is None or self.risk.kind != "loss-increase":
            return None
        rises = measured.loss - self.reference(part.blocks)
        return float(np.mean((rises < self.risk.low) | (rises > self.risk.high)))

    def label_error(self, part: Part, measured: Measured) -> float | None:
        """Return the mean share of wrong labels, None where labels are not known."""
        return None if measured.wrong is None else float(self.means(part, measured.wrong).mean())


def _wrong(measured: Measured) -> Floats:
    """Return which labels are wrong, [n]; they must be known."""
    assert measured.wrong is not None
    return measured.wrong


def out_of_reach(risk: Risk, flag: str, best: float, reference: str) -> OptionError:
    """Return the error for a limit that the reference breaks as well.

    Args:
        risk: about the labels themselves.
        flag: the option that asks for it.
        best: least mean loss on the ordering split.
        reference: what the reference is called.
    """
    return OptionError(
        f"nothing is certain to keep to {risk.limit:.2%}, '{reference}' included",
        where=flag,
        expected="a limit above the model's own error",
        found=f"{best:.2%} wrong labels at best on the ordering split",
        hint=f"Allow more, or use {flag}-increase, which compares with the whole model.",
    )
