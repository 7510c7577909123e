"""Sparse blocks and their routing rule: held to the modules transformers builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import linear

from adaconvert.arch import mixture, registry
from adaconvert.arch.base import ModelSpec
from adaconvert.arch.mixture import Mixture, mixtures, refusal
from adaconvert.errors import SourceError
from adaconvert.testing.tiny_models import VARIANTS, build, config_values

SPARSE = [name for name, family in registry.FAMILIES.items() if "experts" in family.keys]
COVERED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe")
COVERED = (*COVERED, "granitemoeshared", "deepseek_v2")
NAMES = [
    *COVERED,
    *(n for n, (f, _) in VARIANTS.items() if f in COVERED and n != "deepseek_v2-groups"),
]
NORMS = ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo")
EPS = torch.finfo(torch.float32).eps


def described(name: str, **overrides: object) -> ModelSpec:
    family = VARIANTS.get(name, (name,))[0]
    return registry.describe({"model_type": family, **config_values(name), **overrides})


def built(name: str, dtype: str = "float32", **overrides: object) -> Any:
    family = VARIANTS.get(name, (name,))[0]
    return build(family, {**config_values(name), **overrides}, dtype=dtype)


def by_rule(block: Mixture, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return experts and weights [T, k] the fields of a `Mixture` promise, in float32."""
    chances = logits.float().softmax(-1)
    weights, experts = chances.topk(block.top_k)
    if block.combine == mixture.RENORM:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * block.scaling


def of_router(output: tuple[torch.Tensor, ...], count: int) -> tuple[torch.Tensor, ...]:
    """Return logits, experts and weights, whose order differs between versions of transformers."""
    experts = next(part for part in output if not part.is_floating_point())
    logits = next(part for part in output if part.shape[-1] == count)
    weights = next(part for part in output if part is not experts and part is not logits)
    return logits, experts, weights


@pytest.mark.parametrize("name", NAMES)
def test_blocks_lie_where_the_model_has_them(name: str) -> None:
    spec, model = described(name), built(name)
    assert refusal(spec) is None
    found = mixtures(spec)
    sparse = [path for path, m in model.named_modules() if path.endswith(".experts")]
    assert [f"{block.path}.{block.experts}" for block in found] == sparse
    stored = {tensor.name: tensor for tensor in spec.tensors}
    for block in found:
        module = model.get_submodule(block.path)
        router = getattr(module, block.router)
        experts = getattr(module, block.experts)
        assert router.weight.shape == (block.count, spec.hidden)
        assert experts.gate_up_proj.shape == (block.count, 2 * block.width, spec.hidden)
        assert stored[block.router_tensor].shape == (block.count, spec.hidden)
        assert block.router_tensor.startswith(f"{block.stored}.")
        assert f"layers.{block.layer}." in block.path
        assert block.glu


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}/other" for name in NORMS)])
def test_weights_follow_the_rule(name: str) -> None:
    """Experts are those the router takes, and weights those of the rule to a few roundings."""
    name, _, other = name.partition("/")
    overrides = {"norm_topk_prob": not config_values(name)["norm_topk_prob"]} if other else {}
    # k of 3 tells a renormalised sum from one of all, and a wrong k from the right one
    overrides |= {"num_experts_per_tok": 3}
    spec, model = described(name, **overrides), built(name, **overrides)
    for block in mixtures(spec):
        x = torch.randn(64, spec.hidden, generator=torch.Generator().manual_seed(block.layer))
        with torch.no_grad():
            output = model.get_submodule(f"{block.path}.{block.router}")(x)
        logits, experts, weights = of_router(output, block.count)
        wanted, shares = by_rule(block, logits)
        found = torch.zeros(64, block.count).scatter(1, experts, weights)
        expected = torch.zeros(64, block.count).scatter(1, wanted, shares)
        assert torch.equal(experts.sort().values, wanted.sort().values)
        assert (found - expected).norm() <= 4 * EPS * expected.norm()


@pytest.mark.parametrize("name", COVERED)
def test_logits_are_of_the_dtype_it_says(name: str) -> None:
    spec, model = described(name), built(name, "bfloat16")
    for block in mixtures(spec):
        router = model.get_submodule(f"{block.path}.{block.router}")
        x = torch.randn(64, spec.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
        with torch.no_grad():
            logits, _, _ = of_router(router(x), block.count)
        exact = linear(x.float(), router.weight.float())
        rounded = linear(x, router.weight).float()
        assert torch.equal(logits.float(), exact if block.float32 else rounded)
        assert not torch.equal(exact, rounded)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("qwen2_moe-some-dense", [1]),
        ("qwen3_moe-step", [1]),
        ("deepseek_v2", [1]),
        ("olmoe", [0, 1]),
    ],
)
def test_dense_blocks_are_no_mixtures(name: str, layers: list[int]) -> None:
    assert [block.layer for block in mixtures(described(name))] == layers


@pytest.mark.parametrize(
    ("name", "overrides", "why"),
    [
        ("glm4_moe", {}, "sigmoid scores with a correction bias (glm4_moe)"),
        ("dots1", {}, "sigmoid scores with a correction bias (dots1)"),
        ("ernie4_5_moe", {}, "softmax scores with a correction bias (ernie4_5_moe)"),
        (
            "deepseek_v2-groups",
            {},
            "group-limited top-k (deepseek_v2 with topk_method group_limited_greedy)",
        ),
        (
            "deepseek_v2",
            {"topk_method": "noaux_tc"},
            "a choice that is not plain top-k (deepseek_v2 with topk_method noaux_tc)",
        ),
        ("llama", {}, "no mixture of experts (llama)"),
        ("bert", {}, "no mixture of experts (bert)"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, "no sparse block (qwen3_moe)"),
        ("deepseek_v2", {"first_k_dense_replace": 2}, "no sparse block (deepseek_v2)"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    name: str, overrides: dict[str, object], why: str
) -> None:
    spec = described(name, **overrides)
    assert refusal(spec) == why
    assert mixtures(spec) == ()


def test_every_sparse_family_says_how_it_routes() -> None:
    assert {name for name, family in registry.FAMILIES.items() if family.routing} == set(SPARSE)
    assert {name for name in SPARSE if refusal(described(name)) is None} == set(COVERED)


def test_a_scaling_that_is_no_number_is_refused() -> None:
    with pytest.raises(SourceError, match="routed_scaling_factor is not usable"):
        described("deepseek_v2", routed_scaling_factor="2")
