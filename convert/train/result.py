"""What a fine-tune returns and records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.arch.exits import exits_of, is_taken
from adaconvert.arch.trunk import foreign
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.data_lanes import Tally
from adaconvert.train.data_report import data_lines, data_notes, data_summary
from adaconvert.train.data_stream import Data
from adaconvert.train.log_lines import EXIT_PART
from adaconvert.train.parts import Chosen

Curve = tuple[Mapping[str, Any], ...]
#: what of a log entry is the same whenever a run is repeated.
_REPEATABLE = (
    *(
        "loss",
        "end",
        "lm",
        "distill",
        "distill_hidden",
        "hoyer",
        "l1",
        "sparsity",
        "sparsity_by_layer",
    ),
    *("projection_sparsity", "balance", "z", "regression", "router_entropy", "load"),
    *("dead_experts", "share", "share_by_layer", "idle"),
    *("run", "predictor", "predicted", "price", "missed"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneResult:
    """A finished fine-tune.

    Attributes:
        destination: the committed folder.
        summary: JSON data: options, counts, first and last log entry, notes; the same whenever the
            run is repeated.
        speed: tokens per second of this session, 0 when nothing was left to do.
        curve: every log entry.
        memory: what it was to need, as JSON data.
    """

    destination: Path
    summary: Mapping[str, Any]
    speed: float
    curve: tuple[Mapping[str, Any], ...]
    memory: Mapping[str, Any] | None = None

    @property
    def mfu(self) -> float | None:
        """Return the model FLOPs utilisation of this session, None where it is not known."""
        return _median(self.curve, "mfu")

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        return {
            **self.summary,
            "destination": self.destination.name,
            "tokens_per_second": self.speed,
            **({} if self.mfu is None else {"mfu": self.mfu}),
            "curve": [dict(entry) for entry in self.curve],
            **({} if self.memory is None else {"memory": dict(self.memory)}),
        }

    def lines(self) -> list[str]:
        """Return the result as text."""
        notes = [f"note: {note}" for note in self.summary["notes"]]
        used = "" if self.mfu is None else f", {self.mfu:.1%} MFU"
        speed = [f"speed       {self.speed:.0f} tokens/s{used}"] if self.speed else []
        return [*fact_lines(self.summary), *speed, *notes, f"wrote {self.destination}"]


def fact_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return what a fine-tune did, one fact a line."""
    options, first, last = summary["options"], summary["first"], summary["last"]
    processes = options.get("processes", 1)
    many = f" in {processes} processes" if processes > 1 else ""
    rows = [
        f"trained     {summary['trained']} of {summary['trained'] + summary['frozen']} parameters "
        f"({', '.join(f'{part} {count}' for part, count in summary['by_part'].items())})",
        f"steps       {summary['steps']} of {options['batch_size']} x {options['accumulate']} "
        f"{_batch_of(summary)}{many}, {summary['tokens']} tokens",
    ]
    rows += data_lines(summary)
    losses = ("end", "lm", "distill", "distill_hidden", "balance", "z", "regression", "hoyer", "l1")
    exits = [name for name in first if EXIT_PART.fullmatch(name)]
    for name in (*losses, *exits):
        if name in first and name in last:
            shown = name.replace("distill_hidden", "hidden").replace("_", " ")
            rows.append(f"{shown:<11} {first[name]:.4f} at first, {last[name]:.4f} at the end")
    if "sparsity" in last:
        rows.append(
            f"zeros       {first['sparsity']:.1%} at first, {last['sparsity']:.1%} at the end"
        )
    if "projection_sparsity" in last:
        before, after = first["projection_sparsity"], last["projection_sparsity"]
        rows.append(f"            in projections {before:.1%} at first, {after:.1%} at the end")
    if "share" in last:
        rows.append(_share_line(summary))
    if "routing" in summary:
        rows.append(_routing_line(summary["routing"]))
    changed = options["sparsity"]["activation"]
    if changed != "keep":
        rows.append(f"activation  replaced by {changed}")
    return rows


def _batch_of(summary: Mapping[str, Any]) -> str:
    """Return what batches are of."""
    if "examples" in summary:
        return f"{summary['examples']['unit']}, {summary['examples']['seen']} in all"
    return f"sequences of {summary['options']['seq_len']} tokens"


