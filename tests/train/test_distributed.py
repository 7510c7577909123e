"""Two processes do what one does with twice the batch; one that fails ends both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.errors import OptionError
from adaconvert.methods.sources import open_source
from adaconvert.testing import tiny_models
from adaconvert.testing.stored import tensors_of
from adaconvert.train.adapt_config import Machine
from adaconvert.train.checks import can_split, check_layout
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.result import FinetuneResult
from adaconvert.train.run import RunSettings, finetune

Tune = Callable[..., FinetuneResult]
Alone = Callable[[str, dict[str, Any]], FinetuneResult]
SCRIPT = Path(__file__).with_name("distributed_cases.py")
SGD: dict[str, Any] = {
    **{"optimizer": "sgd", "precision": "fp64", "lr": 0.1, "schedule": "constant"},
    **{"steps": 4, "seq_len": 16, "log_every": 1, "save_every": 0, "dtype": "float32"},
}
ADAM: dict[str, Any] = {"steps": 4, "seq_len": 16, "log_every": 1, "save_every": 2, "lr": 1e-3}
BIAS: dict[str, Any] = {"balance_kind": "bias", "balance_rate": 0.05, "precision": "fp32"}
#: name -> (model, options, options of two processes alone, largest difference of a weight).
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float]] = {
    # float64 sums in another order, stored as float32
    "mixture": ("mixtral", SGD, {}, 2e-7),
    "adaptive": ("adaptive", SGD, {}, 2e-7),
    "mixture-sharded": ("mixtral", SGD, {"fsdp": True}, 2e-7),
    "adaptive-sharded": ("adaptive", SGD, {"fsdp": True}, 2e-7),
    # a parameter that moves by itself; float32, in which this router computes whatever is asked
    "bias": ("ernie4_5_moe", {**SGD, **BIAS}, {}, 1e-6),
    "adapters": ("mixtral", {**SGD, "lora": 2, "train": ("router",)}, {}, 2e-7),
    # float32: four steps of Adam at 1e-3, whose first steps amplify differences of tiny gradients
    "shared-experts": ("mixtral", {**ADAM, "dtype": "float32"}, {"expert_parallel": 2}, 1e-4),
}


needs_splitting = pytest.mark.skipif(not can_split(), reason="transformers is older than 5.23")


@pytest.fixture(scope="module")
def sources(adaptive: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mixture")
    made = {name: tiny_models.make(name, folder / name) for name in ("mixtral", "ernie4_5_moe")}
    return {"adaptive": adaptive, **made}


def launch(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Return what two processes on this machine's CPU said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), *arguments]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **quiet},
        capture_output=True,
        text=True,
        timeout=280,
    )


def case_of(name: str, source: Path, text: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "name": name,
        "source": str(source),
        "data": [str(text)],
        "destination": str(folder / name),
        "options": options,
    }


@pytest.fixture(scope="module")
def alone(sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Return what gives one process's run with twice the batch; cases that share its model and
    options share the run."""
    one = tmp_path_factory.mktemp("one")
    runs: dict[str, FinetuneResult] = {}

    def run(model: str, options: dict[str, Any]) -> FinetuneResult:
        key = json.dumps([model, options], sort_keys=True)
        if key not in runs:
            config = FinetuneConfig.of([str(text)], {**options, "batch_size": 4})
            settings = RunSettings(destination=one / str(len(runs)), device="cpu")
            runs[key] = finetune(str(sources[model]), config, settings)
        return runs[key]

    return run


