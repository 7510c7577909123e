"""What `moefy` writes loads without adaconvert, and a killed run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import adaconvert
from adaconvert.conversion import RunSettings, run
from adaconvert.errors import InterruptedRunError
from adaconvert.io.fs import FileSystem
from adaconvert.testing.tiny_models import make

_ALONE = """
import sys
sys.modules["adaconvert"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("some words to read", return_tensors="pt")["input_ids"]
with torch.no_grad():
    torch.save({"ids": ids, "logits": model.eval()(input_ids=ids).logits}, out)
"""


def test_a_process_without_adaconvert_computes_the_same_logits(tmp_path: Path) -> None:
    import torch

    from adaconvert.modeling.loading import load_model

    source = make("llama", tmp_path / "dense")
    adaconvert.convert(
        source, destination=tmp_path / "moe", method="moefy", num_experts=8, top_k=3, verify=False
    )
    command = [sys.executable, "-c", _ALONE, str(tmp_path / "moe"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    with torch.no_grad():
        mine = load_model(tmp_path / "moe", dtype="float32")(input_ids=found["ids"]).logits
    assert torch.equal(found["logits"], mine)


class _Stops(FileSystem):
    """Ends the run when the second shard is about to be created."""

    def create(self, path: Path) -> int:
        if "00002-of" in str(path):
            raise InterruptedRunError("stopped by a test")
        return super().create(path)


def _settings(destination: Path, **changes: Any) -> RunSettings:
    return RunSettings(destination=destination, max_shard_size="40KB", verify=False, **changes)


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    source = [str(make("llama", tmp_path / "dense"))]
    options = {"num_experts": 8, "router": "analytic"}
    run(source, "moefy", options, _settings(tmp_path / "whole"))
    stopped = _settings(tmp_path / "resumed", fs=_Stops())
    with pytest.raises(InterruptedRunError, match="stopped by a test"):
        run(source, "moefy", options, stopped)
    run(source, "moefy", options, _settings(tmp_path / "resumed", resume=True))
    files = [
        {f.name: f.read_bytes() for f in (tmp_path / name).iterdir()}
        for name in ("whole", "resumed")
    ]
    assert files[0] == files[1]
    assert len(list((tmp_path / "whole").glob("*.safetensors"))) > 2
