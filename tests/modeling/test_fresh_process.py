"""A checkpoint loads where adaconvert is not installed, and there computes the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.loading import CODE_FILES, code_folder, load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

SCRIPT = """
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
    with model.set_compute(0.7):
        less = model(ids).logits
    grown = model.generate(ids, max_new_tokens=3, do_sample=False, compute=0.7, pad_token_id=0)
save_file({"full": full.contiguous(), "less": less.contiguous(), "grown": grown}, out)
"""


@pytest.mark.smoke
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_fresh_process_reproduces_logits_exactly(tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file

    dense = tiny_models.make(family, tmp_path / "dense.with dots")
    folder = make_adaptive(dense, tmp_path / "adaptive.with dots")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    out = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    got = load_file(out)
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(got["full"], model(ids).logits)
        with model.set_compute(0.7):
            assert torch.equal(got["less"], model(ids).logits)
        grown = model.generate(ids, max_new_tokens=3, do_sample=False, compute=0.7, pad_token_id=0)
    assert torch.equal(got["grown"], grown)


def test_code_files_are_all_there_and_flat() -> None:
    here = {path.name for path in code_folder().glob("*.py")}
    assert set(CODE_FILES) == here - {"__init__.py", "loading.py"}
    for name in CODE_FILES:
        text = (code_folder() / name).read_text()
        assert "from . import" not in text, "transformers' scanner does not see it"
