"""Adapters that do something, written as a stock LoRA and as a stock mixture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.tiny_models import make

INPUTS = torch.arange(3, 40)[None]
FFN = ("gate_proj", "up_proj", "down_proj")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=INPUTS).logits
    return found


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    ("family", "linears", "scaling", "share"),
    [
        ("llama", ("q_proj", "down_proj"), 2.0, None),
        ("llama", ("k_proj", "up_proj"), [0.5, 1.0, 3.0], "a"),
        ("gpt2", ("c_attn", "c_fc"), 2.0, None),
        ("phi3", ("qkv_proj", "gate_up_proj"), 0.7, None),
    ],
)
def test_one_lora_is_uniform_routing(
    family: str, linears: tuple[str, ...], scaling: Any, share: str | None, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    source = make(family, tmp_path / "dense")
    given: dict[str, Any] = {"linears": linears, "experts": 3, "scaling": scaling, "share": share}
    whole = make_adapted(source, tmp_path / "whole", **given)
    out = tmp_path / "out"
    done = api.convert(
        whole, destination=out, method="molora", as_plain_lora=True, base=str(source)
    )
    assert done.manifest["exactness"]["kind"] == "approximate"  # type: ignore[index]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 6)
    model = load_model(whole)
    with model.set_adapters("uniform"):
        uniform = logits(model)
    stock = logits(peft.PeftModel.from_pretrained(load_model(source), str(out)))
    eps = torch.finfo(torch.float32).eps
    assert (stock - uniform).norm() <= 64 * eps * uniform.norm()
    # which is not what the routers would have given
    assert (logits(model) - uniform).norm() > 1e-3 * uniform.norm()


def test_experts_are_the_network_plus_an_adapter(tmp_path: Path) -> None:
    source = make("llama", tmp_path / "dense")
    given: dict[str, Any] = {"linears": (*FFN, "q_proj"), "experts": 3, "scaling": [1.0, 2.0, 0.5]}
    whole = make_adapted(source, tmp_path / "whole", **given)
    out = tmp_path / "out"
    done = api.convert(whole, destination=out, method="molora", as_moe=True, target="mixtral")
    assert done.report.target == "mixtral"
    dense, adapted, made = tensors(source), tensors(whole), tensors(out)
    names = {"w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj"}
    for stem in ("model.layers.0", "model.layers.1"):
        for short, name in names.items():
            for expert, factor in enumerate(given["scaling"]):
                wanted = dense[f"{stem}.{name}.weight"] + factor * _product(
                    adapted, f"{stem}.{name}", expert
                )
                found = made[f"{stem}.block_sparse_moe.experts.{expert}.{short}.weight"]
                _check_near(found, wanted)
        merged = dense[f"{stem}.self_attn.q_proj.weight"] + sum(
            factor / 3 * _product(adapted, f"{stem}.self_attn.q_proj", expert)
            for expert, factor in enumerate(given["scaling"])
        )
        _check_near(made[f"{stem}.self_attn.q_proj.weight"], merged)
        router = adapted[f"{stem}.mlp.gate_proj.router.weight"]
        assert torch.equal(made[f"{stem}.block_sparse_moe.gate.weight"], router)
    config = json.loads((out / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 3)


def _product(adapted: dict[str, torch.Tensor], stem: str, expert: int) -> torch.Tensor:
    return adapted[f"{stem}.adapters.b"][expert] @ adapted[f"{stem}.adapters.a"][expert]


def _check_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    eps = torch.finfo(torch.float32).eps
    assert (found - wanted).norm() <= 4 * eps * wanted.norm()


def test_rows_of_a_fused_matrix_get_their_part(tmp_path: Path) -> None:
    source = make("phi3", tmp_path / "dense")
    whole = make_adapted(source, tmp_path / "whole", linears=("gate_up_proj",), experts=2)
    out = tmp_path / "out"
    api.convert(whole, destination=out, method="molora", as_moe=True, target="mixtral")
    dense, adapted, made = tensors(source), tensors(whole), tensors(out)
    stem = "model.layers.1.mlp.gate_up_proj"
    for expert in range(2):
        wanted = dense[f"{stem}.weight"] + 2.0 * _product(adapted, stem, expert)
        at = f"model.layers.1.block_sparse_moe.experts.{expert}"
        found = torch.cat((made[f"{at}.w1.weight"], made[f"{at}.w3.weight"]))
        _check_near(found, wanted)


def test_fresh_adapters_make_equal_experts(tmp_path: Path) -> None:
    source = make("qwen2", tmp_path / "dense")
    given: dict[str, Any] = {"experts": 4, "rank": 2, "as_moe": True, "top_k": 2}
    done = api.convert(source, destination=tmp_path / "out", method="molora", **given)
    found: Any = done.manifest["verification"]
    assert (found["ok"], found["promise"]) == (True, "exact")


def test_a_split_model_gets_adapters_beside(tmp_path: Path) -> None:
    source, split = make("llama", tmp_path / "dense"), tmp_path / "split"
    api.convert(source, destination=split, method="moefy", num_experts=4)
    out = tmp_path / "out"
    done = api.convert(
        split, destination=out, method="molora", target_modules="q_proj,v_proj", standalone=True
    )
    assert done.manifest["verification"]["ok"]  # type: ignore[index]
    assert torch.equal(logits(load_model(out)), logits(load_model(split)))
    sites = json.loads((out / "config.json").read_text())["adaptive"]["sites"]
    assert {slot for slots in sites.values() for slot in slots} == {"ffn", "linear"}
