"""The compute and loss of a calibrated checkpoint, as config.json and the manifest tell them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from adaconvert.arch.calibration import stale_reasons, table_of
from adaconvert.arch.null_experts import holds_nulls
from adaconvert.export.card_text import code, percent, plain, sentence, table
from adaconvert.io import manifest
from adaconvert.io.card_file import PLOT

#: begins the manifest's note that states what holds for the chosen setting.
CHOSEN: Final = "calibrated: "
#: begins the notes on how it was measured.
MEASURED: Final = "calibration: "
_WHOLE_NULLED: Final = "runs what the source runs, without null experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting.

    Attributes:
        name: what a person calls it.
        compute: fraction of the reference's FLOPs per token.
        loss: nats per token.
        increase: loss minus the reference's.
        changed: share of top predictions that differ from the reference's.
        guaranteed: it passed the test.
        label_error: share of wrong labels, None where labels are not known.
    """

    name: str
    compute: float
    loss: float
    increase: float
    changed: float
    guaranteed: bool
    label_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A table that still holds.

    Attributes:
        rows: by rising compute.
        chosen: position of the default, None when nothing was chosen.
        measured: what it was measured on, for people.
        phase: "prefill" or "decode".
        length: tokens of context the reference is stated at, None when not stated.
        notes: what the manifest says of it.
        whole: what the model does at full compute.
    """

    rows: tuple[Row, ...]
    chosen: int | None
    measured: str
    phase: str
    length: int | None
    notes: tuple[str, ...]
    whole: str = "runs every expert"

    @property
    def labelled(self) -> bool:
        """Return whether every row says how many labels were wrong."""
        return all(row.label_error is not None for row in self.rows)


def calibration_of(
    config: Mapping[str, Any], record: Mapping[str, Any]
) -> tuple[Calibration | None, list[str]]:
    """Return the table of a checkpoint, or None and why the one it holds is not shown."""
    found = table_of(config)
    if found is None:
        return None, []
    try:
        reasons = stale_reasons(config, manifest.weights_of(record))
    except ValueError:
        reasons = ["the manifest's hashes cannot be read"]
    if reasons:
        return None, reasons
    try:
        return _parsed(found, config, _notes(record)), []
    except (KeyError, TypeError, ValueError):
        return None, ["it is damaged"]


def _parsed(
    found: Mapping[str, Any], config: Mapping[str, Any], notes: tuple[str, ...]
) -> Calibration:
    rows = tuple(
        Row(
            name=str(row["name"]),
            compute=_finite(row["compute"]),
            loss=_finite(row["loss"]),
            increase=_finite(row["loss_increase"]),
            changed=_finite(row["changed"]),
            guaranteed=row.get("guaranteed") is True,
            label_error=None if row.get("label_error") is None else _finite(row["label_error"]),
        )
        for row in found["rows"]
    )
    chosen = found.get("chosen")
    if not rows or not (chosen is None or (type(chosen) is int and 0 <= chosen < len(rows))):
        raise ValueError(chosen)
    split = found["split"]
    length = config["adaptive"]["reference"].get("length")
    return Calibration(
        rows=rows,
        chosen=chosen,
        measured=f"{plain(split['evaluation'])} {plain(split['unit'])}s",
        phase=str(found.get("phase")),
        length=length if isinstance(length, int) else None,
        notes=notes,
        **({"whole": _WHOLE_NULLED} if holds_nulls(config["adaptive"]) else {}),
    )


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return float(value)


def _notes(record: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(note) for note in record["notes"] if is_note(str(note)))


def is_note(note: str) -> bool:
    """Return whether a note of a manifest is about its calibration."""
    return note.startswith((CHOSEN, MEASURED))


def notes_of(promise: str | None, measured: Sequence[str]) -> list[str]:
    """Return the notes a manifest keeps of a calibration.

    Args:
        promise: what holds for the chosen setting, None when none was chosen.
        measured: what the user should know of how it was measured.
    """
    chosen = f"{CHOSEN}{'a table, nothing chosen' if promise is None else promise}"
    return [chosen, *(f"{MEASURED}{note}" for note in measured)]


def section(found: Calibration) -> Iterator[str]:
    """Yield the section of the card."""
    at = "" if found.length is None else f" at {found.length} tokens of context"
    yield "## Compute and loss"
    yield ""
    if len(found.rows) > 1:
        yield f"![Loss against compute of {len(found.rows)} settings; the table below]({PLOT})"
        yield ""
    yield (
        f"Measured by `adaconvert calibrate` on {found.measured} that took no part in choosing "
        f"({plain(found.phase)}). `compute` is routed FLOPs per token over those of the "
        f"reference{at}, router and head included; `model.set_compute(x)` takes the largest row "
        f"not above x, `model.set_compute(1.0)` {found.whole}."
    )
    yield ""
    wrong = ("labels wrong",) if found.labelled else ()
    changes = ("compute", "loss", "rise in loss", "predictions changed")
    columns = (*changes, *wrong, "setting", "guaranteed")
    yield from table(columns, [_cells(found, at) for at in range(len(found.rows))])
    yield ""
    for note in found.notes:
        chosen = note.removeprefix(CHOSEN)
        if chosen != note:
            yield f"Default: {plain(chosen)}."
        else:
            yield f"- {sentence(note.removeprefix(MEASURED))}"
    yield ""


def _cells(found: Calibration, at: int) -> tuple[str, ...]:
    row = found.rows[at]
    name = plain(row.name)
    return (
        f"{row.compute:.4f}",
        f"{row.loss:.4f}",
        f"{row.increase:+.4f}",
        percent(row.changed),
        *((percent(row.label_error or 0.0),) if found.labelled else ()),
        f"**{name}** (default)" if at == found.chosen else name,
        "yes" if row.guaranteed else "no",
    )


def default_line(found: Calibration) -> str:
    """Return what the default setting is, in a sentence; empty when nothing was chosen."""
    if found.chosen is None:
        return ""
    row = found.rows[found.chosen]
    return (
        f"Its default is now the calibrated setting {code(row.name)}: {percent(row.compute)} of "
        f"the reference's FLOPs per token, {row.increase:+.4f} nats per token of loss."
    )
