"""Where the feed-forward network of each family lies: held to models transformers builds."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.arch import adaptive
from adaconvert.arch.registry import FAMILIES, describe
from adaconvert.arch.sites import ffn_site
from adaconvert.io.source import Source
from adaconvert.testing.tiny_models import build, config_values, make

DENSE = [name for name, family in FAMILIES.items() if family.routing is None]
ARCHITECTURES = [(name, None) for name in DENSE] + [
    *(("bert", name) for name in FAMILIES["bert"].architectures),
    *(("vit", name) for name in FAMILIES["vit"].architectures),
]


def test_every_dense_family_can_be_split() -> None:
    assert len(DENSE) == 17
    assert {name for name, f in FAMILIES.items() if f.routing is not None} == {
        *("mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "granitemoeshared"),
        *("flex_olmo", "glm4_moe", "ernie4_5_moe", "dots1", "olmoe", "deepseek_v2"),
    }


@pytest.mark.parametrize(("family", "architecture"), ARCHITECTURES)
def test_sites_are_modules_of_the_model(
    family: str, architecture: str | None, tmp_path: Path
) -> None:
    """Module, children and shapes are where the table says, in memory as on disk."""
    import transformers

    folder = make(family, tmp_path / "model", architecture=architecture)
    source = Source.open(folder)
    spec = describe(source.config, source.tensors)
    model = build(family, config_values(family), architecture=spec.architecture)
    for layer in range(spec.layers):
        site = ffn_site(spec, layer)
        module = model.get_submodule(site.path)
        wanted = {"up": spec.intermediate, "gate": spec.intermediate}
        for role, child in site.weights.items():
            weight = getattr(module, child).weight
            neurons = {"gate_up": 2 * spec.intermediate}.get(role, wanted.get(role))
            if role == "down":
                assert spec.intermediate in weight.shape
            else:
                assert neurons in weight.shape
        if site.down_path is not None:
            assert spec.intermediate in model.get_submodule(site.down_path).weight.shape
        for part in site.parts:
            assert source.tensors[part.tensor].shape[part.axis] == part.runs * spec.intermediate
    assert hasattr(transformers, adaptive.base_of(spec)["config"])
    for auto, name in adaptive.auto_map(spec).items():
        assert hasattr(transformers, auto)
        assert hasattr(transformers, name.split(".Adaptive")[1])


def test_a_bare_file_of_gpt2_has_its_sites_under_the_prefix_in_memory() -> None:
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 1}
    site = ffn_site(describe(config, {"wte.weight"}), 0)
    assert (site.path, site.stored) == ("transformer.h.0.mlp", "h.0.mlp")


@pytest.mark.parametrize(
    ("router", "wanted"),
    [
        ({"kind": "param-center"}, {"weight": (4, 8)}),
        ({"kind": "analytic"}, {"gate": (4, 8), "up": (4, 8), "bias": (4,)}),
        ({"kind": "contribution", "width": 3}, {"w1": (3, 8), "w2": (4, 3)}),
        ({"kind": "gate"}, {}),
    ],
)
def test_router_tensors(router: dict[str, object], wanted: dict[str, tuple[int, ...]]) -> None:
    assert adaptive.router_tensors(router, hidden=8, experts=4, gated=True) == wanted