@pytest.fixture(scope="module")
def pairs(
    sources: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return where the results of two processes lie, and what the two reported."""
    two = tmp_path_factory.mktemp("two")
    cases = []
    for name, (model, common, own, _) in CASES.items():
        if own and not can_split():
            continue
        cases.append(case_of(name, sources[model], text, two, batch_size=2, **common, **own))
    stopped = {**ADAM, "steps": 5, "dtype": "float32", "fsdp": True}
    cases.append(case_of("whole", sources["mixtral"], text, two, batch_size=2, **stopped))
    resumed = case_of("resumed", sources["mixtral"], text, two, batch_size=2, **stopped)
    cases.append({**resumed, "stop": 3})
    if not can_split():
        del cases[-2:]
    (two / "cases.json").write_text(json.dumps(cases))
    done = launch(two, str(two / "cases.json"), str(two / "results.json"))
    assert done.returncode == 0, done.stderr[-4000:]
    return two, json.loads((two / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_twice_the_batch(
    name: str,
    pairs: tuple[Path, dict[str, Any]],
    alone: Alone,
    sources: dict[str, Path],
) -> None:
    two, results = pairs
    if name not in results:
        pytest.skip("transformers is older than 5.23")
    model, common, _, tolerance = CASES[name]
    single: Any = alone(model, common)
    relative = 1e-12 if common.get("precision") == "fp64" else 1e-6
    expected = [entry["lm"] for entry in single.curve]
    found = [entry["lm"] for entry in results[name]["curve"]]
    assert found == pytest.approx(expected, rel=relative)
    a, b = tensors_of(single.destination), tensors_of(two / name)
    start = tensors_of(sources[model])
    assert a.keys() == b.keys() == start.keys()
    moved = 0.0
    for key, value in a.items():
        torch.testing.assert_close(
            b[key], value, rtol=0, atol=tolerance, msg=lambda m, k=key: k + m
        )
        if value.is_floating_point():
            moved = max(moved, float((value.double() - start[key].double()).abs().max()))
    # what agrees is not that nothing happened
    assert moved > 20 * tolerance


@needs_splitting
@pytest.mark.slow
def test_sharded_run_is_resumed(pairs: tuple[Path, dict[str, Any]]) -> None:
    two, results = pairs
    a, b = tensors_of(two / "whole"), tensors_of(two / "resumed")
    assert a.keys() == b.keys()
    assert all(torch.equal(b[key], value) for key, value in a.items())
    curves = [[e["lm"] for e in results[name]["curve"]] for name in ("whole", "resumed")]
    assert curves[0] == curves[1]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("adaptive", {"expert_parallel": 2}, "shares the experts of stock mixtures only"),
        ("mixtral", {"expert_parallel": 2, "lora": 2}, "cannot be combined with --lora"),
        ("mixtral", {"fsdp": True, "lora": 2}, "cannot be combined with --lora.*--load-in-4bit"),
        ("mixtral", {"expert_parallel": 2, "precision": "fp64"}, "cannot be combined with --prec"),
    ],
)
@needs_splitting
def test_layouts_that_do_not_fit(
    model: str, options: dict[str, Any], message: str, sources: dict[str, Path]
) -> None:
    config = FinetuneConfig.of(["x"], {"steps": 1, **options})
    with pytest.raises(OptionError, match=message):
        check_layout(open_source(str(sources[model])), replace(config, processes=2))


def test_number_of_processes_must_suit_the_experts() -> None:
    with pytest.raises(OptionError, match=r"does not divide .* expected a divisor of 4, found 3"):
        Machine(experts_over=3).check(4)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, -1])
def test_one_process_that_fails_ends_all_and_the_first_says_why(
    rank: int, sources: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    command = ["--fail-in-rank", str(rank), "--", "finetune", str(sources["mixtral"]), "out"]
    command += ["--data", str(text), "--steps", "2", "--seq-len", "16", "--device", "cpu"]
    done = launch(tmp_path, *command)
    assert done.returncode != 0
    assert os.listdir(tmp_path) == []
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    # the launcher may be faster than the news that a process was killed
    killed = ("error: another process failed: it ended without a word", "error: stopped by SIGTERM")
    told = {0: "error: step 1: the loss is nan", 1: "error: process 1 failed: step 1: the loss"}
    assert len(said) == 1
    assert said[0].startswith(told.get(rank, killed))


@pytest.mark.slow
def test_first_process_alone_reports(sources: dict[str, Path], text: Path, tmp_path: Path) -> None:
    command = ["--fail-in-rank", "2", "--", "finetune", str(sources["adaptive"]), "out"]
    command += ["--data", str(text), "--steps", "2", "--seq-len", "16", "--device", "cpu"]
    done = launch(tmp_path, *command, "--batch-size", "2")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("wrote ") == 1
    assert done.stdout.count("sequences of 16 tokens in 2 processes, 128 tokens") == 1
    assert done.stderr.count("step 2/2") == 1
    assert os.listdir(tmp_path) == ["out"]


def test_layouts_need_several_processes(dense: Path, tune: Tune) -> None:
    with pytest.raises(OptionError, match=r"--fsdp: needs several processes.*torchrun"):
        tune(dense, fsdp=True)
    with pytest.raises(OptionError, match=r"--expert-parallel: needs several processes"):
        tune(dense, expert_parallel=2)
    with pytest.raises(OptionError, match=r"--expert-parallel: cannot be combined with --fsdp"):
        tune(dense, expert_parallel=2, fsdp=True)
