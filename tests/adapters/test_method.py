"""The method under PEFT: what it computes, and several adapter sets on one model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from adaconvert.adapters import MoloraConfig, MoloraLinear, set_routing
from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.adapters_in_peft import attach, batch_of, fill, logits_of

Bases = Callable[..., Path]
LINEARS = ("q_proj", "v_proj", "down_proj")
EPS = torch.finfo(torch.float32).eps


def hooks_of(model: nn.Module) -> int:
    """Return how many hooks the blocks have."""
    blocks = [module for path, module in model.named_modules() if path.endswith(("layers.0", "1"))]
    return sum(len(b._forward_hooks) + len(b._forward_pre_hooks) for b in blocks)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "vit", "gpt_neox", "phi3"])
@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_new_adapter_changes_no_bit(base_of: Bases, family: str, kind: str) -> None:
    dense: Any = load_model(base_of(family))
    want = logits_of(dense)
    model = attach(dense, seed=None, experts_kind=kind)
    assert torch.equal(logits_of(model), want)
    assert any(isinstance(module, MoloraLinear) for module in model.modules())


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"reads": "layer", "select": {"rule": "top-k", "k": 2, "renormalize": True}},
        {"reads": "shared", "select": {"rule": "top-p", "p": 0.6}},
        {"share": "a", "select": {"rule": "sigmoid"}},
        {"kind": "ia3"},
        {"kind": "ia3", "on": "input", "reads": "layer"},
        {"router": {"kind": "none"}},
        {"scaling": [0.5, 1.0, 2.0, 3.0], "router": {"score": "abs", "norm": "layernorm"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_computes_the_bits_of_the_standalone_form(
    base_of: Bases, tmp_path: Path, case: dict[str, Any], dtype: str
) -> None:
    base = base_of("llama", dtype=dtype)
    folder = make_adapted(base, tmp_path / "standalone", linears=LINEARS, **case)
    alone: Any = load_model(folder)
    router = {"reads": case.get("reads", "module"), **case.get("router", {})}
    model = attach(
        base,
        seed=None,
        target_modules=list(LINEARS),
        r=2,
        lora_alpha=4,
        scaling=case.get("scaling"),
        experts_kind=case.get("kind", "lora"),
        share=case.get("share"),
        feedforward_modules=list(LINEARS) if case.get("on") == "input" else None,
        router=router,
        select=case.get("select", {"rule": "soft"}),
    )
    stored = load_file(folder / "model.safetensors")
    own = model.get_base_model().state_dict()
    names = {"molora_A": "adapters.a", "molora_B": "adapters.b", "molora_vectors": "adapters."}
    names["molora_vectors"] += "vectors"
    names["molora_router"] = "router.weight"
    filled = 0
    for name, tensor in own.items():
        path, _, kind = name.removesuffix(".default").rpartition(".")
        if kind in names:
            tensor.copy_(stored.pop(f"{path}.{names[kind]}"))
            filled += 1
    assert filled
    # no adapter or router of the checkpoint is left over: the same linears hold them
    assert not [name for name in stored if ".adapters." in name or ".router." in name]
    assert torch.equal(logits_of(model), logits_of(alone))


def test_one_adapter_computes_what_lora_does(base_of: Bases) -> None:
    base = base_of("llama")
    model = attach(base, num_experts=1, target_modules=["q_proj", "up_proj"])
    settings = {"r": 3, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]}
    stock: Any = get_peft_model(load_model(base), LoraConfig(**settings)).eval()
    own = model.state_dict()
    for name, tensor in stock.state_dict().items():
        if "lora_" in name:
            kind = "molora_" + name.split("lora_")[1][0]
            tensor.copy_(own[f"{name.split('.lora_')[0]}.{kind}.default"][0])
    found, want = logits_of(model), logits_of(stock)
    assert (found - want).norm() <= 20 * EPS * want.norm()


def test_several_adapter_sets_live_side_by_side(base_of: Bases, tmp_path: Path) -> None:
    base = base_of("llama")
    dense = logits_of(load_model(base))
    settings: dict[str, dict[str, Any]] = {
        "first": {"router": {"reads": "layer"}},
        "second": {"experts_kind": "ia3", "router": {"reads": "shared"}, "num_experts": 3},
        "third": {"target_modules": ["o_proj"], "num_experts": 2, "r": 1},
    }
    alone = {
        name: logits_of(attach(base, name, seed=len(name), **options))
        for name, options in settings.items()
    }
    model = attach(base, "first", seed=5, **settings["first"])
    for name in ("second", "third"):
        options = {"target_modules": "all-linear", "num_experts": 4, "r": 3, **settings[name]}
        model.add_adapter(name, MoloraConfig(**options))
        fill(model, name, seed=len(name))
    assert torch.equal(logits_of(model), alone["first"])
    for name in ("second", "third", "first"):
        model.set_adapter(name)
        assert torch.equal(logits_of(model), alone[name])
        with model.disable_adapter():
            assert torch.equal(logits_of(model), dense)
    model.save_pretrained(tmp_path / "saved")
    for name in settings:
        # the set called "default" goes to the folder itself, others to one of their name
        again: Any = PeftModel.from_pretrained(load_model(base), tmp_path / "saved" / name)
        assert torch.equal(logits_of(again.eval()), alone[name])
    model.delete_adapter("first")
    model.set_adapter("second")
    assert torch.equal(logits_of(model), alone["second"])
    assert not [name for name in model.state_dict() if name.endswith(".first")]


def test_active_together_they_add_up(base_of: Bases) -> None:
    model = attach(base_of("llama"), "first", target_modules=["q_proj"])
    model.add_adapter("second", MoloraConfig(target_modules=["q_proj"], num_experts=4, r=3))
    fill(model, "second", seed=9)
    layer = next(module for module in model.modules() if isinstance(module, MoloraLinear))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = layer.base_layer(x)
        each = []
        for name in ("first", "second"):
            model.base_model.set_adapter(name)
            each.append(layer(x) - plain)
        model.base_model.set_adapter(["first", "second"])
        found = layer(x)
    want = plain + each[0] + each[1]
    assert (found - want).norm() <= 8 * EPS * want.norm()


@pytest.mark.parametrize("reads", ["layer", "shared"])
def test_blocks_route_for_their_linears_until_the_adapter_is_gone(
    base_of: Bases, reads: str
) -> None:
    base = base_of("llama")
    dense = logits_of(load_model(base))
    model = attach(base, router={"reads": reads})
    assert hooks_of(model) == 4
    model.add_adapter("other", MoloraConfig(target_modules="all-linear", router={"reads": reads}))
    assert hooks_of(model) == 8
    model.delete_adapter("other")
    assert hooks_of(model) == 4
    plain = model.unload()
    assert hooks_of(plain) == 0
    assert torch.equal(logits_of(plain), dense)
    assert not any(isinstance(module, MoloraLinear) for module in plain.modules())


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_copies_and_pickles_compute_the_same_and_are_independent(
    base_of: Bases, reads: str
) -> None:
    model = attach(base_of("llama"), router={"reads": reads})
    want = logits_of(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(again), want)
        for name, parameter in again.named_parameters():
            if "molora_router" in name:
                parameter.data.zero_()
        assert not torch.equal(logits_of(again), want)
        # handles of the copy remove the hooks of the copy
        again.delete_adapter("default")
        assert hooks_of(again) == 0
    assert torch.equal(logits_of(model), want)


def test_a_cache_changes_nothing(base_of: Bases) -> None:
    model = attach(base_of("llama"), router={"reads": "layer"})
    ids = batch_of(model)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        fast = model.generate(input_ids=ids, **options)
        slow = model.generate(input_ids=ids, use_cache=False, **options)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("reads", ["module", "layer"])
def test_routing_can_be_changed_and_is_saved(base_of: Bases, tmp_path: Path, reads: str) -> None:
    base = base_of("llama")
    model = attach(base, router={"reads": reads})
    soft = logits_of(model)
    set_routing(model, "top-k", k=1, renormalize=True)
    one = logits_of(model)
    assert not torch.equal(one, soft)
    model.save_pretrained(tmp_path / "saved")
    again: Any = PeftModel.from_pretrained(load_model(base), tmp_path / "saved").eval()
    assert torch.equal(logits_of(again), one)
    set_routing(again, "soft")
    assert torch.equal(logits_of(again), soft)
    with pytest.raises(OptionError, match="top-k needs k above 0, at most 4"):
        set_routing(model, "top-k", k=5)
    with pytest.raises(OptionError, match="has no routed adapters"):
        set_routing(model, "soft", adapter="absent")


def test_a_saved_adapter_is_the_same_bytes_again(base_of: Bases, tmp_path: Path) -> None:
    base = base_of("llama")
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        attach(base, target_modules=["v_proj", "q_proj", "up_proj"]).save_pretrained(folder)
        found.append({path.name: path.read_bytes() for path in sorted(folder.iterdir())})
    assert found[0] == found[1]


def test_dtypes_of_base_and_adapters_may_differ(base_of: Bases) -> None:
    base = base_of("llama", dtype="bfloat16")
    model = attach(base)
    kinds = {n.split(".")[-2]: p.dtype for n, p in model.named_parameters() if "molora_" in n}
    # PEFT keeps what is trained in float32
    assert set(kinds.values()) == {torch.float32}
    want = logits_of(model)
    assert want.dtype == torch.bfloat16
    narrow = attach(base, seed=0)
    for name, parameter in narrow.named_parameters():
        if "molora_A" in name or "molora_B" in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(logits_of(narrow), want)


def test_the_classifier_of_a_classification_is_saved_beside(base_of: Bases, tmp_path: Path) -> None:
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    base = base_of("llama")

    def dense() -> Any:
        torch.manual_seed(0)
        return auto.from_pretrained(base, num_labels=3, pad_token_id=0)

    model: Any = attach(dense(), task_type="SEQ_CLS")
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(4))
    want = logits_of(model)
    model.save_pretrained(tmp_path / "saved")
    again: Any = PeftModel.from_pretrained(dense(), tmp_path / "saved").eval()
    assert torch.equal(logits_of(again), want)


def test_transformers_own_functions_attach_switch_and_delete(base_of: Bases) -> None:
    base = base_of("llama")
    dense = logits_of(load_model(base))
    model: Any = load_model(base)
    for name in ("one", "two"):
        config = MoloraConfig(target_modules="all-linear", num_experts=4, r=3)
        config.router["reads"] = "layer"
        model.add_adapter(config, adapter_name=name)
        fill(model, name, seed=len(name) + ord(name[0]))
    found: dict[str, Tensor] = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = logits_of(model)
    assert not torch.equal(found["one"], found["two"])
    model.disable_adapters()
    assert torch.equal(logits_of(model), dense)
    model.enable_adapters()
    assert torch.equal(logits_of(model), found["two"])
    model.delete_adapter("one")
    assert torch.equal(logits_of(model), found["two"])
    assert hooks_of(model) == 4
    model.delete_adapter("two")
    assert hooks_of(model) == 0
    assert torch.equal(logits_of(model), dense)
