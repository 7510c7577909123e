"""Stage 1 in the same command: it equals the fine-tune it stands for, and refuses early."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.api import training
from adaconvert.cli.main import run
from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.io import manifest
from adaconvert.testing.tiny_models import make

TEXT = "def route(token, experts):\n    return sorted(experts, key=lambda e: e.score(token))[:2]\n"
SPLIT: dict[str, Any] = {"expert_width": 8, "router_width": 16, "router_steps": 20}
TUNE: dict[str, Any] = {"steps": 2, "seq_len": 32, "batch_size": 2, "device": "cpu"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT * (i + 2)}) + "\n" for i in range(8)))
    return path


def digests(folder: Path) -> list[str]:
    return [record.digest for record in manifest.records(manifest.read(folder)).values()]


def test_all_stages_equal_finetune_and_then_the_rest(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    common = {"data": str(data), "data_tokens": 2000, **SPLIT}
    api.d2dmoe(source, tmp_path / "all", stages="1,2,3,4", **common, **TUNE)
    sparse = {"activation": "relu", "sparsity": 1e-4}
    api.finetune(source, tmp_path / "tuned", data=[data], **TUNE, **sparse)
    api.d2dmoe(tmp_path / "tuned", tmp_path / "rest", device="cpu", **common)
    assert digests(tmp_path / "all") == digests(tmp_path / "rest")
    config = json.loads((tmp_path / "all" / "config.json").read_text())
    assert config["hidden_act"] == "relu"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["all", "m", "rest", "text.jsonl", "tuned"]


def test_stage_one_alone_is_the_finetune(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    api.d2dmoe(source, tmp_path / "one", stages="1", data=str(data), activation="keep", **TUNE)
    api.finetune(source, tmp_path / "two", data=[data], activation="keep", sparsity=1e-4, **TUNE)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_a_split_that_cannot_be_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    lines: list[str] = []
    with pytest.raises(OptionError, match=r"--expert-width"):
        api.d2dmoe(
            source,
            tmp_path / "d",
            stages="1,2,3",
            data=str(data),
            report=lines.append,
            **{**SPLIT, "expert_width": 7},
            **TUNE,
        )
    assert lines == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "text.jsonl"]


def test_what_was_trained_is_not_trained_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("llama", tmp_path / "m")
    given = {"stages": "1,2,3", "data": str(data), "data_tokens": 2000, **SPLIT, **TUNE}
    whole = api.convert

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise InterruptedRunError("interrupted")

    monkeypatch.setattr(training, "convert", interrupted)
    with pytest.raises(InterruptedRunError) as caught:
        api.d2dmoe(source, tmp_path / "d", **given)
    assert str(caught.value.hint).startswith("Run the same command again")
    monkeypatch.setattr(training, "convert", whole)
    lines: list[str] = []
    api.d2dmoe(source, tmp_path / "d", report=lines.append, **given)
    assert not any(line.startswith("step ") for line in lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d", "m", "text.jsonl"]


def test_it_comes_after_networks_took_the_place_of_projections(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    common = {"data": str(data), "data_tokens": 2000, "router_steps": 20, "device": "cpu"}
    small = {"projection_steps": 20, "projection_experts": 4, "expert_width": 8}
    api.d2dmoe(source, tmp_path / "networks", stages="2,5", **common, **small)
    lines: list[str] = []
    sparse = {"stages": "1,3,4", "tau": 0.2, "sparsity": 0.1, "report": lines.append}
    found = api.d2dmoe(tmp_path / "networks", tmp_path / "d", **{**common, **sparse, **TUNE})
    assert any("projection zeros" in line for line in lines)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    sites = config["adaptive"]["sites"]
    assert set(found.routers) | set(found.networks) == set(sites)
    for slots in sites.values():
        spec = slots.get("ffn") or slots["linear"]["mlp"]
        assert spec["router"]["kind"] == "contribution"
        assert spec["select"] == {"rule": "dynamic-k", "tau": 0.2}
        assert spec["activation"] == "relu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "1,2,3"}, "--tokens: is missing: stage 1 trains the model"),
        ({"tokens": 100}, "--tokens: only means something with stage 1"),
        ({"sparsity": 1e-3, "stages": "2,3"}, "--sparsity: only means something with stage 1"),
        ({"stages": "1,2,3", "tokens": 100, "data": None}, "--data: is missing: stage 1"),
        ({"stages": "1,2,3", "tokens": 9, "data_split": "test"}, "--data-split: stage 1 trains"),
    ],
)
def test_refused(options: dict[str, Any], message: str, data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    with pytest.raises(OptionError, match=message):
        api.d2dmoe(source, tmp_path / "d", **{"data": str(data), **options})


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make("llama", tmp_path / "m")
    arguments = ["--stages", "1,2,3,4", "--data", str(data), "--data-tokens", "2000"]
    arguments += ["--expert-width", "8", "--router-steps", "20", "--tokens", "128"]
    arguments += ["--seq-len", "32", "--batch-size", "2", "--device", "cpu"]
    assert run(["plan", "d2dmoe", str(source), *arguments]) == 0
    assert run(["d2dmoe", str(source), str(tmp_path / "d"), *arguments]) == 0
    assert "step 2/2" in capsys.readouterr().err
