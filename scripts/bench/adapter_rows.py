"""What compositions of adapters do on held-out text, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

ALL = "all"
FIELDS = (
    *("run", "commit", "cpu", "model", "seed", "case", "tokens", "lr", "text", "documents"),
    *("eval_tokens", "loss"),
    *("over_single", "over_single_se", "over_uniform", "over_uniform_se"),
    *("over_rival", "over_rival_se", "of_rival"),
)
Row = dict[str, object]
Losses = Mapping[str, tuple[int, float]]
Found = Mapping[str, Mapping[str, Losses]]


def loss(texts: Mapping[str, Losses]) -> float:
    """Return the mean over the texts of the loss per token of each."""
    return sum(map(_one, texts.values())) / len(texts)


def _one(losses: Losses) -> float:
    tokens = sum(count for count, _ in losses.values())
    return sum(count * value for count, value in losses.values()) / tokens


def difference(one: Mapping[str, Losses], other: Mapping[str, Losses]) -> tuple[float, float]:
    """Return by how much the loss of `one` is above, and the standard error by document."""
    rises, variances = [], []
    for name, losses in one.items():
        total = sum(count for count, _ in losses.values())
        rise = _one(losses) - _one(other[name])
        # a ratio of sums over documents
        parts = [
            count * (value - other[name][document][1] - rise)
            for document, (count, value) in losses.items()
        ]
        n = len(parts)
        variances.append(sum(part**2 for part in parts) * n / max(n - 1, 1) / total**2)
        rises.append(rise)
    return sum(rises) / len(rises), math.sqrt(sum(variances)) / len(rises)


def rows(
    found: Found, adapters: Sequence[str], told: Callable[[str], Mapping[str, Any]]
) -> Iterator[Row]:
    """Yield a row for every model and text.

    Args:
        found: model -> text -> document -> predicted tokens and mean loss.
        adapters: names of the single adapters.
        told: how a model was trained.
    """
    singles = [f"lora_{name}" for name in adapters if f"lora_{name}" in found]
    best = min(singles, key=lambda name: loss(found[name]))
    others = [name for name in found if name.startswith("lora_") and name not in singles]
    rivals = {"single": best, "uniform": "uniform", **({"rival": others[0]} if others else {})}
    for case, texts in found.items():
        for text in (*texts, ALL):
            own = texts if text == ALL else {text: texts[text]}
            cells: Row = {"case": case, "text": text, **told(case)}
            cells["documents"] = sum(map(len, own.values()))
            cells["eval_tokens"] = sum(count for part in own.values() for count, _ in part.values())
            cells["loss"] = f"{loss(own):.5f}"
            for column, rival in rivals.items():
                against = {name: found[rival][name] for name in own}
                rise, error = difference(own, against)
                cells |= {f"over_{column}": f"{rise:.5f}", f"over_{column}_se": f"{error:.5f}"}
                if column == "rival":
                    cells["of_rival"] = f"{loss(own) / loss(against):.4f}"
            yield cells


def table(made: Sequence[Row]) -> Iterator[str]:
    """Yield the rows as a Markdown table, one line a model."""
    texts = list(dict.fromkeys(str(row["text"]) for row in made))
    heads = ("model", *texts, "over the best single", "over uniform", "over one LoRA")
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for case in dict.fromkeys(row["case"] for row in made):
        own = {str(row["text"]): row for row in made if row["case"] == case}
        cells = [str(case), *(f"{float(str(own[text]['loss'])):.3f}" for text in texts)]
        for column in ("single", "uniform", "rival"):
            last = own[ALL]
            if f"over_{column}" not in last:
                cells.append("")
                continue
            rise, error = (float(str(last[f"over_{column}{end}"])) for end in ("", "_se"))
            cells.append(f"{rise:+.3f} ({error:.3f})")
        yield f"| {' | '.join(cells)} |"
