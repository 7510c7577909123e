"""`adaconvert finetune` as a user runs it."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from adaconvert.cli import main
from adaconvert.cli.finetune import finetune
from adaconvert.train.config import SPARSITY_OPTIONS, FinetuneConfig, Sparsity


def test_defaults_of_the_command_are_those_of_the_config() -> None:
    flags = {param.name for param in finetune.params if getattr(param, "is_flag", False)}
    given = {p.name: False if p.name in flags else p.default for p in finetune.params}
    own = {item.name: item.default for item in fields(FinetuneConfig)}
    penalty = {item.name: item.default for item in fields(Sparsity)}
    for name, default in own.items():
        if name not in {"data", "sparsity", "report_to"}:
            assert name in given
            # an option without a default has another way to say None
            assert default is MISSING or given[name] == default or default is None, name
    for option, field in SPARSITY_OPTIONS.items():
        assert given[option] == penalty[field]


def test_lines_go_to_stderr_and_one_document_to_stdout(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["finetune", str(dense), str(out), "--data", str(text), "--tokens", "1k", "--json"]
    command += ["--seq-len", "32", "--batch-size", "4", "--device", "cpu", "--activation", "relu"]
    assert main.run(command) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["steps"] == 8
    assert found["last"]["sparsity"] == found["curve"][-1]["sparsity"]
    assert "step 8/8: lm" in said.err
    assert out.is_dir()


def test_missing_budget_is_a_usage_error(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["finetune", str(dense), str(tmp_path / "out"), "--data", str(text)]) == 2
    assert "--tokens: give either tokens or steps" in capsys.readouterr().err
