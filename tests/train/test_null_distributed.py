"""Two processes hold the budgets of null experts together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adaconvert.errors import OptionError
from adaconvert.testing import tiny_models
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.checks import can_split
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.run import RunSettings, finetune

SCRIPT = Path(__file__).with_name("distributed_cases.py")
COMMON: dict[str, Any] = {
    **{"steps": 20, "seq_len": 32, "lr": 1e-3, "log_every": 5, "save_every": 0},
    **{"precision": "fp64", "target_compute": 0.6},
}
CASES: dict[str, dict[str, Any]] = {
    "at-once": {},
    "ramped": {"compute_ramp": 0.5},
    # parts of weights have no bias that could be moved
    "sharded": {"null_rate": 0, "fsdp": True},
}


@pytest.fixture(scope="module")
def nulled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return make_nulled(tiny_models.make("mixtral", folder / "src"), folder / "nulled")


@pytest.fixture(scope="module")
def results(
    nulled: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Return where the results of two processes lie, and what they reported."""
    folder = tmp_path_factory.mktemp("two")
    cases = [
        {
            "name": name,
            "source": str(nulled),
            "data": [str(text)],
            "destination": str(folder / name),
            "options": {**COMMON, "batch_size": 4, **options},
        }
        for name, options in CASES.items()
        if can_split() or "fsdp" not in options
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT)]
    command += [str(folder / "cases.json"), str(folder / "results.json")]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_spend_what_one_does(
    name: str, results: tuple[Path, dict[str, Any]], nulled: Path, text: Path, tmp_path: Path
) -> None:
    folder, found = results
    if name not in found:
        pytest.skip("transformers is older than 5.23")
    options = {k: v for k, v in CASES[name].items() if k != "fsdp"}
    config = FinetuneConfig.of([str(text)], {**COMMON, "batch_size": 8, **options})
    settings = RunSettings(destination=tmp_path / name, device="cpu")
    alone: Any = finetune(str(nulled), config, settings)
    curves = [[e["share"] for e in curve] for curve in (found[name]["curve"], alone.curve)]
    # quantiles of the first step are means over processes, which is all they differ in
    assert curves[0] == pytest.approx(curves[1], abs=0.01)
    two, one = (c["routing"]["budgets"] for c in (found[name]["summary"], alone.summary))
    for ours, theirs in zip(two, one, strict=True):
        assert ours["bias"] == pytest.approx(theirs["bias"], abs=0.02)
    stored = load_file(folder / name / "model.safetensors")
    biases = sorted(n for n in stored if n.endswith("null_experts.bias"))
    assert [float(stored[n]) for n in biases] == [pytest.approx(b["bias"]) for b in two]


@pytest.mark.skipif(not can_split(), reason="transformers is older than 5.23")
def test_a_budget_is_not_held_over_parts_of_weights(nulled: Path, text: Path) -> None:
    from adaconvert.methods.sources import open_source
    from adaconvert.train.checks import check_layout

    options = {**COMMON, "fsdp": True}
    with pytest.raises(OptionError, match=r"--target-compute: cannot be combined with --fsdp"):
        check_layout(open_source(str(nulled)), FinetuneConfig.of([str(text)], options))
