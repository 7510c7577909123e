"""What a calibration found: the table, the choice, the promise, and how they are told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from adaconvert.evaluate.sweep import Select
from adaconvert.modeling.adaptive_knobs import DEPTH, EXITS


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting, measured on the evaluation split.

    Attributes:
        name: what a person calls it.
        select: per site, as stored.
        compute: routed FLOPs per token as a fraction of the reference's.
        loss: mean over units, nats per token.
        loss_increase: the same less the reference's.
        changed: share of top predictions that differ from the reference's.
        clipped: share of blocks whose rise in loss was clipped; None when nothing was.
        guaranteed: it passed the test.
        p_value: of the test, None when it was not tested.
        label_error: share of wrong labels, None where labels are not known.
    """

    name: str
    select: Select
    compute: float
    loss: float
    loss_increase: float
    changed: float
    clipped: float | None = None
    guaranteed: bool = False
    p_value: float | None = None
    label_error: float | None = None

    def to_json(self) -> dict[str, object]:
        """Return the row as config.json stores it."""
        row: dict[str, object] = {
            "compute": self.compute,
            "loss": self.loss,
            "loss_increase": self.loss_increase,
            "changed": self.changed,
            "guaranteed": self.guaranteed,
            "name": self.name,
            "select": {p: own for p, own in self.select.items() if p not in (EXITS, DEPTH)},
        }
        if DEPTH in self.select:
            row["depth"] = self.select[DEPTH]
        if EXITS in self.select:
            row["exits"] = self.select[EXITS]
        if self.p_value is not None:
            row["p_value"] = self.p_value
        if self.clipped is not None:
            row["clipped"] = self.clipped
        if self.label_error is not None:
            row["label_error"] = self.label_error
        return row


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationResult:
    """A table of settings and the one that was chosen.

    Attributes:
        checkpoint: name of the folder that holds it.
        rows: by rising compute.
        chosen: position of the chosen row, None when nothing was asked for.
        risk: what was promised, None for a choice by budget.
        budget: compute that was allowed, None for a choice by risk.
        split: sizes of the splits.
        digests: of weights, config and data.
        configured: site path -> selection before any calibration chose one, which is the default
            when nothing is chosen.
        notes: what the user should know.
    """

    checkpoint: str
    rows: tuple[Row, ...]
    chosen: int | None
    risk: Mapping[str, object] | None
    budget: float | None
    split: Mapping[str, object]
    digests: Mapping[str, str]
    configured: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def entry(self) -> dict[str, Any]:
        """Return `config.adaptive.calibration`."""
        return {
            "digests": dict(self.digests),
            "phase": "prefill",
            "risk": None if self.risk is None else dict(self.risk),
            "budget": self.budget,
            "split": dict(self.split),
            "rows": [row.to_json() for row in self.rows],
            "chosen": self.chosen,
            "configured": {path: dict(select) for path, select in self.configured.items()},
        }

    def to_json(self) -> dict[str, object]:
        """Return JSON values only."""
        return {"checkpoint": self.checkpoint, **self.entry(), "notes": list(self.notes)}

    def lines(self) -> list[str]:
        """Return the text a person reads."""
        split = self.split
        unit = split["unit"]
        wrong = "" if self.rows[0].label_error is None else f" {'wrong':>8}"
        lines = [
            f"{self.checkpoint}: {len(self.rows)} settings, measured on {split['evaluation']} "
            f"{unit}s that chose nothing ({split['tokens']} tokens in all)",
            f"{'':2}{'compute':>8} {'loss':>8} {'rise':>9} {'changed':>8}{wrong}  setting",
        ]
        for index, row in enumerate(self.rows):
            mark = "*" if index == self.chosen else " "
            sure = "  guaranteed" if row.guaranteed else ""
            wrong = "" if row.label_error is None else f" {row.label_error:8.1%}"
            lines.append(
                f"{mark:2}{row.compute:8.4f} {row.loss:8.4f} {row.loss_increase:+9.4f} "
                f"{row.changed:8.1%}{wrong}  {row.name}{sure}"
            )
        if self.chosen is not None:
            lines.append(f"chosen (*), now the default: {self.promise()}")
        return lines + [f"note: {note}" for note in self.notes]

    def promise(self) -> str:
        """Return one sentence on what holds for the chosen row."""
        assert self.chosen is not None
        row = self.rows[self.chosen]
        what = f"{row.name}, {row.compute:.1%} of the reference's compute"
        if self.risk is None:
            return f"{what}; the least loss within the budget of {self.budget:g}, no promise"
        limit, bounds = self.risk["limit"], self.risk["range"]
        assert isinstance(limit, float)
        assert isinstance(bounds, list)
        said = {
            "disagreement": f"the most likely prediction changes for at most {limit:.2%}",
            "label-error": f"the label is wrong for at most {limit:.2%}",
            "label-error-increase": f"the share of wrong labels rises by at most {limit:.2%}",
            "loss-increase": f"the loss rises by at most {limit:g} nats per token",
        }[str(self.risk["kind"])]
        clipped = ""
        if self.risk["kind"] == "loss-increase":
            share = f"{row.clipped or 0:.2%} of blocks were"
            clipped = f"; rises are clipped to {bounds[1]:g} per block ({share})"
        return (
            f"{what}; with a confidence of {self.risk['confidence']} over the draw of the "
            f"calibration data, {said} on average over {self._population()}{clipped}"
        )

    def _population(self) -> str:
        if self.split["unit"] == "document":
            return "documents drawn like these, the tokens of a document counted alike"
        return "blocks drawn from these very documents, and no others"
