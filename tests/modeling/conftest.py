"""A process in which adaconvert cannot be imported, and what a checkpoint computes there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

Elsewhere = Callable[..., dict[str, torch.Tensor]]

_SCRIPT = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "adaconvert":
            raise ImportError("adaconvert is not installed here")
sys.meta_path.insert(0, Blocked())
import torch, transformers
from safetensors.torch import save_file
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, dtype=torch.float32
).eval()
ids = torch.arange(3, 20)[None]
with torch.no_grad():
    full = model(ids).logits
    with model.{knob}:
        less = model(ids).logits
    grown = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, {generation})
save_file({{"full": full.contiguous(), "less": less.contiguous(), "grown": grown}}, out)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Elsewhere:
    """Return what runs an adaptive checkpoint on tokens 3 to 19 in such a process.

    It takes the folder, the call that sets a knob, and arguments of `generate` as text, and gives
    the logits [1, 17, V] with every expert on ("full") and with the knob ("less"), and the tokens
    [1, 20] generated ("grown").
    """

    def run(folder: Path, knob: str, generation: str = "") -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        out = tmp_path / "out.safetensors"
        script = _SCRIPT.format(knob=knob, generation=generation)
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), str(out)],
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return load_file(out)

    return run