def _share_line(summary: Mapping[str, Any]) -> str:
    """Return what was spent: on held-out text, before and after training, where there is any; else
    over the first and last log entries, before the biases were moved for the last time."""
    first, last = summary["first"], summary["last"]
    held = [entry["share"] for entry in summary.get("validation", ()) if "share" in entry]
    ends = (held[0], held[-1]) if held else (first["share"], last["share"])
    where = "on held-out text" if held else "in training, before the biases moved last"
    return (
        f"share       {ends[0]:.3f} of the experts at first, {ends[1]:.3f} at the end ({where}); "
        f"{last['idle']:.1%} of the tokens run none in training"
    )


def _routing_line(routing: Mapping[str, Any]) -> str:
    layers = routing["layers"]
    entropy = sum(layer["entropy"] for layer in layers) / len(layers)
    dead = sum(len(layer["dead"]) for layer in layers)
    return (
        f"routers     entropy {entropy:.3f} of even, load max/mean "
        f"{max(layer['load'] for layer in layers):.2f}, {dead} dead experts "
        f"(last {routing['steps']} steps, {len(layers)} layers)"
    )


def speed_of(curve: Curve) -> float:
    """Return the median speed of the log entries, the first left out: it warms up."""
    return _median(curve, "tokens_per_second") or 0.0


def _median(curve: Curve, name: str) -> float | None:
    """Return the median of what log entries say, the first left out; None when they do not."""
    found = sorted(entry[name] for entry in curve[1:] or curve if name in entry)
    return float(found[len(found) // 2]) if found else None


def summary_of(
    config: FinetuneConfig,
    data: Data,
    chosen: Chosen,
    curve: Curve,
    validation: Sequence[Mapping[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    """Return what is recorded of a run: no times, no paths.

    "first" and "last" are of the tokens of log entries: "share" there is what was spent while
    biases still moved. What the result spends is "share" of the last entry of "validation", where
    there is held-out text, and of each block in "routing", "budgets".
    """
    sources = data.sources
    return {
        "options": config.to_json(),
        "steps": config.total_steps,
        "tokens": config.total_steps * config.step_tokens,
        "passes": [tally.passes for tally in sources],
        **data_summary(sources, validation),
        **_trained(chosen, curve),
        "notes": notes,
    }


def tuned_summary(
    config: FinetuneConfig,
    *,
    steps: int,
    tallies: Sequence[Tally],
    examples: Mapping[str, object],
    chosen: Chosen,
    curve: Curve,
    validation: Sequence[Mapping[str, Any]],
    notes: list[str],
) -> dict[str, Any]:
    """Return what is recorded of a run on labelled examples, as `summary_of` does.

    Args:
        config: the fine-tune.
        steps: optimiser steps.
        tallies: what each source gave; tokens are counted without padding.
        examples: {"unit", "read", "seen"}: what they are called, and how many there are and were
            given out.
        chosen, curve, validation, notes: as for `summary_of`.
    """
    return {
        "options": config.to_json(),
        "steps": steps,
        "tokens": sum(tally.tokens for tally in tallies),
        "examples": dict(examples),
        "passes": [tally.passes for tally in tallies],
        **data_summary(tallies, validation),
        **_trained(chosen, curve),
        "notes": notes,
    }


def _trained(chosen: Chosen, curve: Curve) -> dict[str, Any]:
    """Return what was trained, and the first and last log entries."""
    exits = [name for name in curve[0] if EXIT_PART.fullmatch(name)]
    ends = [{k: e[k] for k in (*_REPEATABLE, *exits) if k in e} for e in (curve[0], curve[-1])]
    return {
        "trained": chosen.trained,
        "frozen": chosen.frozen,
        "by_part": dict(chosen.by_part),
        "first": ends[0],
        "last": ends[1],
    }


def notes_of(item: Described, config: FinetuneConfig, data: Data) -> list[str]:
    """Return what the user should know of a run."""
    return [*data_notes(data.sources), *exit_notes(item)]


def exit_notes(item: Described) -> list[str]:
    """Return what becomes of the calibration and the thresholds of a checkpoint."""
    notes = []
    adaptive = item.spec.adaptive
    if adaptive is not None and adaptive.get("calibration") is not None:
        notes.append("the calibration table was dropped: it belongs to the weights before")
    exits = exits_of(adaptive)
    if exits is not None and is_taken(exits):
        notes.append("thresholds of exits stay as they were; `adaconvert calibrate` sets them anew")
    wrong = foreign(item.source, item.spec)
    if wrong is not None:
        notes.append(f"{wrong}; this fine-tune trained them for these")
    return notes
