"""What `evaluate` says of exits: how good each is, and how many tokens take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaconvert.evaluate.exit_records import ExitMeasurer, exits_taken
from adaconvert.modeling.adaptive_knobs import has_exits

if TYPE_CHECKING:
    from adaconvert.data.tokens import TokenBlocks
    from adaconvert.evaluate.testing_sequence import Integers

#: drafts at a time that are looked at.
_MOST = 8


def exit_table(
    model: Any, blocks: TokenBlocks, batch: int | None = None
) -> tuple[dict[str, object], ...]:
    """Return a row for each exit of a language model, and for its end; none without exits.

    Where tokens leave, `share` says how many of all do there. Means are over predicted tokens.
    `drafts_gain` says how many times as fast as plain decoding lossless drafts from the exit should
    be at best, `drafts` how many at a time, if a draft is accepted as often as the exit agrees here
    and reading weights is what takes the time, as with one sequence.

    Args:
        model: any; experts run as configured.
        blocks: the text.
        batch: blocks run together.
    """
    adaptive = getattr(model.config, "adaptive", None)
    if not adaptive or not has_exits(adaptive):
        return ()
    rule = model.adaptive_runtime.leaving()
    measure = str(model.adaptive_runtime.exits["decide"]["measure"])
    if measure == "patience" and not _compares(rule):
        measure = "max"
    runs = ExitMeasurer(model, blocks, measure=measure, batch=batch)
    count = len(runs.places)
    sums, sure = np.zeros((2, count + 1)), np.zeros(count)
    taken, tokens, every = np.zeros(count + 1), 0, 0
    for block in range(len(blocks)):
        record = runs.records(np.array([block]))[0]
        runs.forget()
        length = len(record.losses) - 1
        tokens, every = tokens + length, every + length + 1
        sums[0] += record.losses[:length].sum(axis=0, dtype=np.float64)
        sums[1] += (record.tops[:length] == record.tops[:length, -1:]).sum(axis=0)
        sure += np.maximum(record.sure[:length], 0).sum(axis=0, dtype=np.float64)
        if rule is not None and runs.frozen:
            # what a token runs depends on where those before it left
            taken += _left(model, blocks.ids[block, : length + 1], (*runs.places, runs.count))
        elif rule is not None and rule["measure"] in (measure, "patience"):
            taken += np.bincount(exits_taken(rule, runs.orders, record), minlength=count + 1)
    rows = []
    for column, at in enumerate((*runs.places, runs.count)):
        row: dict[str, object] = {
            "blocks": at,
            "loss": float(sums[0, column] / max(tokens, 1)),
            "agreement": float(sums[1, column] / max(tokens, 1)),
            "confidence": float(sure[column] / max(tokens, 1)) if column < count else None,
            "measure": measure,
            "share": float(taken[column] / every) if taken.any() else None,
        }
        if column < count:
            row |= _drafting(model, at, float(sums[1, column] / max(tokens, 1)))
        rows.append(row)
    return tuple(rows)


def _left(model: Any, ids: Integers, places: Sequence[int]) -> Integers:
    """Return how many tokens of a block leave after so many blocks, as configured, [E + 1].

    Args:
        model: whose tokens leave.
        ids: [S].
        places: [E + 1] blocks before the exits, and of the whole model.
    """
    import torch

    given = torch.from_numpy(np.asarray(ids))[None].to(next(model.parameters()).device)
    with torch.inference_mode():
        depth = model(input_ids=given, use_cache=False, logits_to_keep=1).exit_layers[0].cpu()
    return np.array([int((depth == at).sum()) for at in places])


def _drafting(model: Any, at: int, agreement: float) -> dict[str, object]:
    """Return what lossless drafts from an exit should gain."""
    from adaconvert.modeling.adaptive_drafting import costs_of
    from adaconvert.modeling.adaptive_speculate import Draft

    tokens = getattr(model.adaptive_exits()[at], "draft_tokens", None)
    costs = costs_of(model, Draft(at, _MOST, 0.0, tokens))
    gain, drafts = costs.best(agreement, _MOST)
    return {"drafts_gain": gain, "drafts": drafts}


def _compares(rule: Mapping[str, Any] | None) -> bool:
    """Return whether patience counts exits that are alike, and not those that agree (F-PABEE)."""
    if rule is None or rule["measure"] != "patience":
        return False
    return any(level is not None for level in rule["thresholds"])


def _said_of_drafts(rows: tuple[Mapping[str, Any], ...]) -> str:
    """Return whether lossless drafts should pay, and from where."""
    best = max(rows[:-1], key=lambda row: float(row["drafts_gain"]))
    if best["drafts_gain"] <= 1:
        return "  lossless drafts: slower than plain decoding from every exit, by weights read"
    return (
        f"  lossless drafts: from exit {best['blocks']}, {best['drafts']} at a time, "
        f"x {best['drafts_gain']:.2f} of plain decoding by weights read"
    )


def exit_lines(rows: tuple[Mapping[str, Any], ...]) -> list[str]:
    """Return the table as text."""
    if not rows:
        return []
    shares = [row["share"] for row in rows]
    lines = [f"exits, by the blocks before them; confidence: {rows[0]['measure']}"]
    heads = f"  {'blocks':>6} {'loss':>8} {'agreement':>9} {'confidence':>10} "
    lines.append(heads + f"{'drafts':>7} {'tokens':>8}")
    for row in rows:
        sure = "" if row["confidence"] is None else f"{row['confidence']:.4f}"
        share = "" if row["share"] is None else f"{row['share']:.2%}"
        gain = f"x {row['drafts_gain']:.2f}" if "drafts_gain" in row else ""
        line = (
            f"  {row['blocks']:6} {row['loss']:8.4f} {row['agreement']:9.2%} {sure:>10} {gain:>7} "
            f"{share:>8}"
        )
        lines.append(line.rstrip())
    lines.append(_said_of_drafts(rows))
    if shares[0] is not None:
        mean = sum(row["share"] * row["blocks"] for row in rows)
        lines.append(f"  tokens run {mean:.2f} blocks on average, as configured")
    return lines
