"""Measured settings of models, and how they compare at equal FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Losses = dict[str, tuple[int, float]]
#: what is compared at every level, ours first.
METHODS = ("neurons", "predicted", "dropped", "random")
OURS = 2
FIELDS = (
    *("run", "commit", "model", "tokens", "seed", "method", "level", "setting", "ffn_flops"),
    *("documents", "eval_tokens", "loss", "over_reference", "over_reference_se"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One setting of one model.

    Attributes:
        label: its setting.
        ffn: feed-forward and router FLOPs as a share of the dense model's.
        losses: document -> tokens and summed loss, over all texts.
    """

    label: str
    ffn: float
    losses: Losses


Run = Mapping[str, Sequence[Point]]


def table(runs: Sequence[Run], levels: Sequence[float]) -> list[str]:
    """Return the comparison as Markdown; differences are per token, with the standard error over
    documents.

    Args:
        runs: of each seed: "reference", "published" where there is one, and "LEVEL:METHOD".
        levels: shares of the feed-forward FLOPs.
    """
    lines = [
        "| FFN FLOPs | seed | reference | neurons | predicted | dropped | random top-k | "
        "best of ours - dropped | - random |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for level in levels:
        lines += [_row(level, seed, run) for seed, run in enumerate(runs)]
    lines.append("")
    for share in (0.01, 0.05):
        lines += [_reach(share, seed, run, levels) for seed, run in enumerate(runs)]
    lines += [line for seed, run in enumerate(runs) for line in _published(seed, run)]
    return lines


def _row(level: float, seed: int, run: Run) -> str:
    (base,) = run["reference"]
    points = [run.get(f"{level:g}:{name}", (None,))[0] for name in METHODS]
    best = min((point for point in points[:OURS] if point), key=mean, default=None)
    cells = [f"{level:g}", str(seed), f"{mean(base):.4f}"]
    cells += ["" if point is None else f"{mean(point):.4f}" for point in points]
    for point in points[OURS:]:
        missing = best is None or point is None
        cells.append("" if missing else "{:+.4f} +- {:.4f}".format(*difference(best, point)))
    return f"| {' | '.join(cells)} |"


def _reach(share: float, seed: int, run: Run, levels: Sequence[float]) -> str:
    """Return the cheapest of our settings whose loss is at most `share` above the reference's."""
    bound = mean(run["reference"][0]) * (1 + share)
    ours = [*run.get("published", ())]
    for level in levels:
        ours += [point for name in METHODS[:OURS] for point in run.get(f"{level:g}:{name}", ())]
    fitting = [point for point in ours if mean(point) <= bound]
    what = f"loss {share:.0%} above the reference, seed {seed}"
    if not fitting:
        return f"- {what}: no setting reaches it at this budget"
    best = min(fitting, key=lambda point: point.ffn)
    return f"- {what}: {best.ffn:.3f} of the FFN FLOPs ({best.label})"


def _published(seed: int, run: Run) -> Iterator[str]:
    for point in run.get("published", ()):
        yield f"- as published, seed {seed}, {point.label}: {point.ffn:.3f}, {mean(point):.4f}"


def rows(found: Run, **shared: object) -> Iterator[dict[str, object]]:
    """Yield the CSV rows of one seed.

    Args:
        found: as one run of `table`.
        shared: cells every row has.
    """
    (base,) = found["reference"]
    for name, points in found.items():
        level, _, method = name.rpartition(":")
        for point in points:
            rise, error = difference(point, base)
            yield {
                **shared,
                "method": method,
                "level": level,
                "setting": point.label,
                "ffn_flops": f"{point.ffn:.4f}",
                "documents": len(point.losses),
                "eval_tokens": sum(count for count, _ in point.losses.values()),
                "loss": f"{mean(point):.5f}",
                "over_reference": f"{rise:.5f}",
                "over_reference_se": f"{error:.5f}",
            }


def mean(point: Point) -> float:
    """Return the loss per token."""
    tokens = sum(count for count, _ in point.losses.values())
    return sum(loss for _, loss in point.losses.values()) / tokens


def difference(ours: Point, other: Point) -> tuple[float, float]:
    """Return ours minus the other's per token, and its standard error over documents."""
    common = sorted(set(ours.losses) & set(other.losses))
    counts = [ours.losses[name][0] for name in common]
    gaps = [ours.losses[name][1] - other.losses[name][1] for name in common]
    total = sum(counts)
    value = sum(gaps) / total
    spread = sum((gap - value * count) ** 2 for gap, count in zip(gaps, counts, strict=True))
    return value, math.sqrt(spread * len(gaps) / max(len(gaps) - 1, 1)) / total
