"""An adapter folder, loaded in a fresh process by each of the ways PEFT and transformers have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert.testing.adapters_in_peft import attach, batch_of, logits_of

Bases = Callable[..., Path]
DENSE = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo"),
    *("olmo2", "olmo3", "granite", "smollm3", "gpt2", "gpt_neox", "bert", "vit"),
)
DECODERS = tuple(family for family in DENSE if family not in ("bert", "vit"))
TOP_2 = {"rule": "top-k", "k": 2, "renormalize": True}
#: what varies from family to family, so that each way of routing meets several.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"router": {"reads": "layer"}, "select": TOP_2},
    {"router": {"reads": "shared"}, "share": "a"},
    {"experts_kind": "ia3", "select": {"rule": "top-p", "p": 0.7}},
    {"scaling": [0.5, 1.0, 2.0, 3.0], "router": {"score": "abs", "norm": "layernorm"}},
)
_SCRIPT = """
import json, sys, warnings
import torch, transformers
from safetensors.torch import load_file, save_file
import adaconvert.auto
warnings.filterwarnings("error", category=UserWarning)
import peft
way, out, *folders = sys.argv[1:]
found = {}
for folder in folders:
    adapter, base = f"{folder}/adapter", open(f"{folder}/base.txt").read()
    name = json.load(open(f"{base}/config.json"))["architectures"][0]
    stock = getattr(transformers, name)
    if way == "peft":
        model = peft.PeftModel.from_pretrained(stock.from_pretrained(base), adapter)
    elif way == "peft-low-memory":
        model = peft.PeftModel.from_pretrained(
            stock.from_pretrained(base), adapter, low_cpu_mem_usage=True
        )
    elif way == "auto":
        model = transformers.AutoModelForCausalLM.from_pretrained(adapter)
    elif way == "stock":
        model = stock.from_pretrained(adapter)
    elif way == "load_adapter":
        model = stock.from_pretrained(base)
        model.load_adapter(adapter)
    else:
        model = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    batch = load_file(f"{folder}/batch.safetensors")
    with torch.no_grad():
        found[folder] = model.eval()(**batch).logits.contiguous()
save_file(found, out)
"""


@pytest.fixture(scope="session")
def folders(base_of: Bases, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return, by family, a folder that holds an adapter, a batch and the logits they give."""
    root = tmp_path_factory.mktemp("adapters")
    cases = [(family, "float32", WAYS[i % len(WAYS)]) for i, family in enumerate(DENSE)]
    cases += [("llama", "bfloat16", way) for way in WAYS]
    found = {}
    for number, (family, dtype, way) in enumerate(cases):
        base = base_of(family, dtype=dtype)
        model = attach(base, task_type="CAUSAL_LM" if family in DECODERS else None, **way)
        folder = root / f"{number}-{family}-{dtype}"
        model.save_pretrained(folder / "adapter")
        (folder / "base.txt").write_text(str(base))
        batch = batch_of(model)
        save_file(batch, folder / "batch.safetensors")
        logits = logits_of(model, **batch)
        with model.disable_adapter():
            assert not torch.equal(logits_of(model, **batch), logits)
        save_file({"logits": logits.contiguous()}, folder / "logits.safetensors")
        found[folder.name] = folder
    return found


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process that has loaded nothing yet."""
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["peft", "peft-low-memory", "auto", "stock", "load_adapter", "auto-peft"]
)
def test_a_fresh_process_computes_the_same_bits(
    folders: dict[str, Path], tmp_path: Path, way: str
) -> None:
    causal = way in ("auto", "auto-peft")
    asked = [
        str(path) for name, path in folders.items() if not causal or name.split("-")[1] in DECODERS
    ]
    assert len(asked) >= len(DECODERS)
    done = run(way, str(tmp_path / "out.safetensors"), *asked)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out.safetensors")
    wrong = [
        folder
        for folder in asked
        if not torch.equal(found[folder], load_file(f"{folder}/logits.safetensors")["logits"])
    ]
    assert wrong == []
    assert set(found) == set(asked)


def test_what_a_folder_holds(folders: dict[str, Path]) -> None:
    folder = next(path for name, path in folders.items() if "mistral" in name) / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOLORA"
    assert config["router"] == {
        **{"kind": "linear", "reads": "layer", "score": "dot", "norm": "none", "scale": 1.0}
    }
    assert config["select"] == TOP_2
    assert len(config["base_fingerprint"]) == 64
    tensors = load_file(folder / "adapter_model.safetensors")
    block = "base_model.model.model.layers.0."
    assert tensors[f"{block}mlp.down_proj.molora_A"].shape == (4, 3, 64)
    assert tensors[f"{block}mlp.down_proj.molora_B"].shape == (4, 32, 3)
    routers = {name for name in tensors if name.endswith(".molora_router")}
    # one per block, at its first linear
    assert routers == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.molora_router" for layer in (0, 1)
    }
    assert tensors[min(routers)].shape == (4, 32)


def test_without_adaconvert_peft_names_the_method_it_does_not_know(
    folders: dict[str, Path],
) -> None:
    folder = next(iter(folders.values())) / "adapter"
    code = (
        "import sys; sys.modules['adaconvert'] = None\n"
        "from peft import PeftConfig\n"
        f"PeftConfig.from_pretrained({str(folder)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 1
    assert "KeyError: 'MOLORA'" in done.stderr
