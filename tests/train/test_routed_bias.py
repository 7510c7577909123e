"""Biases that balance experts without a loss: what is kept of them, and in which dtype."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train import routing_setup
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.parts import choose
from adaconvert.train.result import FinetuneResult

Tune = Callable[..., FinetuneResult]
BIAS: dict[str, Any] = {
    **{"balance_kind": "bias", "balance_rate": 0.1, "steps": 6, "seq_len": 16},
    **{"save_every": 2, "log_every": 1},
}


# a parameter in the one, a buffer in the other
@pytest.mark.parametrize("family", ["ernie4_5_moe", "glm4_moe"])
@pytest.mark.parametrize("part", ["experts", "all"])
def test_bias_that_moved_is_resumed(family: str, part: str, tune: Tune, tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("step 5/"):
            raise KeyboardInterrupt

    source = tiny_models.make(family, tmp_path / "src")
    whole = tune(source, "whole", train=(part,), **BIAS)
    with pytest.raises(InterruptedRunError):
        tune(source, report=stop, train=(part,), **BIAS)
    resumed = tune(source, resume=True, train=(part,), **BIAS)
    assert [e["lm"] for e in resumed.curve] == [e["lm"] for e in whole.curve]
    start, expected, found = (tensors_of(tmp_path / name) for name in ("src", "whole", "out"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    biases = [name for name in start if name.endswith("e_score_correction_bias")]
    assert biases
    assert not any(torch.equal(found[name], start[name]) for name in biases)


def test_bias_in_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny_models.make("ernie4_5_moe", tmp_path / "src")
    model: Any = load_model(source)
    config = FinetuneConfig.of(["x"], {"steps": 1, "balance_kind": "bias"})
    monkeypatch.setattr(routing_setup, "is_sharded", lambda value: value is not None)
    with pytest.raises(OptionError, match="cannot be combined with --expert-parallel for ernie"):
        routing_setup.prepare(model, open_source(str(source)), config, choose(model, ("all",)))


@pytest.mark.parametrize(
    ("family", "dtype", "wide"),
    [
        ("granitemoe", "bfloat16", None),
        ("glm4_moe", "bfloat16", "e_score_correction_bias"),
        ("glm4_moe", "float32", None),
    ],
)
def test_stored_dtype_is_that_of_every_tensor_but_a_bias(
    family: str, dtype: str, wide: str | None, tune: Tune, tmp_path: Path
) -> None:
    other = "float32" if dtype == "bfloat16" else "bfloat16"
    source = tiny_models.make(family, tmp_path / "src", dtype=other)
    tune(source, steps=1, dtype=dtype)
    differing = {n for n, t in tensors_of(tmp_path / "out").items() if str(t.dtype)[6:] != dtype}
    assert {name.rpartition(".")[2] for name in differing} == ({wide} if wide else set())
