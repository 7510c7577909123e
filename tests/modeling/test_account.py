"""What a model counts while it runs is what its shapes say, by one rule for dense and adaptive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adaconvert
from adaconvert.evaluate.compute import estimated
from adaconvert.io.source import Source
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

#: by name: windows in every layer, in one of two, and none; tied heads, biases, plain networks.
FAMILIES = [
    *("llama", "llama-tied", "mistral-sliding", "qwen2-sliding", "gemma3_text", "phi3", "gpt2"),
    *("gpt_neox", "bert", "vit", "BertForPreTraining", "BertForTokenClassification"),
    *("BertForSequenceClassification", "BertForQuestionAnswering", "ViTForMaskedImageModeling"),
]
LENGTH = 21


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("account")

    def get(family: str) -> tuple[Path, Path]:
        dense, adaptive = root / family, root / f"{family}-adaptive"
        if not dense.exists():
            named = "For" in family
            stock = family.partition("For")[0].lower() if named else family
            tiny_models.make(stock, dense, architecture=family if named else None)
            adaconvert.convert(
                dense,
                destination=adaptive,
                method="moefy",
                num_experts=8,
                split="contiguous",
                router="similarity",
                verify=False,
            )
        return dense, adaptive

    return get


def run(model: Any, length: int = LENGTH) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), model.account() as account:
        if model.config.model_type.endswith("vit"):
            model(torch.rand(2, 3, 16, 16, generator=generator))
        else:
            model(torch.randint(3, 300, (2, length), generator=generator))
    return account


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_and_adaptive_are_counted_alike(folders: Any, family: str) -> None:
    dense, adaptive = folders(family)
    model: Any = load_model(adaptive, dtype="float32")
    account = run(model)
    length = account.tokens // 2
    found = estimated(Source.open(str(dense)), {length: 2}, "torch.float32")
    assert found is not None
    assert account.compute() == 1.0
    costs, size = account.flops_per_token(), account.weight_bytes_per_token()
    assert costs["total"] == found.flops
    assert costs["ffn"] == found.ffn_flops
    assert (size["total"], size["router"]) == (found.weight_bytes, 0)
    # a router that runs is the only thing more
    with model.set_select("threshold", threshold=-1.0):
        routed = run(model)
    router = routed.flops_per_token()["router"]
    assert router == sum(site.router_flops for site in routed.sites.values())
    assert routed.flops_per_token()["total"] == found.flops + router
    whole = model.config.adaptive["reference"]["flops_per_token"]
    assert routed.compute() == (whole + router) / whole


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_is_what_its_length_costs(folders: Any, family: str) -> None:
    dense, adaptive = folders(family)
    reference = load_model(adaptive, dtype="float32").config.adaptive["reference"]
    found = estimated(Source.open(str(dense)), {reference["length"]: 1})
    assert found is not None
    assert reference["flops_per_token"] == round(found.flops)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_dynamically_quantised_matrices_are_counted(folders: Any) -> None:
    model: Any = load_model(folders("llama")[1], dtype="float32")
    before = run(model)
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with small.set_select("top-k", k=4):
        half = run(small)
    after = run(small)
    assert after.flops_per_token() == before.flops_per_token()
    assert half.flops_per_token()["ffn"] == before.flops_per_token()["ffn"] / 2
    size = after.weight_bytes_per_token()
    assert size["ffn"] == before.weight_bytes_per_token()["ffn"] / 4
    assert size["total"] == before.weight_bytes_per_token()["total"] / 4


def test_matrices_of_four_bits_are_counted_by_their_sizes(folders: Any) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model: Any = load_model(folders("llama")[1], dtype="float32")
    before = run(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            made = bitsandbytes.nn.Linear4bit(
                old.in_features, old.out_features, bias=False, compress_statistics=False
            )
            made.weight = bitsandbytes.nn.Params4bit(old.weight.data, requires_grad=False)
            setattr(layer.mlp, name, made.to("cpu"))
    after = run(model)
    assert after.flops_per_token() == before.flops_per_token()
    packed = after.weight_bytes_per_token()["ffn"]
    assert packed == before.weight_bytes_per_token()["ffn"] / 8


def test_oracle_of_split_modules_knows_the_norms_of_outputs(tmp_path: Path) -> None:
    dense = tiny_models.make("bert", tmp_path / "dense")
    model: Any = load_model(make_adaptive(dense, tmp_path / "a", router="oracle"), dtype="float32")
    layer = model.bert.encoder.layer[0]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, scores = layer.intermediate._scores(x)
        hidden = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
        parts = hidden * torch.linalg.vector_norm(layer.output.dense.weight, dim=0)
    want = torch.linalg.vector_norm(parts.reshape(5, 8, 8), dim=-1)
    # sums of 8 squares in float32
    assert torch.allclose(scores, want, rtol=1e-6, atol=0)
    assert "adaptive_down" not in dict(model.named_modules())
    assert len(model.state_dict()) == len(set(model.state_dict()))
