"""What a user of `early-exit` should know, one sentence each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from adaconvert.arch.exits import CAUSAL, NOT_SLICED, is_taken
from adaconvert.methods.early_exit.config import SHARED, UNTIED, EarlyExitOptions
from adaconvert.methods.early_exit.drafting import drafting_of, words
from adaconvert.methods.sources import Described

_TRAIN = {
    "exits": "the exits are copies of the model's own end, which reads blocks it was never trained "
    "on: train them (`adaconvert finetune --train exits`) before any is taken or drafts",
    "shared": "a shared head reads blocks it was never trained on, and only training the whole "
    "model makes it good there (`adaconvert finetune --early-exit-loss`): until then drafts are "
    "seldom accepted and exits are wrong",
}


def of_stock(options: EarlyExitOptions, item: Described, places: Sequence[int]) -> tuple[str, ...]:
    """Return the notes on a stock checkpoint."""
    draft = options.draft(places)
    at, tokens = int(str(draft["at"])), int(str(draft["tokens"]))
    return (
        f"a stock checkpoint: `model.generate(**inputs, assistant_early_exit={at})` drafts from "
        f"exit {at} and gives the text it would give without, for one sequence at a time",
        _TRAIN["shared"],
        words(drafting_of(item, at, tokens, None), at),
    )


def of(options: EarlyExitOptions, item: Described, content: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the notes on an adaptive checkpoint with these exits."""
    return tuple(_notes(options, item, content))


def _notes(options: EarlyExitOptions, item: Described, content: Mapping[str, Any]) -> Iterator[str]:
    spec = item.spec
    yield _TRAIN["shared" if options.head == SHARED else "exits"]
    if is_taken(content):
        yield (
            "thresholds were set by hand, so nothing is known of what leaving early costs: "
            "`adaconvert calibrate` sets them for a stated risk"
        )
    if options.confidence:
        yield "the classifiers trust no exit until they are trained (sigmoid(0) is 0.5)"
    if content["kind"] != CAUSAL:
        return
    if options.head in UNTIED and not options.tie_heads:
        yield (
            f"each exit has an output matrix of its own, {spec.vocab} x {spec.hidden}; "
            "--tie-heads saves it"
        )
    if spec.model_type in NOT_SLICED:
        yield (
            f"stock `generate(assistant_early_exit=k)` fails with {spec.model_type}, whose code "
            "runs every block in any case; `generate(draft_exit=k)` of this checkpoint works"
        )
    draft = content["draft"]
    if draft is not None:
        found = drafting_of(item, draft["at"], draft["tokens"], draft["vocab"], options.head)
        yield words(found, draft["at"])
        if draft["vocab"] is not None and options.draft_data is None:
            yield (
                f"a draft chooses among the first {draft['vocab']} tokens of the vocabulary; "
                "--draft-data takes the most frequent ones of a text instead"
            )
