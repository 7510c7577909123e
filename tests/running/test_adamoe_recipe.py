"""Recipes with null experts, on a tiny model: planned before their mixture exists, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import OptionError
from adaconvert.testing import tiny_models

NAME = "adamoe/smollm2-135m"
#: of a recipe that makes the mixture and its null experts in one stage.
AT_ONCE = """\
schema: 1
title: T
method: adamoe
paper: p
exactness: needs training
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {train: [train.jsonl]}
stages:
  - adamoe: {experts: 4, base_top_k: 2, null_experts: 8, target_compute: 0.6}
  - name: adapt
    finetune: {data: $train, steps: 2, seq_len: 16, batch_size: 2, train: router}
"""


def settings_of(bench: Any) -> list[str]:
    """Return settings for a tiny run of the shipped recipe."""
    train = bench.folder / "train.jsonl"
    found = [f"data.{name}={train}" for name in ("train", "valid")]
    for stage in ("tune", "adapt"):
        small = {"tokens": "", "steps": 2, "seq_len": 16, "batch_size": 2}
        found += [f"{stage}.{option}={value}" for option, value in small.items()]
    return [*found, "evaluate.length=16", "evaluate.speed=false"]


def nulls_of(folder: Path) -> list[dict[str, Any]]:
    """Return what the config of a checkpoint says of the null experts of each block."""
    sites = json.loads((folder / "config.json").read_text())["adaptive"]["sites"]
    return [slots["ffn"]["null"] for slots in sites.values()]


def weights_of(folder: Path) -> int:
    """Return the bytes of the weights of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def test_what_was_planned_is_what_is_made(bench: Any) -> None:
    dense, out, settings = bench.folder / "dense", bench.folder / "out", settings_of(bench)
    planned = api.run(NAME, dense, out, settings=settings, dry_run=True).outline
    plans = {stage.name: stage for stage in planned.stages}
    assert plans["adamoe"].exactness == "exact"
    # null rows in float32 and a bias for each of two blocks, and their names
    rows = plans["adamoe"].disk - plans["upcycle"].disk
    assert 0 <= rows - 2 * 4 * (4 * 32 + 1) < 1000
    assert plans["adapt"].memory > plans["adapt"].disk
    done = api.run(NAME, dense, out, settings=settings)
    facts = {stage.name: stage.facts for stage in done.stages}
    assert "verified" in facts["adamoe"]
    assert "of the experts run" in facts["adapt"]
    assert "of the experts run" not in facts["tune"]
    for nulls in nulls_of(out):
        assert (nulls["count"], nulls["slots"], nulls["target"]) == (4, 4, 0.7)
    made = weights_of(bench.folder / ".out.run" / "dense-adamoe")
    # a header is padded
    assert 0 <= plans["adamoe"].disk - made < 1000


def test_a_dense_model_in_one_stage(bench: Any) -> None:
    (bench.folder / "r.yaml").write_text(AT_ONCE)
    where = (bench.folder / "r.yaml", bench.folder / "dense", bench.folder / "out")
    api.run(*where)
    for nulls in nulls_of(bench.folder / "out"):
        assert (nulls["count"], nulls["slots"]) == (8, 6)
        # copies of one network: none of them would leave the token without any
        assert (nulls["min_real"], nulls["target"]) == (1, 0.6)
    assert {stage.status for stage in api.run(*where).stages} == {"unchanged"}


def test_a_target_out_of_reach_is_refused_before_anything_is_made(bench: Any) -> None:
    given = {"settings": [*settings_of(bench), "adamoe.target_compute=3"], "dry_run": True}
    with pytest.raises(OptionError) as caught:
        api.run(NAME, bench.folder / "dense", bench.folder / "out", **given)
    message = str(caught.value)
    assert "stage 'adamoe'" in message
    assert "--target-compute" in message
    assert not (bench.folder / ".out.run").exists()


def test_a_mixture_that_is_one_already(bench: Any) -> None:
    pytest.importorskip("peft")
    source = tiny_models.make("olmoe", bench.folder / "olmoe")
    settings = [setting for setting in settings_of(bench) if not setting.startswith("tune.")]
    settings += ["adamoe.null_experts=4", "adapt.accumulate=1", "adapt.lora=4"]
    done = api.run("adamoe/olmoe-1b-7b", source, bench.folder / "out", settings=settings)
    start, adapted, _, _ = done.stages
    assert start.facts == "adaptive_olmoe, exact, verified"
    # adapters were added to the experts, the router is whole
    assert set(adapted.result["by_part"]) == {"adapters", "router"}
    assert [nulls["target"] for nulls in nulls_of(bench.folder / "out")] == [0.85] * 2
