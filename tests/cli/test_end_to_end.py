"""The verbs on a tiny real model, one after the other, as in README."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adaconvert.testing import tiny_models

ROOT = Path(__file__).resolve().parents[2]


def adaconvert(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in another process, which must end with `code`."""
    command = [sys.executable, "-m", "adaconvert", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def moe(dense: Path) -> Path:
    """The same model with four experts."""
    target = dense.parent / "moe"
    done = adaconvert("upcycle", dense, target, "--experts", 4, "--top-k", 2)
    assert done.stderr == ""
    assert "verdict      ok" in done.stdout
    return target


@pytest.mark.smoke
def test_inspect(dense: Path, moe: Path) -> None:
    text = adaconvert("inspect", dense).stdout
    assert text.startswith("dense: llama (LlamaForCausalLM), dense")
    found = json.loads(adaconvert("inspect", moe, "--json").stdout)
    assert (found["model_type"], found["num_experts"], found["top_k"]) == ("mixtral", 4, 2)
    assert found["problems"] == []


def test_plan_tells_what_upcycle_does(dense: Path, moe: Path) -> None:
    planned = json.loads(adaconvert("plan", "upcycle", dense, "--experts", 4, "--json").stdout)
    written = json.loads((moe / "adaconvert.json").read_text())
    assert planned["target"] == "mixtral"
    assert planned["options"] == written["options"]
    weights = sum(path.stat().st_size for path in moe.glob("*.safetensors"))
    assert weights <= planned["disk_bytes"] <= weights + (1 << 20)


@pytest.mark.smoke
def test_verify(dense: Path, moe: Path) -> None:
    assert "verdict      ok" in adaconvert("verify", dense, moe).stdout
    report = json.loads(adaconvert("verify", dense, moe, "--json").stdout)
    assert report["ok"] is True


def test_verify_finds_a_flipped_bit(dense: Path, moe: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in moe.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    shard = damaged / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    done = adaconvert("verify", dense, damaged, code=5)
    assert done.stdout.count("\n") > 1
    assert done.stderr.startswith("error: ")
    assert "model.safetensors" in done.stderr
    report = json.loads(adaconvert("verify", dense, damaged, "--json", code=5).stdout)
    assert report["ok"] is False


def test_taken_destination(dense: Path, moe: Path) -> None:
    done = adaconvert("upcycle", dense, moe, code=4)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_missing_source(tmp_path: Path) -> None:
    done = adaconvert("inspect", tmp_path / "absent", code=3)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.real
@pytest.mark.timeout(600)
def test_real_model_answers_the_same_through_stock_transformers(
    smollm2: Path, tmp_path: Path
) -> None:
    moe = tmp_path / "moe"
    adaconvert("upcycle", smollm2, moe, "--max-shard-size", "500MB", "--no-verify")
    answers = []
    for folder in (smollm2, moe):
        script = [sys.executable, str(ROOT / "scripts" / "greedy.py")]
        done = subprocess.run(
            [*script, str(folder), "What is the capital of France?", "16"],
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout.partition("\n"))
    assert [answer[0].split(",")[0] for answer in answers] == [
        "[LlamaForCausalLM",
        "[MixtralForCausalLM",
    ]
    assert answers[0][2] == answers[1][2]
    assert "Paris" in answers[0][2]
