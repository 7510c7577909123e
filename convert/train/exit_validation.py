"""What exits lose on held-out text, and how often they choose what the whole model does."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adaconvert.train.validation import Held

#: blocks before an exit -> {"loss", "agreement"}, means over the counted tokens.
Measured = dict[int, dict[str, float]]
_LOGGED = re.compile(r"eval_exit_([0-9]+)_(loss|agreement)")


def measured_exits(trainer: Any, held: Sequence[Held], batch_size: int) -> Measured:
    """Return how the exits of a trainer's model do; empty where none are trained.

    Args:
        trainer: with the attribute `exits`.
        held: the text.
        batch_size: blocks that run together.
    """
    from adaconvert.train.validation import batches

    if trainer.exits is None:
        return {}
    model = trainer.model
    sums: dict[int, tuple[float, float, int]] = {}
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    for source in held:
        for ids, mask, targets in batches(source, batch_size):
            fed = {"input_ids": ids.to(device)}
            if mask is not None:
                fed["attention_mask"] = mask.to(device)
            for at, new in trainer.exits.measured(fed, targets.to(device)).items():
                old = sums.get(at, (0.0, 0.0, 0))
                sums[at] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])
    model.train(was_training)
    return {
        at: {"loss": loss / max(count, 1), "agreement": agreed / max(count, 1)}
        for at, (loss, agreed, count) in sums.items()
        if at in trainer.exits.shown
    }


def logged_exits(found: Measured) -> dict[str, float]:
    """Return the measurements by the names they are logged under."""
    return {f"eval_exit_{at}_{n}": value for at, each in found.items() for n, value in each.items()}


def recalled_exits(logged: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"exits": the measurements} of a log entry; nothing where it has none."""
    found: dict[str, dict[str, float]] = {}
    for name, value in logged.items():
        match = _LOGGED.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[match[2]] = value
    return {"exits": found} if found else {}


def exit_lines(found: Measured) -> list[str]:
    """Return one line about each exit."""
    return [
        f"  exit after {at} blocks: validation {each['loss']:.4f}, "
        f"chooses as the whole model {each['agreement']:.1%}"
        for at, each in found.items()
    ]
