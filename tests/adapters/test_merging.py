"""Merging adapters into matrices: what can be, what cannot, and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.adapters import MoloraConfig, MoloraLinear, set_routing
from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import attach, batch_of, fill, logits_of

Bases = Callable[..., Path]
UNIFORM = {"rule": "uniform"}
#: a few roundings of one matrix product in each of the linears of two blocks.
CLOSE = 200 * torch.finfo(torch.float32).eps
MERGEABLE: dict[str, dict[str, Any]] = {
    "uniform": {"select": UNIFORM},
    "uniform-layer": {"select": UNIFORM, "router": {"reads": "layer"}},
    "no-router": {"router": {"kind": "none"}},
    "one": {"num_experts": 1},
    "one-of-one": {"num_experts": 1, "select": {"rule": "top-k", "k": 1}},
    "shared-a": {"select": UNIFORM, "share": "a"},
    "scalings": {"select": UNIFORM, "scaling": [0.5, 1.0, 2.0, 3.0]},
    "vectors": {"select": UNIFORM, "experts_kind": "ia3"},
    "vectors-on-input": {
        **{"select": UNIFORM, "experts_kind": "ia3", "feedforward_modules": r".*(down_proj|c_proj)"}
    },
}


@pytest.mark.parametrize("family", ["llama", "llama-mlp-bias", "gpt2"])
@pytest.mark.parametrize("case", MERGEABLE)
def test_uniform_gates_become_part_of_the_matrices(base_of: Bases, family: str, case: str) -> None:
    model = attach(base_of(family), **MERGEABLE[case])
    want = logits_of(model)
    model.merge_adapter()
    found = logits_of(model)
    assert (found - want).norm() <= CLOSE * want.norm()
    model.unmerge_adapter()
    # the very bits, not what a subtraction leaves
    assert torch.equal(logits_of(model), want)
    plain = model.merge_and_unload(safe_merge=True)
    assert torch.equal(logits_of(plain), found)
    stock: Any = load_model(base_of(family))
    assert set(plain.state_dict()) == set(stock.state_dict())
    assert not any(isinstance(module, MoloraLinear) for module in plain.modules())


@pytest.mark.parametrize("select", [{"rule": "soft"}, {"rule": "top-k", "k": 2}])
@pytest.mark.parametrize("reads", ["module", "layer"])
def test_routed_adapters_are_not_merged_and_nothing_changes(
    base_of: Bases, select: dict[str, Any], reads: str
) -> None:
    model = attach(base_of("llama"), select=select, router={"reads": reads})
    want = logits_of(model)
    for call in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(OptionError, match="every token weighs 4 adapters by its own router"):
            call()
    layer = next(module for module in model.modules() if isinstance(module, MoloraLinear))
    with pytest.raises(OptionError, match="no single matrix computes that"):
        layer.merge()
    assert torch.equal(logits_of(model), want)
    set_routing(model, "uniform")
    assert not torch.equal(logits_of(model), want)
    model.merge_and_unload()


def test_a_gate_of_one_adapter_is_not_merged(base_of: Bases) -> None:
    model = attach(base_of("llama"), num_experts=1, select={"rule": "sigmoid"})
    with pytest.raises(OptionError, match="every token weighs a gate by its own router"):
        model.merge_adapter()


def test_one_that_cannot_be_merged_keeps_all_from_it(base_of: Bases) -> None:
    model = attach(base_of("llama"), "flat", target_modules=["q_proj"], select=UNIFORM)
    model.add_adapter("routed", MoloraConfig(target_modules=["v_proj"], num_experts=4))
    fill(model, "routed", seed=3)
    with pytest.raises(OptionError, match="adapter 'routed': cannot be merged"):
        model.merge_adapter(["flat", "routed"])
    layers = [module for module in model.modules() if isinstance(module, MoloraLinear)]
    assert not any(layer.merged for layer in layers)


def test_several_are_merged_in_the_order_they_run(base_of: Bases) -> None:
    kinds: dict[str, dict[str, Any]] = {
        "low": {},
        "inner": {"experts_kind": "ia3", "feedforward_modules": ["up_proj", "down_proj"]},
        "outer": {"experts_kind": "ia3"},
    }
    common: dict[str, Any] = {"target_modules": ["up_proj", "down_proj"], "select": UNIFORM}
    model = attach(base_of("llama-mlp-bias"), "low", **common)
    for name in ("inner", "outer"):
        model.add_adapter(name, MoloraConfig(num_experts=4, **common, **kinds[name]))
        fill(model, name, seed=len(name))
    model.base_model.set_adapter(list(kinds))
    want = logits_of(model)
    model.base_model.merge_adapter()
    found = logits_of(model)
    assert (found - want).norm() <= CLOSE * want.norm()
    model.base_model.unmerge_adapter()
    assert torch.equal(logits_of(model), want)
    # one after the other gives the same
    for name in kinds:
        model.base_model.merge_adapter([name])
    assert torch.equal(logits_of(model), found)


def test_a_merged_model_is_unmerged_where_its_adapters_are_switched_off(base_of: Bases) -> None:
    base = base_of("llama")
    model = attach(base, select=UNIFORM)
    want = logits_of(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(load_model(base)))
    assert torch.equal(logits_of(model), want)


def test_merging_what_is_not_finite_is_refused_and_leaves_the_matrix(base_of: Bases) -> None:
    base = base_of("llama")
    dense: Any = load_model(base)
    weight = dense.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = attach(dense, target_modules=["q_proj"], select=UNIFORM)
    for name, parameter in model.named_parameters():
        if "molora_A" in name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(OptionError, match="what merging gives is not finite"):
        model.merge_adapter(safe_merge=True)
    layer = dense.model.layers[0].self_attn.q_proj
    assert torch.equal(layer.base_layer.weight, weight)
    assert not layer.merged


def test_a_half_model_is_merged_in_float32(base_of: Bases) -> None:
    model = attach(base_of("llama", dtype="bfloat16"), select=UNIFORM, target_modules=["q_proj"])
    layer: Any = next(module for module in model.modules() if isinstance(module, MoloraLinear))
    weight = layer.base_layer.weight.detach().double()
    a, b = (getattr(layer, f"molora_{kind}")["default"].detach().double() for kind in "AB")
    want = weight + torch.einsum("emr,ern->mn", b, a) * (16 / 3) / 4
    model.merge_adapter()
    found = layer.base_layer.weight
    assert found.dtype == torch.bfloat16
    # one rounding to bfloat16
    assert (found.double() - want).norm() <= torch.finfo(torch.bfloat16).eps * want.norm()
    assert batch_of(model)
