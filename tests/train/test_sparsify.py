"""The activation that takes the old one's place little by little."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from adaconvert.errors import OptionError
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import open_source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.networks_by_hand import add_networks
from adaconvert.train.config import Sparsity
from adaconvert.train.losses import square_hoyer
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


@pytest.fixture
def networks(tmp_path: Path) -> Callable[..., Path]:
    """Return what makes a model with networks in place of its projections."""

    def made(**options: Any) -> Path:
        dense = tiny_models.make("llama", tmp_path / "dense", max_shard_size="1GB")
        folder = make_adaptive(dense, tmp_path / "networks", router="param-center", experts=8)
        add_networks(folder, **options)
        return folder

    return made


@pytest.mark.parametrize("select", [None, {"rule": "top-k", "k": 2}])
@pytest.mark.parametrize("keep_ffn", [True, False])
def test_the_penalty_holds_for_networks_in_place_of_projections(
    networks: Callable[..., Path], select: dict[str, Any] | None, keep_ffn: bool
) -> None:
    folder = networks(roles="qv", keep_ffn=keep_ffn)
    spec = open_source(str(folder)).spec
    ids = torch.arange(24).reshape(2, 12)

    def model() -> Any:
        with quiet():
            found: Any = load_model(folder, dtype="float32").train()
        if select is not None:
            found.set_select(**select)
        return found

    def gradients(found: Any) -> dict[str, torch.Tensor]:
        return {n: p.grad for n, p in found.named_parameters() if p.grad is not None}

    watched, meter = model(), Meter(Sparsity(coefficient=0.1))
    attach(watched, spec, meter)
    assert (meter.ffn, meter.projections) == (2, 4)
    meter.begin(coefficient=0.1, share=1.0, mask=None)
    watched(input_ids=ids).logits.square().mean().backward()
    penalty, ffn, others = meter.drain(1)
    assert (len(ffn), len(others)) == (2, 4)
    assert all(0 < zeros < 1 for zeros in others)

    plain = model()
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for path in (f"model.layers.{i}.{p}" for i in (0, 1) for p in ("mlp", "q", "v")):
        is_ffn = path.endswith("mlp")
        own = plain.get_submodule(path if is_ffn else path[:-1] + f"self_attn.{path[-1]}_proj")
        _spy(own, seen[is_ffn])
    loss = plain(input_ids=ids).logits.square().mean()
    means = [sum(square_hoyer(a).mean() for a in kind) / len(kind) for kind in seen.values()]
    (loss + 0.1 * sum(means)).backward()
    assert penalty == pytest.approx(float(sum(means).detach()), rel=1e-5)  # type: ignore[union-attr]
    expected = gradients(plain)
    for name, found in gradients(watched).items():
        # the same float32 operations, added in another order
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6)


def _spy(module: Any, into: list[torch.Tensor]) -> None:
    """Every output of a network's activation is kept, whichever way it runs."""

    def kept(x: torch.Tensor) -> torch.Tensor:
        into.append(x)
        return x

    name = "act_fn" if hasattr(module, "act_fn") else "act"
    getattr(module, name).register_forward_hook(lambda own, args, output: kept(output))
    if hasattr(module, "adaptive_activation"):
        activation = module.adaptive_activation
        object.__setattr__(module, "adaptive_activation", lambda x: kept(activation(x)))


def test_a_fine_tune_tells_their_zeros_apart(networks: Callable[..., Path], tune: Any) -> None:
    given = {"steps": 4, "activation": "relu", "sparsity": 0.01, "log_every": 1}
    report: list[str] = []
    found = tune(networks(), "a", report=report.append, **given)
    last = found.curve[-1]
    assert len(last["sparsity_by_layer"]) == 2
    assert 0 < last["projection_sparsity"] < 1
    assert "projection zeros" in report[-1]
    assert any(line.strip().startswith("in projections ") for line in found.lines())
    config = json.loads((found.destination / "config.json").read_text())
    network = config["adaptive"]["sites"]["model.layers.0.self_attn.q_proj"]["linear"]["mlp"]
    assert network["activation"] == config["hidden_act"] == "relu"


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
