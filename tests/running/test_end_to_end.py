"""One shipped recipe of every method, from a tiny dense model to a hub, by the real verbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.io import manifest
from adaconvert.recipe.load import load
from adaconvert.testing import hub_server

#: settings with which a recipe's stages suit a tiny model and a few seconds.
TRAIN = {"tokens": "", "steps": 2, "seq_len": 16, "batch_size": 2}
SMALL: dict[str, dict[str, dict[str, object]]] = {
    "upcycle": {"tune": TRAIN, "evaluate": {"length": 16, "speed": "false"}},
    "moefy": {
        # a promise needs more text than a test has
        "calibrate": {"max_loss_increase": "", "budget": 0.9, "length": 16, "unit": "block"},
        "evaluate": {"length": 16, "speed": "false"},
    },
    "d2dmoe": {
        "sparsify": TRAIN,
        "d2dmoe": {"expert_width": 8, "data_tokens": 256, "router_steps": 10},
        "evaluate": {"length": 16, "speed": "false"},
    },
    "btx": {
        "first": TRAIN,
        "second": TRAIN,
        "route": TRAIN,
        "evaluate": {"length": 16, "speed": "false"},
    },
    "adamoe": {
        "tune": TRAIN,
        "adapt": TRAIN,
        "evaluate": {"length": 16, "speed": "false"},
    },
}


def settings_of(method: str, bench: Any, repo: str | None = None) -> list[str]:
    """Return settings for a tiny run of the recipe of a method."""
    train, valid = bench.folder / "train.jsonl", bench.folder / "valid.jsonl"
    recipe = load(f"{method}/smollm2-135m")
    found = [f"data.{name}={train}" for name in recipe.data]
    found += [f"data.valid=[{valid}, {train}]" if method == "btx" else f"data.valid={valid}"]
    for stage, options in SMALL[method].items():
        found += [f"{stage}.{option}={value}" for option, value in options.items()]
    return found + ([f"push.repo={repo}"] if repo else [])


@pytest.mark.parametrize("method", list(SMALL))
def test_from_a_dense_model_to_a_hub(method: str, bench: Any) -> None:
    name, out = f"{method}/smollm2-135m", bench.folder / "out"
    settings = settings_of(method, bench, repo="org/mine")
    with hub_server.serving() as hub, hub_server.client_of(hub, bench.folder / "cache"):
        done = api.run(name, bench.folder / "dense", out, settings=settings)
        assert [stage.status for stage in done.stages] == ["done"] * len(done.stages)
        again = api.run(name, bench.folder / "dense", out, settings=settings)
        assert [stage.status for stage in again.stages] == ["unchanged"] * len(done.stages)
        pushed = done.stages[-1].result
    sent = {file["name"] for file in pushed["files"]}
    assert {"config.json", "README.md", "adaconvert.json", "adaconvert_recipe.yaml"} <= sent
    assert sent == {path.name for path in out.iterdir()}
    record = manifest.read(out)
    assert len(record["history"]) == _before(name)  # type: ignore[arg-type]
    recipe = load(out / "adaconvert_recipe.yaml")
    assert recipe.method == method
    assert "steps" in (out / "README.md").read_text() or method == "moefy"
    text = " ".join(path.read_text() for path in out.glob("*.*") if path.suffix in (".md", ".yaml"))
    assert str(bench.folder) not in text


def _before(name: str) -> int:
    """Return how many checkpoints come before the last one of a recipe."""
    made = [stage for stage in load(name).stages if stage.does.makes == "checkpoint"]
    # a calibration adds to the record of what it calibrates
    return len([stage for stage in made if stage.verb != "calibrate"]) - 1


@pytest.mark.slow
def test_killed_in_the_middle_of_training_and_run_again(bench: Any) -> None:
    """SIGKILL while the second stage trains: the first is not redone, the second goes on, and the
    result is that of a run nobody disturbed."""
    steps = ("tune.steps=12", "tune.save_every=2", "tune.log_every=2")
    settings = [*settings_of("upcycle", bench), *steps]
    name, dense = "upcycle/smollm2-135m", bench.folder / "dense"
    whole = api.run(name, dense, bench.folder / "whole", settings=settings)
    assert whole.stages[1].status == "done"

    words = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "adaconvert", "run", name, str(dense), "out", *words]
    work = bench.folder / ".out.run"
    child = subprocess.Popen(command, cwd=bench.folder, stderr=subprocess.PIPE, text=True)
    _wait_for(child, lambda: list(work.glob(".dense-tune.adaconvert-training/*/complete.json")))
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    state = json.loads((work / "run.json").read_text())["stages"]
    assert [state[stage]["status"] for stage in ("upcycle", "tune")] == ["done", "started"]
    assert not (bench.folder / "out").exists()

    lines: list[str] = []
    again = api.run(name, dense, bench.folder / "out", settings=settings, report=lines.append)
    assert [stage.status for stage in again.stages[:2]] == ["unchanged", "done"]
    assert any(line.startswith("tune         to resume") for line in lines)
    first = manifest.weights_of(manifest.read(bench.folder / "whole"))
    assert manifest.weights_of(manifest.read(bench.folder / "out")) == first


def _wait_for(child: subprocess.Popen[str], there: Any) -> None:
    """Return once something is there; fail when the child ends before."""
    limit = time.monotonic() + 240
    while not there():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
def test_interrupted_by_the_keyboard_it_says_how_to_go_on(bench: Any) -> None:
    settings = [*settings_of("upcycle", bench), "tune.steps=200", "tune.save_every=1"]
    words = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "adaconvert", "run", "upcycle/smollm2-135m", "dense", "out"]
    child = subprocess.Popen(
        [*command, *words], cwd=bench.folder, stderr=subprocess.PIPE, text=True
    )
    work = bench.folder / ".out.run"
    _wait_for(child, lambda: list(work.glob(".dense-tune.adaconvert-training/*/complete.json")))
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=120)[1].splitlines()
    assert child.returncode == 130
    assert said[-1] == (
        "error: stage 'tune': interrupted. Run the same command again to go on from there; what is "
        "finished is kept in .out.run."
    )
    assert not (bench.folder / "out").exists()
    assert list(work.glob(".dense-tune.adaconvert-training/*/complete.json"))


def test_the_result_loads_by_stock_transformers(bench: Any, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    settings = settings_of("upcycle", bench)
    done = api.run(
        "upcycle/smollm2-135m", bench.folder / "dense", tmp_path / "out", settings=settings
    )
    assert done.destination == tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(done.destination)
    assert type(model).__name__ == "MixtralForCausalLM"
    with torch.inference_mode():
        assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.slow
def test_two_processes_train_together(bench: Any) -> None:
    settings = [*settings_of("upcycle", bench), "tune.device=cpu", "tune.train=router"]
    words = [f"--set={setting}" for setting in settings]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "adaconvert", "run", "upcycle/smollm2-135m", "dense", "out", "--json"]

    def launched() -> dict[str, Any]:
        done = subprocess.run(
            [*command, *words], cwd=bench.folder, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    first = launched()
    assert [stage["status"] for stage in first["stages"]] == ["done"] * 3 + ["left out"]
    # 2 steps of 2 sequences of 16 tokens in each of 2 processes
    assert first["stages"][1]["result"]["tokens"] == 128
    assert [stage["status"] for stage in launched()["stages"]][:3] == ["unchanged"] * 3
