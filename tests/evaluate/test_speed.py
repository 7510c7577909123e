"""Speed is measured in turns, after a warm-up, and every variant is fed the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.evaluate import speed
from adaconvert.evaluate.perplexity import Variant
from adaconvert.evaluate.settings import STORED
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models


class Clock:
    """Time that passes only when a model runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Watched:
    """A model that takes a tenth of a second a pass and remembers what it was given."""

    def __init__(self, name: str, model: Any, clock: Clock, log: list[Any]) -> None:
        self.name, self.model, self.clock, self.log = name, model, clock, log
        self.device, self.forward = model.device, model.forward

    def __call__(self, **given: Any) -> Any:
        self.clock.now += 0.1
        cache = given.get("past_key_values")
        past = 0 if cache is None else cache.get_seq_length()
        self.log.append((self.name, past, given["input_ids"][0].tolist()))
        return self.model(**given)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(tiny_models.make("llama", tmp_path_factory.mktemp("speed") / "model"))


def test_rates_turns_and_what_is_fed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(speed, "PROMPT", 8)
    variants = [
        Variant(label=name, model=Watched(name, model, clock, log), setting=STORED)
        for name in ("a", "b")
    ]
    ids = list(range(3, 23))
    found = speed.measure(variants, ids, rounds=2)
    for one in found:
        # 20 tokens a pass, 1 token a step, 0.1 s each
        assert one.prefill.median == pytest.approx(200, rel=1e-9)
        assert one.decode is not None
        assert one.decode.median == pytest.approx(10, rel=1e-9)
        assert (one.prefill_tokens, one.decode_tokens) == (20, 12)
        assert one.to_json()["decode_tokens"] == 12
    order = [name for name, past, given in log if past == 0 and len(given) == 8]
    assert order == ["a", "b", "b", "a", "a", "b"]
    steps = [(past, given) for name, past, given in log if name == "a" and past]
    assert steps == [(8 + i, [ids[8 + i]]) for i in range(12)] * 3


def test_a_slow_model_is_not_waited_for(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), []
    monkeypatch.setattr(speed, "time", clock)
    monkeypatch.setattr(speed, "SECONDS", 0.35)
    watched = Variant(label="a", model=Watched("a", model, clock, log), setting=STORED)
    speed.measure([watched], list(range(3, 43)), rounds=1)
    # two rounds: 4 whole passes, 1 prompt and 4 steps each
    assert len(log) == 2 * (4 + 1 + 4)


def test_short_text_is_not_decoded(model: Any) -> None:
    (found,) = speed.measure(
        [Variant(label="a", model=model, setting=STORED)], [3, 4, 5, 6], rounds=1
    )
    assert found.decode is None
    assert found.to_json()["decode_tokens_per_second"] is None
    assert found.prefill.low <= found.prefill.median <= found.prefill.high


def test_encoders_are_not_decoded(tmp_path: Path) -> None:
    made = tiny_models.make("bert", tmp_path / "m", architecture="BertForSequenceClassification")
    variant = Variant(label="a", model=load_model(made), setting=STORED)
    (found,) = speed.measure([variant], list(range(3, 43)), decode=False, rounds=1)
    assert found.decode is None
    assert not torch.is_inference_mode_enabled()
