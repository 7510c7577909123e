"""The rows of the matrix, as CSV and as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from judge import REFUSED, RIGHT, Judgement
from models import Case

FIELDS = (
    "run",
    "commit",
    "case",
    "source",
    "target",
    "options",
    "experts",
    "runtime",
    "version",
    "reference",
    "observed",
    "planned",
    "tokens_equal",
    "tokens",
    "log_probability_difference",
    "logit_difference",
    "tokenizer",
    "detail",
)
Row = dict[str, str]
UNTESTED = "untested"


def row(case: Case, experts: str, runtime: str, judgement: Judgement) -> Row:
    """Return what is known of one model in one runtime from the judgement."""
    relative = judgement.logits
    return {
        "case": case.name,
        "source": case.source,
        "target": case.target,
        "options": " ".join(case.options),
        "experts": experts,
        "runtime": runtime,
        "observed": judgement.observed,
        "tokens_equal": str(judgement.equal),
        "tokens": str(judgement.tokens),
        "log_probability_difference": f"{judgement.log_probability:.2e}",
        "logit_difference": "" if relative is None else f"{relative:.2e}",
        "tokenizer": judgement.cut,
        "detail": judgement.detail,
    }


def write(path: Path, rows: Sequence[Row]) -> None:
    """Replace the file by these rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def contradictions(rows: Sequence[Row]) -> list[str]:
    """Return one line for each model and runtime that `plan` is wrong about.

    A model is right in a runtime when it is right with identical and with distinct experts.
    """
    lines = []
    for case, runtime in dict.fromkeys((row["case"], row["runtime"]) for row in rows):
        both = [row for row in rows if (row["case"], row["runtime"]) == (case, runtime)]
        planned = both[0]["planned"]
        observed = _worst([row["observed"] for row in both])
        if planned not in (UNTESTED, observed):
            lines.append(f"{case} in {runtime}: plan says {planned}, observed {observed}")
    return lines


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table: a line per conversion, a column per runtime."""
    runtimes = dict.fromkeys(row["runtime"] for row in rows)
    versions = {row["runtime"]: row["version"] for row in rows if row["version"]}
    heads = [f"{name} ({versions.get(name, '?')})" for name in runtimes]
    lines = [
        "Greedy tokens equal, of all: identical experts against the dense model in the same",
        "runtime / distinct experts against transformers 5.",
        "",
        "| source | target | " + " | ".join(heads) + " |",
        "| --- | --- |" + " --- |" * len(heads),
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        first = of_case[0]
        target = f"{first['target']} {first['options']}".strip()
        cells = [_cell([row for row in of_case if row["runtime"] == name]) for name in runtimes]
        lines.append(f"| {first['source']} | {target} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row]) -> str:
    observed = _worst([row["observed"] for row in rows])
    if observed == REFUSED:
        return "refused"
    counts = " / ".join(f"{row['tokens_equal']} of {row['tokens']}" for row in rows)
    cut = ", texts cut differently" if any(row["tokenizer"] == "differs" for row in rows) else ""
    return f"{observed}: {counts}{cut}"


def _worst(observed: Sequence[str]) -> str:
    others = [verdict for verdict in observed if verdict != RIGHT]
    return others[0] if others else RIGHT
