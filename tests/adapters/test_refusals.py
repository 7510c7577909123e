"""What the method refuses, and what it says."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from adaconvert.adapters import MoloraConfig
from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_in_peft import attach, logits_of
from adaconvert.testing.adaptive_by_hand import make_adaptive

Bases = Callable[..., Path]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "configuration: r: .* expected 1 or more, found 0"),
        ({"r": True}, "configuration: r: "),
        ({"num_experts": 0}, "num_experts: .* expected 1 or more"),
        ({"lora_alpha": float("nan")}, "lora_alpha: .* expected 0 or more"),
        ({"dropout": 1.0}, "dropout: .* expected 0 or more, below 1"),
        ({"init_std": -1}, "init_std"),
        ({"experts_kind": "dora"}, "experts_kind: .* expected lora or ia3, found 'dora'"),
        ({"share": "b"}, "share: .* expected None or a, found 'b'"),
        ({"share": "a", "experts_kind": "ia3"}, "share: .* expected None with ia3"),
        ({"dropout": 0.1, "experts_kind": "ia3"}, "dropout: .* expected 0 with ia3"),
        ({"feedforward_modules": ["down_proj"]}, "feedforward_modules: .* None with lora"),
        ({"scaling": [1.0]}, "scaling: .* expected 8 numbers, found 1"),
        ({"scaling": "2"}, "scaling: .* expected numbers"),
        ({"router": {"reads": "token"}}, "router.reads: .* module or layer or shared"),
        ({"router": {"read": "layer"}}, "router: .* expected an object of kind, reads"),
        ({"router": {"scale": None}}, "router.scale: .* expected a number"),
        ({"select": {"rule": "top-k"}}, "top-k needs k above 0, at most 8: None"),
        ({"select": {"rule": "top-k", "k": 9}}, "at most 8: 9"),
        ({"select": {"rule": "best"}}, "select.rule is 'best', known: soft"),
        ({"select": {"rule": "top-p", "p": 1.5}}, "top-p needs p above 0, at most 1"),
        ({"select": "soft"}, "MOLORA configuration"),
    ],
    ids=str,
)
def test_a_configuration_that_means_nothing(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        MoloraConfig(**settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("0", "is a bare integer, and so are the names of layers"),
        ("12", r"Use another name, such as 'adapter12'\."),
        ("layers", "is also the name of a module of the model"),
        ("q_proj", "is also the name of a module"),
        ("a.b", "is empty or has a dot"),
    ],
)
def test_names_that_peft_takes_for_modules(base_of: Bases, name: str, message: str) -> None:
    model: Any = load_model(base_of("llama"))
    want = logits_of(model)
    with pytest.raises(OptionError, match=message):
        attach(model, name)
    assert not hasattr(model, "peft_config")
    kept = attach(model, "fine", seed=None)
    with pytest.raises(OptionError, match=message):
        kept.add_adapter(name, MoloraConfig(target_modules=["q_proj"]))
    assert list(kept.peft_config) == ["fine"]
    assert torch.equal(logits_of(kept), want)
    model = load_model(base_of("llama"))
    model.add_adapter(MoloraConfig(target_modules=["q_proj"]), "fine")
    with pytest.raises(OptionError, match=message):
        model.load_adapter(peft_config=MoloraConfig(), adapter_name=name)
    assert list(model.peft_config) == ["fine"]


@pytest.mark.parametrize(
    ("family", "target", "message"),
    [
        ("llama", ["q_prj", "v_proj"], "'q_prj': is no module .* one of q_proj"),
        ("llama", ["self_attn.qproj"], "is no module of the model; expected one of q_proj"),
        ("llama", ["zzz"], "expected one of down_proj, gate_proj, .* v_proj"),
        ("llama", "model.layers.7.*proj", "is no module of the model; expected one of"),
        ("llama", ["lm_head"], "'lm_head': is an embedding, or the output layer"),
        ("llama-tied", ["lm_head"], "'lm_head': is an embedding, or the output layer"),
        ("llama", ["embed_tokens"], "'model.embed_tokens': is an embedding"),
        ("llama", ["input_layernorm"], r"is no linear \(LlamaRMSNorm\)"),
        ("llama", ["mlp"], r"is no linear \(LlamaMLP\)"),
        ("gpt2", ["q_proj"], "one of c_proj"),
        ("gpt2", ["wte"], "is an embedding"),
        ("mixtral", ["experts"], r"is no linear \(MixtralExperts\)"),
        (
            *("mixtral", ["gate_up_proj"]),
            "is the parameter '.*gate_up_proj' of stacked experts, which is no linear",
        ),
    ],
    ids=str,
)
def test_targets_that_can_have_no_adapters(
    base_of: Bases, family: str, target: Any, message: str
) -> None:
    model: Any = load_model(base_of(family))
    want = logits_of(model)
    with pytest.raises(OptionError, match=message):
        attach(model, target_modules=target)
    assert torch.equal(logits_of(model), want)
    # as it was: the very next attempt works
    attach(model, target_modules="all-linear")


def test_a_router_of_blocks_wants_linears_in_blocks(base_of: Bases) -> None:
    base = base_of("bert")
    with pytest.raises(OptionError, match="lies in no block"):
        attach(base, target_modules=["dense"], router={"reads": "layer"})
    attach(base, target_modules=["dense"])


def test_a_linear_at_two_places(base_of: Bases) -> None:
    model: Any = load_model(base_of("llama"))
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(OptionError, match="is one module at several places"):
        attach(model, target_modules=["up_proj"])
    attach(model, target_modules=["q_proj"])


def test_a_base_without_hidden_size() -> None:
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(OptionError, match="has no hidden_size"):
        attach(base, target_modules=["0"], router={"reads": "layer"})


def test_linears_that_have_other_adapters(base_of: Bases) -> None:
    model: Any = load_model(base_of("llama"))
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "plain")
    with pytest.raises(OptionError, match="has adapters of another PEFT method"):
        model.add_adapter(MoloraConfig(target_modules=["q_proj"]), "routed")


def test_an_adaptive_base(base_of: Bases, tmp_path: Path) -> None:
    folder = make_adaptive(base_of("llama"), tmp_path / "adaptive")
    with pytest.raises(OptionError, match="the base model: is adaptive"):
        attach(folder)


def test_another_base_is_a_warning_and_the_same_in_bfloat16_is_not(
    base_of: Bases, tmp_path: Path
) -> None:
    attach(base_of("llama")).save_pretrained(tmp_path / "saved")
    other: Any = load_model(base_of("llama", seed=7))
    with pytest.warns(UserWarning, match="these adapters were made for another base"):
        PeftModel.from_pretrained(other, tmp_path / "saved")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        half: Any = load_model(base_of("llama"), dtype="bfloat16")
        PeftModel.from_pretrained(half, tmp_path / "saved")
