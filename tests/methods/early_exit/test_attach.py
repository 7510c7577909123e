"""`early-exit` on every family: no exit is taken, and one that is gives the model cut off there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.arch.exits import NOT_SLICED
from adaconvert.arch.registry import supported
from adaconvert.modeling.loading import load_model
from adaconvert.testing.exits_by_hand import PLACES
from adaconvert.testing.tiny_models import make

FAMILIES = supported()
#: heads whose exits compute what the model cut off there does; by family, so that all are covered.
HEADS = ("affine", "norm", "mlp", "shared")
CLASSIFIERS = {"bert": "BertForSequenceClassification", "vit": "ViTForImageClassification"}


def source_of(family: str, folder: Path, **more: Any) -> Path:
    """Return a tiny checkpoint with a head to leave by."""
    if family in CLASSIFIERS:
        more["architecture"] = CLASSIFIERS[family]
    return make(family, folder, **more)


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    """Return what a tiny model is run on."""
    generator = torch.Generator().manual_seed(5)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, 300, (2, 9), generator=generator)}


def cut_off(folder: Path, family: str, blocks: tuple[int, ...]) -> Any:
    """Return the stock model with these of its blocks alone."""
    from torch import nn

    model: Any = load_model(folder)
    path = PLACES.get(family, PLACES["llama"])[0]
    parent, _, name = path.rpartition(".")
    kept = nn.ModuleList(model.get_submodule(path)[index] for index in blocks)
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    setattr(model.get_submodule(parent), name, kept)
    model.config.num_hidden_layers = len(blocks)
    return model


def head_for(family: str) -> str:
    """Return the head a family is tried with; where that has no copy of its blocks, another."""
    head = HEADS[FAMILIES.index(family) % len(HEADS)]
    has_network = family in PLACES and family != "mixtral" and PLACES[family][2] is not None
    return head if head != "mlp" or has_network else "norm"


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_until_an_exit_is_taken(family: str, tmp_path: Path) -> None:
    source, out = source_of(family, tmp_path / "dense"), tmp_path / "out"
    head = head_for(family)
    more: dict[str, Any] = {"adaptive": True} if head == "shared" else {}
    done = api.convert(source, destination=out, method="early-exit", exits="1", head=head, **more)
    found: Any = done.manifest["verification"]
    assert (found["ok"], found["promise"]) == (True, "exact")
    assert found["relative_difference_below"] == 1e-12
    inputs = inputs_of(family)
    made: Any = load_model(out)
    with torch.no_grad():
        assert torch.equal(made(**inputs).logits, load_model(source)(**inputs).logits)
        state = made.exit_states([1], **inputs)[1]
        pixels = {k: v for k, v in inputs.items() if k == "pixel_values"}
        left = made.exit_logits(1, state, **pixels)
        assert torch.equal(left, cut_off(source, family, (0,))(**inputs).logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit"])
@pytest.mark.parametrize("head", ["layer", "full"])
def test_a_block_of_its_own_begins_as_the_last_one(family: str, head: str, tmp_path: Path) -> None:
    head = "layer" if family == "bert" else head
    source, out = source_of(family, tmp_path / "dense", layers=3), tmp_path / "out"
    api.convert(source, destination=out, method="early-exit", exits="1", head=head)
    made, inputs = load_model(out), inputs_of(family)
    runner: Any = made
    with torch.no_grad():
        assert torch.equal(runner(**inputs).logits, load_model(source)(**inputs).logits)
        state = runner.exit_states([1], **inputs)[1]
        pixels = {k: v for k, v in inputs.items() if k == "pixel_values"}
        left = runner.exit_logits(1, state, **pixels)
        assert torch.equal(left, cut_off(source, family, (0, 2))(**inputs).logits)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in (*CLASSIFIERS, *NOT_SLICED)])
def test_the_stock_form_drafts_in_stock_transformers(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, out = make(family, tmp_path / "dense"), tmp_path / "out"
    done = api.convert(source, destination=out, method="early-exit", exits="1", head="shared")
    assert not list(out.glob("*.py"))
    kept = json.loads((source / "generation_config.json").read_text())
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings == {
        **kept,
        "num_assistant_tokens": 6,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.4,
    }
    assert done.report.target == family
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    ids = inputs_of(family)["input_ids"][:1]
    usual = {"do_sample": False, "max_new_tokens": 6, "temperature": None, "num_beams": 1}
    plain = model.generate(ids, **usual)
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **usual), plain)


@pytest.mark.parametrize("family", sorted(NOT_SLICED))
def test_families_named_so_really_cannot_draft(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(make(family, tmp_path / "dense")).eval()
    with pytest.raises(IndexError):
        model.generate(inputs_of(family)["input_ids"][:1], assistant_early_exit=1, max_new_tokens=4)


def test_the_folder_loads_with_its_own_code(tmp_path: Path) -> None:
    import subprocess
    import sys

    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    api.convert(source, destination=out, method="early-exit", exits="1", head="full")
    code = f"""
