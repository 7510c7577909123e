"""Stage 5 of `d2dmoe`: projections become networks, alone and beside split networks."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import InterruptedRunError, OptionError
from adaconvert.io import manifest
from adaconvert.layerwise.projection_data import projection_layers
from adaconvert.modeling.loading import load_model
from adaconvert.testing.projections import QUICK, ffn, sites, tensors
from adaconvert.testing.tiny_models import make

#: family -> (module of a block's attention, projections that are matrices of their own).
FAMILIES = {
    "llama": ("model.layers.{}.self_attn.{}_proj", "qkvo"),
    "qwen2": ("model.layers.{}.self_attn.{}_proj", "qkvo"),
    "phi3": ("model.layers.{}.self_attn.{}_proj", "o"),
    "gpt2": ("transformer.h.{}.attn.c_proj", "o"),
    "gpt_neox": ("gpt_neox.layers.{}.attention.dense", "o"),
}
IDS = torch.arange(40)[None] * 7 % 300


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(folder, dtype="float32")(IDS).logits
    return found


@pytest.mark.parametrize("family", list(FAMILIES))
def test_networks_take_the_place_of_projections(family: str, data: Path, tmp_path: Path) -> None:
    source = make(family, tmp_path / "m")
    template, roles = FAMILIES[family]
    options = {"stages": "5", "data": str(data), "projections": ",".join(roles), **QUICK}
    result = api.d2dmoe(source, tmp_path / "d", **options)
    exactness = result.conversion.to_json()["plan"]["exactness"]  # type: ignore[index]
    assert exactness["kind"] == "approximate"
    assert set(result.networks) == {template.format(i, r) for r in roles for i in range(2)}
    assert not ffn(tmp_path / "d")
    before, after = tensors(source), tensors(tmp_path / "d")
    gone = set(before) - set(after)
    paths = {path.removeprefix("transformer.") for path in result.networks} | set(result.networks)
    assert {name.rpartition(".")[0] for name in gone} <= paths
    assert all(torch.equal(after[name], before[name]) for name in set(before) - gone)
    dropped = {entry["tensor"] for entry in manifest.read(tmp_path / "d")["dropped"]}  # type: ignore[union-attr,index]
    assert gone <= dropped
    assert logits(tmp_path / "d").isfinite().all()


def test_the_stated_error_is_that_of_the_stored_network(
    made: Callable[..., Path], data: Path
) -> None:
    folder = made(stages="5")
    stored, told = tensors(folder), sites(folder)
    blocks = token_blocks(read_documents(data), made(), max_tokens=2000)
    for layer in projection_layers(made(), blocks, roles=tuple("qkvo"), layers=[0, 1]):
        for role in "qkvo":
            path = f"model.layers.{layer.index}.self_attn.{role}_proj"
            up, down = stored[f"{path}.up.weight"], stored[f"{path}.down.weight"]
            held = told[path]["quality"]["tokens"]
            x = layer.inputs[role][-held:]
            wanted = layer.matrices[role](x)
            missed = ((x @ up.T).relu() @ down.T - wanted).square().sum()
            error = float(missed / (wanted - wanted.mean(dim=0)).square().sum())
            assert told[path]["quality"]["error"] == pytest.approx(error, rel=1e-3)
            assert told[path]["quality"]["linear"] < error < 1
            assert {"r2", "spearman"} <= set(told[path]["router"]["quality"])


def test_sizes_cost_what_the_projection_costs(made: Callable[..., Path]) -> None:
    told = sites(made(stages="5"))
    for mlp in told.values():
        dense = mlp["hidden"] * mlp["output"]
        assert mlp["experts"]["count"] == 4
        # rounded to whole neurons of each expert
        assert abs(mlp["intermediate"] * (mlp["hidden"] + mlp["output"]) / dense - 1) <= 0.25
        assert mlp["select"] == {"rule": "all"}
    model: Any = load_model(made(stages="5"), dtype="float32")
    with torch.no_grad(), model.account() as account:
        model(IDS)
    reference = model.config.adaptive["reference"]
    assert reference["linear_flops_per_token"] == 2 * 2 * (2 * 32 * 32 + 2 * 32 * 16)
    assert reference["ffn_flops_per_token"] == 0
    assert account.flops_per_token()["linear"] <= 1.25 * reference["linear_flops_per_token"]


def test_every_stage_together_and_one_after_the_other(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    at_once = made(stages="2,3,4,5", expert_width=8, tau=0.2)
    assert {s["select"]["tau"] for s in (*sites(at_once).values(), *ffn(at_once).values())} == {0.2}
    assert len(sites(at_once)) == 8
    assert len(ffn(at_once)) == 2
    split = made(stages="2,3,4", expert_width=8, tau=0.2)
    after = tmp_path / "after"
    api.d2dmoe(split, after, stages="5", data=str(data), tau=0.2, **QUICK)
    one, other = tensors(at_once), tensors(after)
    assert set(one) == set(other)
    for name, tensor in one.items():
        if ".self_attn." not in name:
            assert torch.equal(tensor, other[name]), name
    # one was fitted on the dense model, the other on the same with its neurons in another order:
    # training makes more of the rounding, and the networks are as good
    for path, mlp in sites(at_once).items():
        error = sites(after)[path]["quality"]["error"]
        assert error == pytest.approx(mlp["quality"]["error"], rel=0.1)
    api.verify(made(), at_once)
    api.verify(split, after)


def test_tau_and_routers_of_both_kinds_can_be_changed(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    source = made(stages="2,3,4,5", expert_width=8, tau=0.2)
    api.d2dmoe(source, tmp_path / "tau", stages="4", tau=0.6)
    changed = (*sites(tmp_path / "tau").values(), *ffn(tmp_path / "tau").values())
    assert {spec["select"]["tau"] for spec in changed} == {0.6}
    before, after = tensors(source), tensors(tmp_path / "tau")
    assert all(torch.equal(after[name], before[name]) for name in before)
    told = sites(tmp_path / "tau")
    assert all(spec["quality"] == told[p]["quality"] for p, spec in sites(source).items())
    options = {**QUICK, "projection_router_width": 5, "seed": 1}
    result = api.d2dmoe(tmp_path / "tau", tmp_path / "new", stages="3", data=str(data), **options)
    found = tensors(tmp_path / "new")
    for name, tensor in before.items():
        assert (
            (".router." in name) != torch.equal(found[name], tensor)
            if (name in found and found[name].shape == tensor.shape)
            else ".router." in name
        )
    q = "model.layers.0.self_attn.q_proj"
    assert found[f"{q}.router.w1"].shape == (5, 32)
    assert sites(tmp_path / "new")[q]["select"] == {"rule": "dynamic-k", "tau": 0.6}
    assert result.networks[q].router is not None
    # what was measured when the network was made is still told
    assert result.networks[q].distilled is not None
    api.verify(tmp_path / "tau", tmp_path / "new")


def test_the_card_says_so(made: Callable[..., Path]) -> None:
    alone = (made(stages="5") / "README.md").read_text()
    assert "# m, with networks for projections" in alone
    assert "networks trained to do the same took the place of the projections q, k, v, o" in alone
    both = (made(stages="2,3,4,5", expert_width=8, tau=0.2) / "README.md").read_text()
    assert "# m, split into 8 experts, with networks for projections" in both
    assert "were split into 8 experts of 8 neurons" in both
    for card in (alone, both):
        assert "so `unmoefy` cannot bring the dense model back" in card
        assert "squared error 0." in card


def test_only_some_blocks_and_projections(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m", layers=3)
    first, second = tmp_path / "1", tmp_path / "2"
    options = {"stages": "5", "data": str(data), **QUICK}
    api.d2dmoe(source, first, projections="v", layers="1", **options)
    assert set(sites(first)) == {"model.layers.1.self_attn.v_proj"}
    api.d2dmoe(first, second, projections="o", layers="0-1", **options)
    assert set(sites(second)) == {
        *("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"),
        "model.layers.1.self_attn.v_proj",
    }
    reference = json.loads((second / "config.json").read_text())["adaptive"]["reference"]
    assert reference["linear_flops_per_token"] == 2 * (32 * 16 + 2 * 32 * 32)
    assert logits(second).isfinite().all()


def test_a_network_that_is_not_split(data: Path, tmp_path: Path) -> None:
    source = make("llama", tmp_path / "m")
    options = {**QUICK, "projection_experts": 1, "projections": "k", "stages": "5"}
    result = api.d2dmoe(source, tmp_path / "d", data=str(data), tau=0.9, **options)
    for mlp in sites(tmp_path / "d").values():
        assert mlp["experts"] == {"count": 1, "width": 11}, "32 * 16 / (32 + 16) is 10.7"
        assert mlp["router"] == {"kind": "none"}
        assert mlp["select"] == {"rule": "all"}
    assert all(quality.router is None for quality in result.networks.values())
    assert not any(".router." in name for name in tensors(tmp_path / "d"))
    assert logits(tmp_path / "d").isfinite().all()


def test_sixteen_bit_models_stay_so(data: Path, tmp_path: Path) -> None:
    source = make("qwen2", tmp_path / "m", dtype="bfloat16")
    options = {"stages": "5", "data": str(data), "projections": "q", **QUICK}
    api.d2dmoe(source, tmp_path / "d", **options)
    path = "model.layers.0.self_attn.q_proj"
    found = {n: t.dtype for n, t in tensors(tmp_path / "d").items() if n.startswith(f"{path}.")}
    assert found == {
        f"{path}.up.weight": torch.bfloat16,
        f"{path}.up.bias": torch.bfloat16,
        f"{path}.down.weight": torch.bfloat16,
        f"{path}.down.bias": torch.bfloat16,
        f"{path}.router.w1": torch.float32,
        f"{path}.router.w2": torch.float32,
    }


def test_the_same_options_give_the_same_bytes(
    made: Callable[..., Path], data: Path, tmp_path: Path
) -> None:
    first = made(stages="5", projections="q,o")
    again = tmp_path / "again"
    api.d2dmoe(made(), again, data=str(data), stages="5", projections="q,o", **QUICK)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (again / name).read_bytes()


def test_a_killed_run_goes_on_from_its_work_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, work = make("llama", tmp_path / "m", layers=3), tmp_path / "w"
    options = {**QUICK, "stages": "5", "data": str(data), "projections": "v"}
    api.d2dmoe(source, tmp_path / "whole", **options)
    module = import_module("adaconvert.methods.d2dmoe.projection_fit")
    real: Callable[..., Any] = module.distil
    fitted: list[int] = []

    def stop_at(last: int) -> Callable[..., Any]:
        def distil(*args: Any, **kwargs: Any) -> Any:
            if len(fitted) == last:
                raise KeyboardInterrupt
            fitted.append(1)
            return real(*args, **kwargs)

        return distil

    monkeypatch.setattr(module, "distil", stop_at(2))
    with pytest.raises(InterruptedRunError, match="2 fitted layers are kept in --work w"):
        api.d2dmoe(source, tmp_path / "d", work=str(work), **options)
    monkeypatch.setattr(module, "distil", stop_at(9))
    api.d2dmoe(source, tmp_path / "d", work=str(work), **options)
    assert len(fitted) == 3
    assert torch.equal(logits(tmp_path / "d"), logits(tmp_path / "whole"))
    assert not list(work.rglob("*.bin"))
    # another tau needs no fit, other steps do
    api.d2dmoe(source, tmp_path / "e", work=str(work), tau=0.5, **options)
    assert len(fitted) == 3
    with pytest.raises(OptionError, match="belongs to another run"):
        api.d2dmoe(source, tmp_path / "f", work=str(work), **{**options, "projection_steps": 9})
