"""Whether two outcomes are the same function, as far as greedy tokens and probabilities show."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from outcome import LOADED, Outcome, Position

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
# float32 in another order of operations: runtimes that agree were seen to differ by 3e-4
LOG_PROBABILITY_TOLERANCE = 5e-3
# of the largest logit: what `verify` holds an exact conversion to
LOGIT_TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """How an outcome compares with the one it should equal.

    Attributes:
        observed: RIGHT, WRONG or REFUSED.
        equal: new tokens up to the first that differs, over all prompts.
        tokens: new tokens of the reference.
        log_probability: largest difference among the likeliest tokens of the equal positions.
        logits: largest difference over the prompts by the largest logit, None where not exposed.
        cut: whether the runtime cuts texts as tokenizer.json says: "same", "differs", or "none"
            when its tokenizer does not load.
        detail: what the runtime said.
    """

    observed: str
    equal: int = 0
    tokens: int = 0
    log_probability: float = 0.0
    logits: float | None = None
    cut: str = "none"
    detail: str = ""


def judge(
    outcome: Outcome,
    reference: Outcome,
    *,
    logits: tuple[Path, Path] | None,
    cut: list[list[int]],
) -> Judgement:
    """Return how `outcome` compares with `reference`, which must have loaded.

    Args:
        outcome: what to judge.
        reference: what it should equal.
        logits: the files with the logits of both, where both runtimes expose them.
        cut: token ids that tokenizer.json cuts the texts into.
    """
    if outcome.status != LOADED:
        return Judgement(observed=REFUSED, detail=outcome.detail)
    equal, difference = _agreement(outcome, reference)
    tokens = sum(map(len, reference.continuations))
    relative = _logit_difference(*logits) if logits else None
    same = (
        equal == tokens
        and difference <= LOG_PROBABILITY_TOLERANCE
        and (relative is None or relative <= LOGIT_TOLERANCE)
    )
    return Judgement(
        observed=RIGHT if same and not outcome.detail else WRONG,
        equal=equal,
        tokens=tokens,
        log_probability=difference,
        logits=relative,
        cut=_cut(outcome, cut),
        detail=outcome.detail or outcome.tokenizer_detail,
    )


def _agreement(outcome: Outcome, reference: Outcome) -> tuple[int, float]:
    equal, largest = 0, 0.0
    pairs = zip(outcome.continuations, reference.continuations, strict=True)
    for number, (found, wanted) in enumerate(pairs):
        for index, token in enumerate(wanted):
            position = reference.likeliest[number][index]
            if index >= len(found):
                break
            if found[index] != token:
                if _tied(position, found[index], token):
                    # two tokens of the same probability: from here on both are right
                    equal += len(wanted) - index
                break
            largest = max(largest, _difference(outcome.likeliest[number][index], position))
            equal += 1
    return equal, largest


def _tied(position: Position, found: int, wanted: int) -> bool:
    other = position.get(found)
    return other is not None and position[wanted] - other <= LOG_PROBABILITY_TOLERANCE


def _difference(found: Position, wanted: Position) -> float:
    # the last of the likeliest may not be the same ones; the common ones are compared
    common = found.keys() & wanted.keys()
    return max((abs(found[token] - wanted[token]) for token in common), default=0.0)


def _logit_difference(found: Path, wanted: Path) -> float:
    with np.load(found) as ours, np.load(wanted) as theirs:
        differences = [np.abs(ours[name] - theirs[name]).max() for name in theirs.files]
        largest = [np.abs(theirs[name]).max() for name in theirs.files]
    return float(max(differences) / max(largest))


def _cut(outcome: Outcome, expected: list[list[int]]) -> str:
    if outcome.texts_cut is None:
        return "none"
    return "same" if outcome.texts_cut == expected else "differs"
