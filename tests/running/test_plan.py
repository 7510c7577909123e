"""The plan of a run: sizes of stages whose source does not exist yet, and nothing on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.errors import OptionError, SourceError
from adaconvert.running.estimate import MACHINES, cost_of
from adaconvert.testing import stand_ins

HEAD = """\
schema: 1
title: T
method: m
paper: p
exactness: exact
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {train: []}
stages:
"""


def test_a_dry_run_leaves_nothing(bench: Any) -> None:
    before = {path.name for path in bench.folder.iterdir()}
    result = bench.run(dry_run=True, settings=("data.train=[]", "data.valid=[]"))
    assert {path.name for path in bench.folder.iterdir()} == before
    assert bench.called == []
    assert "note: data.train is still to be given" in result.lines()
    assert [stage.status for stage in result.outline.stages] == [*["to do"] * 3, "left out"]
    json.dumps(result.to_json())


def test_sizes_are_those_of_the_real_stages(bench: Any) -> None:
    planned = {stage.name: stage for stage in bench.run(dry_run=True).outline.stages}
    report = api.plan(bench.folder / "dense", experts=2)
    assert planned["upcycle"].disk == planned["tune"].disk == report.disk
    assert planned["upcycle"].exactness == "exact"
    tune = planned["tune"]
    assert tune.memory is not None
    assert tune.memory > report.disk
    # three passes over 16 tokens, attention over 8 of them included
    assert 1 < tune.flops / (3 * 16 * 2 * report.after.active_params) < 1.05


def test_a_dry_run_says_what_is_there(bench: Any) -> None:
    bench.run()
    planned = bench.run(dry_run=True, settings=("tune.lr=1e-3",)).outline
    assert [stage.status for stage in planned.stages] == [
        "unchanged",
        "to do",
        "to do",
        "left out",
    ]
    assert planned.disk == planned.stages[1].disk


def test_a_conversion_of_a_conversion_is_planned(bench: Any) -> None:
    stages = "  - moefy: {num_experts: 4}\n  - name: back\n    unmoefy:\n"
    (bench.folder / "r.yaml").write_text(HEAD + stages)
    moefy, back = bench.run(dry_run=True).outline.stages
    assert back.inputs == ("moefy",)
    dense = api.inspect(bench.folder / "dense")
    assert back.report is not None
    assert back.report.target == "llama"
    assert back.report.after.total_params == dense.costs.total_params
    assert moefy.disk > 0


def test_several_specialists_are_planned(bench: Any) -> None:
    stages = """\
  - {name: a, from: source, finetune: {data: $train, steps: 1, seq_len: 8}}
  - {name: b, from: source, finetune: {data: $train, steps: 1, seq_len: 8}}
  - {name: mix, from: [a, b], upcycle: {experts: 2}}
"""
    (bench.folder / "r.yaml").write_text(HEAD + stages)
    planned = bench.run(dry_run=True).outline.stages
    assert [stage.inputs for stage in planned] == [("source",), ("source",), ("a", "b")]
    assert planned[2].exactness == "needs-training"


def test_what_a_later_stage_cannot_do_is_said_before_the_first(bench: Any) -> None:
    stages = "  - moefy: {num_experts: 4}\n  - upcycle: {experts: 2}\n"
    (bench.folder / "r.yaml").write_text(HEAD + stages)
    with pytest.raises(SourceError, match=r"stage 'upcycle': .*already adaptive"):
        bench.run(dry_run=True)
    split = "  - moefy: {num_experts: 4}\n  - finetune: {data: $train, steps: 1, select: "
    for stages, message in (
        ("  - finetune: {data: $train, steps: 1, train: exits}\n", "--train exits: matches no"),
        ("  - finetune: {data: $train, steps: 1, compute: 0.9}\n", "--compute: dense is not adap"),
        (f"{split}'rule=top-k,k=9'}}\n", "--select or --compute: .*k is 9, expected 1 to 4"),
    ):
        (bench.folder / "r.yaml").write_text(HEAD + stages)
        with pytest.raises(OptionError, match=f"stage 'finetune': {message}"):
            bench.run(dry_run=True)


def test_a_stand_in_is_the_model_without_its_weights(tmp_path: Path) -> None:
    folder = stand_ins.make("mistral-7b", tmp_path / "mistral")
    found = api.inspect(folder)
    assert (found.costs.total_params, found.tensors) == (7_248_023_552, 291)
    taken = sum(path.stat().st_blocks * 512 for path in folder.iterdir())
    assert taken < 1 << 20


def test_costs_are_labelled(bench: Any) -> None:
    outline = bench.run(dry_run=True).outline
    for machine in MACHINES:
        cost = cost_of(outline, machine)
        assert cost["basis"] == "estimate"
        assert cost["machine"] == machine
        assert cost["time"].startswith("about 1 minute at ")
