"""Tiny split models, and a process in which adaconvert cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.adaptive_by_hand import make_adaptive

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
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


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what gives a tiny dense model of a family, and the same split by hand as asked."""
    root = tmp_path_factory.mktemp("runtime")

    def get(family: str, **options: Any) -> tuple[Path, Path]:
        dense = root / family
        if not dense.exists():
            tiny_models.make(family, dense)
        key = "-".join(f"{k}={v}" for k, v in sorted(options.items()) if not isinstance(v, dict))
        adaptive = root / f"{family}-adaptive-{key}"
        if not adaptive.exists():
            make_adaptive(dense, adaptive, **options)
        return dense, adaptive

    return get


@pytest.fixture(scope="session")
def adapt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return what puts routed adapters on a tiny dense model, by hand; that one is "dense" in the
    same folder."""
    root = tmp_path_factory.mktemp("adapters")

    def get(family: str = "llama", **options: Any) -> Path:
        dense = root / family / "dense"
        if not dense.exists():
            tiny_models.make(family, dense)
        options = {"linears": LINEARS, **options}
        return make_adapted(dense, dense.parent / str(len(list(dense.parent.iterdir()))), **options)

    return get


@pytest.fixture
def llama(folders: Any) -> Any:
    """A split Llama, loaded anew for every test."""
    return load_model(folders("llama")[1], dtype="float32")


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
