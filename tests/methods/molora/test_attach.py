"""`molora` on every family: new adapters change nothing, whatever is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.arch.registry import supported
from adaconvert.modeling.loading import load_model
from adaconvert.testing.tiny_models import make

FAMILIES = supported()
#: a way to write them for each family, so that all are covered between them.
WAYS: tuple[Mapping[str, object], ...] = (
    {"standalone": True, "router": "per-layer"},
    {"router": "shared", "share": "a", "routing": "topk", "k": 2},
    {"standalone": True, "routing": "topp", "p": 0.7, "renormalize": True},
    {"as_plain_lora": True},
)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_start_is_exact(family: str, tmp_path: Path) -> None:
    source = make(family, tmp_path / "dense")
    way = WAYS[FAMILIES.index(family) % len(WAYS)]
    done = api.convert(
        source, destination=tmp_path / "out", method="molora", experts=3, rank=2, **way
    )
    found: Any = done.manifest["verification"]
    assert (found["ok"], found["promise"]) == (True, "exact")
    # zeros are added, which rounds nothing
    assert found["relative_difference_below"] == 1e-12


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_scales_start_exactly_too(family: str, tmp_path: Path) -> None:
    source, out = make(family, tmp_path / "dense"), tmp_path / "out"
    api.convert(source, destination=out, method="molora", experts_kind="ia3", standalone=True)
    sites = json.loads((out / "config.json").read_text())["adaptive"]["sites"]
    on = {path.rpartition(".")[2]: s["linear"]["adapters"]["on"] for path, s in sites.items()}
    assert set(on.values()) == {"input", "output"}
    inputs = torch.arange(3, 24)[None]
    with torch.no_grad():
        dense = load_model(source)(input_ids=inputs).logits
        assert torch.equal(load_model(out)(input_ids=inputs).logits, dense)


def test_bytes_do_not_depend_on_the_run(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    for number in range(2):
        api.convert(source, destination=tmp_path / f"{number}", method="molora", rank=2)
    api.convert(source, destination=tmp_path / "other", method="molora", rank=2, seed=1)
    same, other = (tmp_path / name for name in ("1", "other"))
    for path in sorted((tmp_path / "0").iterdir()):
        assert path.read_bytes() == (same / path.name).read_bytes(), path.name
    name = "adapter_model.safetensors"
    assert (same / name).read_bytes() != (other / name).read_bytes()


def test_forms_hold_the_same_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source = make("llama", tmp_path / "dense")
    for name, way in (("folder", {}), ("whole", {"standalone": True})):
        api.convert(source, destination=tmp_path / name, method="molora", rank=2, **way)
    folder = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    names = {
        "molora_A": "adapters.a",
        "molora_B": "adapters.b",
        "molora_router": "router.weight",
    }
    for name, tensor in folder.items():
        path, _, what = name.removeprefix("base_model.model.").rpartition(".")
        assert torch.equal(tensor, whole[f"{path}.{names[what]}"])
    assert len(folder) == 3 * 14


def test_the_folder_says_what_peft_reads(tmp_path: Path) -> None:
    source, out = make("llama", tmp_path / "dense"), tmp_path / "out"
    given: dict[str, Any] = {"target_modules": "q_proj,down_proj", "routing": "topk", "k": 1}
    api.convert(source, destination=out, method="molora", experts=2, rank=4, alpha=8.0, **given)
    config = json.loads((out / "adapter_config.json").read_text())
    fingerprint = config.pop("base_fingerprint")
    assert int(fingerprint, 16) > 0
    assert config == {
        "peft_type": "MOLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "revision": None,
        "inference_mode": True,
        "target_modules": ["q_proj", "down_proj"],
        "num_experts": 2,
        "r": 4,
        "lora_alpha": 8.0,
        "scaling": None,
        "experts_kind": "lora",
        "share": None,
        "feedforward_modules": None,
        "dropout": 0.0,
        "init_std": 0.02,
        "router": {
            **{"kind": "linear", "reads": "module", "score": "dot", "norm": "none"},
            "scale": 1.0,
        },
        "select": {"rule": "top-k", "k": 1, "renormalize": False},
    }
    text = (out / "README.md").read_text()
    assert "import adaconvert.auto" in text
    assert str(tmp_path) not in text
    assert str(tmp_path) not in (out / "adaconvert.json").read_text()


def test_every_way_to_another_form_is_verified(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    source, first = make("llama", tmp_path / "dense"), tmp_path / "folder"
    api.convert(source, destination=first, method="molora", experts=2, rank=2)
    api.convert(
        tmp_path / "folder", destination=tmp_path / "whole", method="molora", standalone=True
    )
    again = tmp_path / "again"
    done = api.convert(tmp_path / "whole", destination=again, method="molora", base=str(source))
    assert done.manifest["verification"]["ok"]  # type: ignore[index]
    held = [load_file(folder / "adapter_model.safetensors") for folder in (first, again)]
    assert all(torch.equal(tensor, held[1][name]) for name, tensor in held[0].items())
    assert len(held[0]) == len(held[1]) == 3 * 14
    one, two = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (first, again)
    )
    assert one == two
