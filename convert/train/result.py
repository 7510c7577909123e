"""What a fine-tune returns and records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data import Packed
from adaconvert.train.parts import Chosen

Curve = tuple[Mapping[str, Any], ...]
#: what of a log entry is the same whenever a run is repeated.
_REPEATABLE = ("loss", "lm", "distill", "hoyer", "l1", "sparsity", "sparsity_by_layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """A finished fine-tune.

    Attributes:
        destination: the committed folder.
        summary: JSON data: options, counts, first and last log entry, notes; the same whenever the
            run is repeated.
        speed: tokens per second of this session, 0 when nothing was left to do.
        curve: every log entry.
    """

    destination: Path
    summary: Mapping[str, Any]
    speed: float
    curve: tuple[Mapping[str, Any], ...]

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        return {
            **self.summary,
            "destination": self.destination.name,
            "tokens_per_second": self.speed,
            "curve": [dict(entry) for entry in self.curve],
        }

    def lines(self) -> list[str]:
        """Return the result as text."""
        notes = [f"note: {note}" for note in self.summary["notes"]]
        speed = [f"speed       {self.speed:.0f} tokens/s"] if self.speed else []
        return [*fact_lines(self.summary), *speed, *notes, f"wrote {self.destination}"]


def fact_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return what a fine-tune did, one fact a line."""
    options, first, last = summary["options"], summary["first"], summary["last"]
    rows = [
        f"trained     {summary['trained']} of {summary['trained'] + summary['frozen']} parameters "
        f"({', '.join(f'{part} {count}' for part, count in summary['by_part'].items())})",
        f"steps       {summary['steps']} of {options['batch_size']} x {options['accumulate']} "
        f"sequences of {options['seq_len']} tokens, {summary['tokens']} tokens",
    ]
    for name in ("lm", "distill", "hoyer", "l1"):
        if name in first:
            rows.append(f"{name:<12}{first[name]:.4f} at first, {last[name]:.4f} at the end")
    if "sparsity" in last:
        rows.append(
            f"zeros       {first['sparsity']:.1%} at first, {last['sparsity']:.1%} at the end"
        )
    changed = options["sparsity"]["activation"]
    if changed != "keep":
        rows.append(f"activation  replaced by {changed}")
    return rows


def speed_of(curve: Curve) -> float:
    """Return the median speed of the log entries, the first left out: it warms up."""
    speeds = sorted(entry["tokens_per_second"] for entry in curve[1:] or curve)
    return float(speeds[len(speeds) // 2]) if speeds else 0.0


def summary_of(
    config: FinetuneConfig,
    data: Packed,
    chosen: Chosen,
    curve: Curve,
    notes: list[str],
) -> dict[str, Any]:
    """Return what is recorded of a run: no times, no paths."""
    ends = [{k: e[k] for k in _REPEATABLE if k in e} for e in (curve[0], curve[-1])]
    return {
        "options": config.to_json(),
        "steps": config.total_steps,
        "tokens": config.total_steps * config.step_tokens,
        "passes": list(data.passes),
        "trained": chosen.trained,
        "frozen": chosen.frozen,
        "by_part": dict(chosen.by_part),
        "first": ends[0],
        "last": ends[1],
        "notes": notes,
    }


def notes_of(item: Described, config: FinetuneConfig, data: Packed) -> list[str]:
    """Return what the user should know of a run."""
    notes = []
    for source, passes in zip(config.data, data.passes, strict=True):
        if passes > 1:
            notes.append(f"{source.label} was read {passes:.1f} times")
    adaptive = item.spec.adaptive
    if adaptive is not None and adaptive.get("calibration") is not None:
        notes.append("the calibration table was dropped: it belongs to the weights before")
    if item.spec.num_experts:
        notes.append("no balance loss was used; watch the load of the experts")
    return notes
