"""`adaconvert finetune` as a user runs it."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from adaconvert.cli import main
from adaconvert.cli.finetune import finetune
from adaconvert.train.adapt_config import ADAPT_OPTIONS, MACHINE_OPTIONS
from adaconvert.train.config import SPARSITY_OPTIONS, FinetuneConfig
from adaconvert.train.depth_config import DEPTH_OPTIONS
from adaconvert.train.exit_config import EXIT_OPTIONS
from adaconvert.train.routing_config import ROUTING_OPTIONS
from adaconvert.train.run import RunSettings
from adaconvert.train.sources import READING_OPTIONS
from adaconvert.train.validation import VALIDATION_OPTIONS


def test_defaults_of_the_command_are_those_of_the_config() -> None:
    context = finetune.make_context("finetune", ["src", "dst", "--data", "x", "--steps", "1"])
    running = {item.name for item in fields(RunSettings)} | {"source", "as_json"}
    given = {name: value for name, value in context.params.items() if name not in running}
    plain = FinetuneConfig.of(["x"], {"steps": 1})
    assert FinetuneConfig.of(given.pop("data"), given) == plain


def test_every_option_of_the_config_is_one_of_the_command() -> None:
    nested = {item.name for item in fields(FinetuneConfig) if is_dataclass(item.default_factory)}
    # how many there are is not an option: whoever starts them says so
    own = {item.name for item in fields(FinetuneConfig)} - nested - {"processes"}
    known = {*own, *SPARSITY_OPTIONS, *READING_OPTIONS, *VALIDATION_OPTIONS, *ROUTING_OPTIONS}
    known |= {*ADAPT_OPTIONS, *MACHINE_OPTIONS, *EXIT_OPTIONS, *DEPTH_OPTIONS}
    assert known <= {param.name for param in finetune.params}


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


def test_dry_run_prints_the_plan_and_writes_nothing(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", str(dense), str(tmp_path / "out"), "--data", str(text), "--steps", "5"]
    command += ["--seq-len", "32", "--device", "cpu", "--lora", "2", "--dry-run"]
    assert main.run([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dry_run"] is True
    assert list(found["by_part"]) == ["adapters"]
    assert found["memory"]["device"] == "cpu"
    assert main.run([*command, "--memory", "1kB"]) == 6
    said = capsys.readouterr().err
    assert "error: memory of cpu: training dense this way does not fit; expected " in said
    assert list(tmp_path.iterdir()) == []


def test_missing_budget_is_a_usage_error(
    dense: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["finetune", str(dense), str(tmp_path / "out"), "--data", str(text)]) == 2
    assert "--tokens: give either tokens or steps" in capsys.readouterr().err
