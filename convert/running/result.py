"""What `run` did, as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.running.outline import Outline


@dataclass(frozen=True, slots=True, kw_only=True)
class StageResult:
    """One stage afterwards.

    Attributes:
        name, verb: of the stage.
        status: "done", "unchanged" or "left out".
        facts: what came out, in a line.
        result: the result of the verb as JSON data; empty for a stage that did not run.
    """

    name: str
    verb: str
    status: str
    facts: str
    result: Mapping[str, Any]

    def to_json(self) -> dict[str, object]:
        """Return the stage as JSON data."""
        return {
            "name": self.name,
            "verb": self.verb,
            "status": self.status,
            "facts": self.facts,
            "result": dict(self.result),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """A finished run; of a dry run, its plan.

    Attributes:
        outline: the plan.
        stages: what each did; empty for a dry run.
        destination: folder of the result, None when no stage makes a checkpoint.
    """

    outline: Outline
    stages: tuple[StageResult, ...] = ()
    destination: Path | None = None

    def to_json(self) -> dict[str, object]:
        """Return the result as JSON data."""
        return {
            "plan": self.outline.to_json(),
            "stages": [stage.to_json() for stage in self.stages],
            "destination": None if self.destination is None else self.destination.name,
        }

    def lines(self) -> list[str]:
        """Return the plan of a dry run, or a table of the stages of a run."""
        if not self.stages:
            return self.outline.lines()
        name, title = self.outline.recipe
        rows = [f"{name}: {title}"]
        rows += [f"{s.name:<12} {s.status:<10} {s.facts}".rstrip() for s in self.stages]
        if self.destination is not None:
            rows.append(f"wrote {self.destination}")
        return rows


def facts_of(verb: str, found: Mapping[str, Any]) -> str:
    """Return what came out of a stage in a line.

    Args:
        verb: of the stage.
        found: the result of the verb as JSON data; of an evaluation, {"results": one a text}.
    """
    makers = {"finetune": _tuned, "evaluate": _evaluated, "push": _pushed, "calibrate": _calibrated}
    return makers.get(verb, _converted)(found)


def _converted(found: Mapping[str, Any]) -> str:
    plan = found.get("plan") or {}
    exactness = plan.get("exactness") or {}
    proven = "verified" if found.get("verification") else "not verified"
    return ", ".join([str(plan.get("target", "")), str(exactness.get("kind", "")), proven])


def _tuned(found: Mapping[str, Any]) -> str:
    first, last = found.get("first", {}), found.get("last", {})
    words = [f"{found['tokens']} tokens"] if "tokens" in found else []
    if set(found.get("by_part", {})) == {"exits"} and "exits" in first and "exits" in last:
        # the model underneath is frozen: its loss says how hard two batches were, nothing else
        words.append(f"loss of the exits {first['exits']:.4f} -> {last['exits']:.4f}")
    elif "lm" in first and "lm" in last:
        words.append(f"loss {first['lm']:.4f} -> {last['lm']:.4f}")
    if "share" in last:
        words.append(f"{last['share']:.3f} of the experts run")
    if found.get("tokens_per_second"):
        words.append(f"{found['tokens_per_second']:.0f} tokens/s")
    return ", ".join(words)


def _evaluated(found: Mapping[str, Any]) -> str:
    words = []
    for evaluation in found.get("results", ()):
        rows = [*filter(None, [evaluation.get("reference")]), *evaluation.get("settings", ())]
        shown = ", ".join(filter(None, (_loss(row) for row in rows)))
        words.append(f"{evaluation['name']}: {shown}" if evaluation.get("name") else shown)
    return "; ".join(words)


def _loss(row: Mapping[str, Any]) -> str:
    loss = (row.get("loss") or {}).get("mean")
    return "" if loss is None else f"{row['label']} loss {loss:.4f}"


def _calibrated(found: Mapping[str, Any]) -> str:
    rows, chosen = found.get("rows", ()), found.get("chosen")
    words = f"{len(rows)} settings measured"
    if chosen is None:
        return words
    row = rows[chosen]
    return f"{words}; compute {row['compute']:.4f}, loss {row['loss_increase']:+.4f}"


def _pushed(found: Mapping[str, Any]) -> str:
    return str(found.get("url", ""))
