"""What is said and recorded of the data of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from adaconvert.train.data_lanes import Tally

#: repeating text this often is nearly as good as new text, repeating it more soon is worth nothing
#: (Muennighoff et al. 2023, 2305.16264, figure 1).
MANY_PASSES: Final = 4.0
#: format of a source -> what its documents are called.
_CALLED: Final = {"text": "documents", "images": "images"}


def data_summary(
    sources: Sequence[Tally], validation: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what is recorded: what each source gave, and losses on held-out text."""
    return {
        "sources": [asdict(tally) for tally in sources],
        "validation": [dict(entry) for entry in validation],
    }


def passes_notes(sources: Sequence[Tally]) -> list[str]:
    """Return a warning for every source that is read more often than is worth it."""
    return [
        f"{tally.name} is read {tally.passes:.1f} times; beyond about {MANY_PASSES:.0f} the same "
        "text teaches little, so give more data or a smaller budget"
        for tally in sources
        if tally.passes is not None and tally.passes > MANY_PASSES
    ]


def data_notes(sources: Sequence[Tally]) -> list[str]:
    """Return what the user should know of the sources."""
    notes = passes_notes(sources)
    for tally in sources:
        name = tally.name
        if tally.passes is not None and 1 < tally.passes <= MANY_PASSES:
            notes.append(f"{name} was read {tally.passes:.1f} times")
        if tally.cut:
            notes.append(f"{tally.cut} conversations of {name} were cut to one sequence")
        if tally.left_out:
            notes.append(f"{tally.left_out} rows of {name} hold nothing to learn and were left out")
        if not tally.pinned:
            commit = tally.commit or "unknown"
            notes.append(f"{name} was given without a revision; its commit is {commit}")
    return notes


def data_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return what was read and how well held-out text is predicted, one fact a line."""
    return [*map(_source_line, summary.get("sources", ())), *_validation_lines(summary)]


def _source_line(tally: Mapping[str, Any]) -> str:
    what = _CALLED.get(tally["format"], "conversations")
    passes = "" if tally["passes"] is None else f", {tally['passes']:.2f} passes"
    learned = tally["learned"]
    of = "" if learned == tally["tokens"] else f", {learned} of them learned"
    return (
        f"data        {tally['name']}: {tally['documents']} {what}, {tally['tokens']} tokens"
        f"{of}{passes}"
    )


def _validation_lines(summary: Mapping[str, Any]) -> list[str]:
    entries = summary.get("validation", ())
    if not entries:
        return []
    first, last = entries[0], entries[-1]
    rows = [f"validation  loss {first['loss']:.4f} at first, {last['loss']:.4f} at the end"]
    if len(last["losses"]) > 1:
        rows += [
            f"            {name}: {before:.4f} at first, {after:.4f} at the end"
            for name, before, after in zip(
                last["names"], first["losses"], last["losses"], strict=True
            )
        ]
    if "accuracy" in last:
        rows += _accuracy_lines(first, last)
    if "share" in last:
        rows.append(
            f"            share {first['share']:.3f} at first, {last['share']:.3f} at the end"
        )
    return rows


def _accuracy_lines(first: Mapping[str, Any], last: Mapping[str, Any]) -> list[str]:
    """Return how many labels each exit of a classifier gets right, the whole model's last."""
    ends = [(f"exit {at}", first["exits"][at], found) for at, found in last["exits"].items()]
    return [
        f"            {name}: {before['accuracy']:.1%} right at first, {after['accuracy']:.1%} at "
        f"the end{_agreeing(after)}"
        for name, before, after in [*ends, ("whole model", first, last)]
    ]


def _agreeing(entry: Mapping[str, Any]) -> str:
    return f", {entry['agreement']:.1%} as the whole model" if "agreement" in entry else ""
