"""How good each exit of a classifier is on held-out examples, before, during and after training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from adaconvert.errors import TrainingError
from adaconvert.train.exit_classifier_data import Source
from adaconvert.train.exit_classifiers import cross_entropies, end_of, exit_predictions
from adaconvert.train.exit_heads import never_leaving

#: blocks before an exit, or before the end -> {"loss", "accuracy", "agreement"}, sums or means.
Measured = dict[int, dict[str, float]]


def measured(
    model: Any, source: Source, places: Sequence[int], *, batch_size: int, bf16: bool = False
) -> Measured:
    """Return sums over the examples of a source: cross-entropy, right classes, and classes that
    are those the whole model chooses; of each exit, and of the end.

    The model computes without dropout, and is left in the mode it was in.

    Args:
        model: a classifier with exits.
        source: the examples.
        places: blocks before the exits.
        batch_size: examples that run together.
        bf16: multiply matrices in bfloat16.
    """
    ends = (*places, end_of(model))
    found: Measured = {at: {"loss": 0.0, "accuracy": 0.0, "agreement": 0.0} for at in ends}
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(source), batch_size):
            batch = source.batch(source.rows[start : start + batch_size], device)
            labels = batch.pop("labels")
            with (
                torch.no_grad(),
                never_leaving(model),
                torch.autocast(device.type, torch.bfloat16, enabled=bf16),
            ):
                logits, _ = exit_predictions(model, batch, places)
            losses = cross_entropies(logits, labels).double().sum(0).tolist()
            whole = logits[-1].argmax(-1)
            for at, scores, loss in zip(ends, logits, losses, strict=True):
                top = scores.argmax(-1)
                found[at]["loss"] += loss
                found[at]["accuracy"] += int((top == labels).sum())
                found[at]["agreement"] += int((top == whole).sum())
    finally:
        model.train(was_training)
    return found


@dataclass(slots=True, kw_only=True)
class ClassifierValidator:
    """Measures while exits are trained.

    Attributes:
        model: a classifier with exits.
        sources: what is held out; without any nothing is measured.
        places: blocks before the exits.
        batch_size, bf16: as for `measured`.
        steps: of the run.
        report: takes one line per exit.
        history: {"step", "loss", "accuracy", "names", "losses", "exits"} of every measurement, the
            first three of the whole model, the last {blocks before an exit: {"loss", "accuracy",
            "agreement"}}, how often it chooses the class the whole model does.
    """

    model: Any
    sources: Sequence[Source]
    places: Sequence[int]
    batch_size: int
    bf16: bool
    steps: int
    report: Callable[[str], None]
    history: list[dict[str, Any]] = field(default_factory=list)

    def measure(self, step: int) -> None:
        """Measure once a step, and say what was found.

        Raises:
            TrainingError: a loss is not finite.
        """
        if not self.sources or (self.history and self.history[-1]["step"] == step):
            return
        found = [
            measured(*(self.model, source, self.places), batch_size=self.batch_size, bf16=self.bf16)
            for source in self.sources
        ]
        sizes, end = [len(source) for source in self.sources], end_of(self.model)
        means = {at: _mean([one[at] for one in found], sum(sizes)) for at in found[0]}
        if not math.isfinite(means[end]["loss"]):
            raise TrainingError(
                f"the validation loss is {means[end]['loss']}",
                where=f"step {step}",
                hint="Lower --lr, lengthen --warmup, or look at the held-out data.",
            )
        self.history.append(
            {
                "step": step,
                "loss": means[end]["loss"],
                "accuracy": means[end]["accuracy"],
                "names": [source.name for source in self.sources],
                "losses": [one[end]["loss"] / size for one, size in zip(found, sizes, strict=True)],
                "exits": {str(at): means[at] for at in self.places},
            }
        )
        for line in validation_lines(self.history[-1]):
            self.report(f"step {step}/{self.steps}: {line}")


def validation_lines(entry: Mapping[str, Any]) -> list[str]:
    """Return one line about each exit of an entry of a history, and one about the whole model."""
    return [
        *(
            f"exit after {at} blocks: validation {each['loss']:.4f}, {each['accuracy']:.1%} right, "
            f"{each['agreement']:.1%} as the whole model"
            for at, each in entry["exits"].items()
        ),
        f"whole model: validation {entry['loss']:.4f}, {entry['accuracy']:.1%} right",
    ]


def _mean(sums: Sequence[Mapping[str, float]], count: int) -> dict[str, float]:
    return {name: sum(one[name] for one in sums) / count for name in sums[0]}
