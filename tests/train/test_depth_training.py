"""Fine-tunes of blocks that tokens may skip: what learns, that the budget is held, what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.stored import moved, tensors_of
from adaconvert.train.depth_budget import share_for
from adaconvert.train.result import FinetuneResult

from .conftest import reach

Tune = Callable[..., FinetuneResult]
Make = Callable[..., Path]


def slots_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the "layer" slots by path."""
    adaptive = json.loads((folder / "config.json").read_text())["adaptive"]
    return {path: slots["layer"] for path, slots in adaptive["sites"].items()}


def budget(folder: Path) -> float:
    """Return a budget halfway between all blocks and none."""
    model: Any = load_model(folder)
    low, high = reach(model)
    return low + (high - low) / 2


@pytest.mark.parametrize("fit", [0, 8192])
@pytest.mark.parametrize("kind", ["skip", "skip-kv"])
def test_routers_and_adapters_learn_within_the_budget_on_a_frozen_trunk(
    kind: str, fit: int, routed: Make, tune: Tune, tmp_path: Path, text: Path
) -> None:
    source = routed(kind)
    lines: list[str] = []
    result = tune(
        source,
        **{"train": ("depth",), "depth_compute": budget(source), "steps": 30, "lr": 1e-2},
        depth_fit=fit,
        valid=[str(text)],
        valid_tokens=600,
        report=lines.append,
    )
    own = {name for name in tensors_of(source) if ".depth." in name}
    assert moved(source, tmp_path / "out") == own
    first, last = result.summary["validation"]
    if fit and kind == "skip":
        assert first["compute"] == pytest.approx(budget(source), abs=0.05)
    else:
        assert first["run"] == 1.0
    assert last["compute"] == pytest.approx(budget(source), abs=0.03)
    assert last["run"] == pytest.approx(result.curve[-1]["run"], abs=0.1)
    assert "top_k" not in last
    assert any(f"run {last['run']:.1%}, compute {last['compute']:.3f}" in line for line in lines)
    written = slots_of(tmp_path / "out").items()
    thresholds = {path: slot["select"]["threshold"] for path, slot in written}
    assert thresholds == result.summary["depth"]["thresholds"]


def test_the_written_model_runs_what_was_measured(
    routed: Make, tune: Tune, tmp_path: Path, text: Path
) -> None:
    source = routed()
    tune(source, train=("depth",), depth_compute=budget(source), steps=20, lr=1e-2)
    again = tune(
        tmp_path / "out",
        "again",
        **{"train": ("depth",), "lr": 1e-9, "steps": 1, "valid": [str(text)]},
    )
    model: Any = load_model(tmp_path / "out")
    ids = torch.arange(64).reshape(2, 32)
    with torch.no_grad(), model.account() as account:
        model(input_ids=ids)
    ran = sum(layer.run for layer in account.layers.values())
    assert 0 < ran < sum(layer.tokens for layer in account.layers.values())
    # without a budget thresholds stay as they are
    assert again.summary["validation"][0]["run"] == again.summary["validation"][-1]["run"]
    assert slots_of(tmp_path / "again") == slots_of(tmp_path / "out")


def test_mixture_of_depths_comes_down_to_its_capacity(
    routed: Make, tune: Tune, tmp_path: Path, text: Path
) -> None:
    source = routed("mod")
    lines: list[str] = []
    result = tune(
        source,
        **{"steps": 30, "depth_ramp": 0.5, "valid": [str(text)], "valid_tokens": 600},
        log_every=1,
        report=lines.append,
    )
    runs = [entry["run"] for entry in result.curve]
    assert runs[0] == 1.0
    assert runs == sorted(runs, reverse=True)
    assert runs[-1] == 0.5
    assert all(0 <= entry["predicted"] <= 1 for entry in result.curve)
    first, last = result.summary["validation"]
    assert first["top_k"] == pytest.approx(first["loss"], rel=1e-6)
    assert last["run"] == pytest.approx(0.5, abs=0.12)
    assert any("looking ahead, optimistic" in line for line in lines)
    before, after = slots_of(source), slots_of(tmp_path / "out")
    for path, slot in after.items():
        assert slot | {"select": None} == before[path] | {"select": None}
        assert slot["select"]["threshold"] != 0.0
    names = moved(source, tmp_path / "out")
    assert all(name in names for name in tensors_of(source) if ".predictor." in name)


def test_a_budget_decides_the_capacity(routed: Make, tune: Tune, tmp_path: Path) -> None:
    source = routed("mod")
    result = tune(source, steps=4, depth_compute=budget(source), depth_ramp=0.0)
    model: Any = load_model(source)
    wanted, _ = share_for(model, list(slots_of(source)), budget(source))
    assert {slot["capacity"] for slot in slots_of(tmp_path / "out").values()} == {wanted}
    assert result.summary["options"]["depth"]["compute"] == budget(source)


def test_the_routers_own_logit_learns_whom_it_chose_and_reaches_nothing_else(
    routed: Make, tune: Tune, tmp_path: Path
) -> None:
    results = {}
    for factor in (0.0, None, 1.0):
        source = routed("mod", f"source-{factor}", predictor=None)
        tune(source, f"out-{factor}", **_quick(predictor_loss=factor))
        results[factor] = tensors_of(tmp_path / f"out-{factor}")
    differing = {
        name for name, value in results[0.0].items() if not torch.equal(value, results[1.0][name])
    }
    # a router that decides itself learns of that only where it is asked for
    assert all(torch.equal(value, results[None][name]) for name, value in results[0.0].items())
    # one step: what it moves later follows from another choice
    assert differing == {f"model.layers.{index}.depth.router.bias" for index in (1, 2)} | {
        f"model.layers.{index}.depth.router.weight" for index in (1, 2)
    }


