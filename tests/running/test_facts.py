"""What a recipe's summary says of its stages."""

from __future__ import annotations

from typing import Any

import pytest

from adaconvert.running.result import facts_of

TUNED: dict[str, Any] = {
    "tokens": 64,
    "first": {"lm": 3.0, "exits": 9.0},
    "last": {"lm": 4.0, "exits": 2.0},
}


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"exits": 8}, "64 tokens, loss of the exits 9.0000 -> 2.0000"),
        ({"exits": 8, "rest": 4}, "64 tokens, loss 3.0000 -> 4.0000"),
    ],
)
def test_a_frozen_model_is_not_said_to_have_learnt(parts: dict[str, int], said: str) -> None:
    assert facts_of("finetune", {**TUNED, "by_part": parts}) == said
