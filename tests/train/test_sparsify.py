"""The activation that takes the old one's place little by little."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from adaconvert.errors import OptionError
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train.config import Sparsity
from adaconvert.train.sparsify import Meter, attach, replaced


def test_newness_rises_to_one_within_its_share_of_the_run() -> None:
    settings = Sparsity(activation="relu", blend=0.5)
    assert [settings.newness(step, 8) for step in (0, 1, 3, 4, 7)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    assert Sparsity(activation="relu").newness(0, 8) == 1.0


@pytest.mark.parametrize("kind", ["dense", "adaptive"])
def test_only_training_mixes_the_activations(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    spec = open_source(str(folder)).spec
    settings = Sparsity(activation="relu", blend=1.0)
    with quiet():
        model: Any = load_model(folder, dtype="float32", **_relu(folder))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        fresh = model(input_ids=ids).logits
    meter = Meter(settings)
    old = replaced(spec, settings)
    attach(model, spec, meter, old)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    blend = meter.blend

    def watched(x: torch.Tensor, activated: torch.Tensor, was: Any) -> torch.Tensor:
        found = blend(x, activated, was)
        seen.append((x, found))
        return found

    meter.blend = watched  # type: ignore[method-assign]
    meter.begin(coefficient=0.0, share=1.0, mask=None, newness=0.25)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, fresh)
    assert seen == []
    model.train()(input_ids=ids).logits.sum().backward()
    assert len(seen) == spec.layers
    for x, found in seen:
        expected = 0.75 * functional.silu(x) + 0.25 * functional.relu(x)
        # one rounding of float32 apart
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def _relu(folder: Path) -> dict[str, Any]:
    from adaconvert.train.sparsify import with_activation

    item = open_source(str(folder))
    return with_activation(json.loads((folder / "config.json").read_text()), item.spec, "relu")


def test_a_ramp_ends_in_the_new_activation(dense: Path, tune: Any) -> None:
    given = {"steps": 2, "activation": "relu"}
    at_once = tune(dense, "a", **given)
    slowly = tune(dense, "b", activation_ramp=1.0, **given)
    configs = [json.loads((r.destination / "config.json").read_text()) for r in (at_once, slowly)]
    assert [config["hidden_act"] for config in configs] == ["relu", "relu"]
    assert at_once.curve[0]["lm"] != slowly.curve[0]["lm"]


def test_a_ramp_longer_than_the_run_is_refused() -> None:
    with pytest.raises(OptionError, match="--activation-ramp: is out of range"):
        Sparsity(activation="relu", blend=1.5)