def _quick(**more: Any) -> Mapping[str, Any]:
    # the first step of a warm-up has rate 0
    return {
        **{"steps": 1, "warmup": 0.0, "schedule": "constant", "optimizer": "sgd"},
        **{"max_grad_norm": 0.0, **more},
    }


@pytest.mark.parametrize("kind", ["skip", "mod"])
def test_accumulation_and_recomputation_change_nothing(
    kind: str, routed: Make, tune: Tune, tmp_path: Path
) -> None:
    source = routed(kind, start=False)
    given: dict[str, Any] = {
        **{"steps": 3, "depth_compute": budget(source), "precision": "fp64", "depth_ramp": 0.0},
        **{"optimizer": "sgd", "lr": 1e-2},
    }
    found = {}
    for name, more in {
        "whole": {},
        "parts": {"batch_size": 1, "accumulate": 4},
        "again": {"checkpointing": True},
    }.items():
        result = tune(source, name, **{**given, **more})
        found[name] = (tensors_of(tmp_path / name), result.summary["depth"]["thresholds"])
    for name in ("parts", "again"):
        for key, value in found["whole"][0].items():
            torch.testing.assert_close(found[name][0][key], value, rtol=1e-6, atol=1e-7)
        for path, threshold in found["whole"][1].items():
            assert found[name][1][path] == pytest.approx(threshold, abs=1e-6)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(
    routed: Make, tune: Tune, tmp_path: Path
) -> None:
    source = routed()
    given: dict[str, Any] = {
        **{"train": ("depth",), "depth_compute": budget(source), "steps": 12, "lr": 1e-2},
        **{"save_every": 4, "log_every": 2},
    }
    whole = tune(source, "whole", **given)

    def stop(line: str) -> None:
        if line.startswith("step 8/"):
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError):
        tune(source, "parts", report=stop, **given)
    parts = tune(source, "parts", resume=True, **given)
    assert parts.summary == whole.summary
    assert not moved(tmp_path / "whole", tmp_path / "parts")


def test_blocks_that_no_token_runs_stay_so_and_their_adapters_learn(
    routed: Make, tune: Tune, tmp_path: Path
) -> None:
    source = routed()
    config = json.loads((source / "config.json").read_text())
    gone, other = config["adaptive"]["sites"]
    config["adaptive"]["sites"][gone]["layer"]["select"] = {"rule": "none"}
    (source / "config.json").write_text(json.dumps(config))
    found = reach(load_model(source), [other])
    result = tune(
        source, train=("depth",), depth_compute=sum(found) / 2, steps=20, lr=1e-2, depth_ramp=0.2
    )
    assert list(result.summary["depth"]["thresholds"]) == [other]
    assert slots_of(tmp_path / "out")[gone]["select"] == {"rule": "none"}
    names = moved(source, tmp_path / "out")
    assert f"{gone}.depth.adapter.up.weight" in names
    assert f"{gone}.depth.router.weight" not in names


@pytest.mark.parametrize("kind", ["skip", "mod"])
def test_adapters_of_low_rank_learn_beside_routers(
    kind: str, routed: Make, tune: Tune, tmp_path: Path
) -> None:
    source = routed(kind)
    result = tune(source, train=("depth",), lora=2, depth_compute=budget(source), steps=6)
    assert result.summary["validation"] == []
    names = moved(source, tmp_path / "out")
    assert any("q_proj" in name or "up_proj" in name for name in names)
    assert any(".depth.router." in name for name in names)
    model: Any = load_model(tmp_path / "out")
    assert model(input_ids=torch.arange(8)[None]).logits.shape == (1, 8, 320)


def test_distillation_from_the_model_as_it_was(routed: Make, tune: Tune) -> None:
    source = routed(start=False)
    result = tune(
        source,
        **{"train": ("depth",), "distill": 1.0, "lm": 0.0, "steps": 2, "log_every": 1},
        depth_compute=budget(source),
    )
    # every block of the teacher runs, those of the student do not
    assert result.curve[0]["distill"] > 1e-3


def test_experts_alone_learn_beside_decisions_as_they_are_stored(
    routed: Make, tune: Tune, tmp_path: Path
) -> None:
    source = routed("mod", start=False)
    result = tune(source, train=("mlp",), steps=2)
    assert "depth" not in result.summary
    assert slots_of(tmp_path / "out") == slots_of(source)
    assert not any(".depth." in name for name in moved(source, tmp_path / "out"))


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("skip", {"depth_compute": 0.01}, "blocks that tokens may skip reach"),
        ("skip", {"depth_compute": 0.0}, "out of range"),
        ("skip", {"depth_ramp": 0.3}, "does nothing without --depth-compute"),
        ("skip", {"predictor_loss": 0.3}, "is for blocks of --kind mod"),
        ("mod", {"depth_ramp": 1.5}, "out of range"),
        ("mod", {"train": ("mlp",), "depth_compute": 0.9}, "no router of a block is trained"),
        ("mod", {"compile": True}, "cannot be combined"),
    ],
)
def test_what_cannot_be(
    kind: str, given: dict[str, Any], message: str, routed: Make, tune: Tune
) -> None:
    with pytest.raises(OptionError, match=message):
        tune(routed(kind), **given)


def test_a_gate_that_teaches_nothing_and_a_model_without_blocks(
    deep: Path, routed: Make, tune: Tune
) -> None:
    with pytest.raises(OptionError, match="teach their routers nothing"):
        tune(routed("mod", gate=0.0))
    with pytest.raises(OptionError, match="has no blocks whose tokens are chosen"):
        tune(deep, depth_compute=0.9)