import sys, torch
sys.modules["adaconvert"] = None
from transformers import AutoModelForCausalLM
ids = torch.arange(3, 20)[None]
made = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
dense = AutoModelForCausalLM.from_pretrained({str(source)!r})
assert torch.equal(made(ids, use_cache=False).logits, dense(ids).logits)
assert list(made.adaptive_exits()) == [1]
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("head", ["shared", "affine", "mlp"])
def test_bytes_do_not_depend_on_the_run(head: str, tmp_path: Path) -> None:
    source = make("llama-tied", tmp_path / "dense", dtype="bfloat16")
    given: dict[str, Any] = {"exits": [1], "head": head, "draft_tokens": 4, "confidence": True}
    if head == "shared":
        given["adaptive"] = True
    for name in ("0", "1"):
        api.convert(source, destination=tmp_path / name, method="early-exit", **given)
    for path in sorted((tmp_path / "0").iterdir()):
        assert path.read_bytes() == (tmp_path / "1" / path.name).read_bytes(), path.name


def test_what_config_json_says(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source, out = make("granite", tmp_path / "dense", layers=4), tmp_path / "out"
    api.convert(
        source,
        destination=out,
        method="early-exit",
        every="L/2",
        head="mlp",
        tie_heads=True,
        measure="difference",
        draft_tokens=3,
        confidence=True,
        verify=False,
    )
    adaptive = json.loads((out / "config.json").read_text())["adaptive"]
    assert adaptive["sites"] == {}
    for digest in adaptive["model"]["exits"].pop("trunk"):
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert adaptive["model"]["exits"] == {
        "kind": "causal",
        "blocks": "model.layers",
        "tail": {"norm": "model.norm", "head": "lm_head"},
        "network": "mlp",
        "scale": 0.7,
        "heads": [
            {
                **{"at": 2, "own": ["norm"], "map": False},
                **{"network": True, "block": False, "confidence": True},
            }
        ],
        "decide": {"measure": "difference", "thresholds": [None], "decay": None, "patience": None},
        "kv": "recompute",
        "draft": {"at": 2, "tokens": 3, "threshold": 0.4, "vocab": None},
    }
    held = load_file(out / "model.safetensors")
    assert torch.equal(held["exits.2.norm.weight"], held["model.norm.weight"])
    for name in ("gate", "up", "down"):
        copy = held[f"exits.2.network.{name}_proj.weight"]
        assert torch.equal(copy, held[f"model.layers.1.mlp.{name}_proj.weight"])
    assert not held["exits.2.confidence.weight"].any()


def test_a_threshold_of_nought_is_a_threshold(tmp_path: Path) -> None:
    source = source_of("llama", tmp_path / "dense")
    given: dict[str, Any] = {"method": "early-exit", "exits": "1", "head": "shared"}
    api.convert(source, destination=tmp_path / "out", threshold=0.0, **given)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["adaptive"]["model"]["exits"]["decide"]["thresholds"] == [0.0]
