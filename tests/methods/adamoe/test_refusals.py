"""Options that do not fit, and checkpoints that get no null experts: each a clear error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adaconvert
from adaconvert.errors import OptionError, SourceError
from adaconvert.testing.tiny_models import make


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, two per token."""
    return make("mixtral", tmp_path_factory.mktemp("models") / "moe", max_shard_size="1GB")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("models") / "dense", max_shard_size="1GB")


@pytest.fixture(scope="module")
def nulled(mixture: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "nulled"
    adaconvert.convert(mixture, destination=folder, method="adamoe", verify=False)
    return folder


OF_MIXTURES = [
    ({"null_experts": 0}, "--null-experts: is 0: without null experts every token runs"),
    (
        {"null_experts": 5},
        "--null-experts: an exact start copies each of the 4 rows of the router equally often; "
        "expected a multiple of 4, found 5. --null-init bias takes any number.",
    ),
    ({"top_k": 9}, "--top-k: more slots than experts: 4 real and 4 null; expected 1 to 8, found 9"),
    ({"top_k": 0}, "--top-k: out of range"),
    (
        {"null_init": "bias", "null_experts": 3, "top_k": 8},
        "--top-k: more slots than experts: 4 real and 3 null; expected 1 to 7, found 8",
    ),
    (
        {"target_compute": 2.5},
        "--target-compute: cannot be reached with these slots and null experts; expected 0.5 to 2, "
        "found 2.5",
    ),
    (
        {"target_compute": 2.5, "min_real": 0},
        "--target-compute: cannot be reached with these slots and null experts; expected 0 to 2, "
        "found 2.5",
    ),
    (
        {"target_compute": 0.4, "min_real": 1},
        "--target-compute: cannot be reached with these slots and null experts; expected 0.5 to 2",
    ),
    (
        {"target_compute": 1.2, "null_init": "bias"},
        "--target-compute: cannot be reached with these slots and null experts; expected 0.5 to 1",
    ),
    (
        {"null_init": "bias", "null_experts": 1, "layer_budget": "0-=0.4"},
        "--layer-budget: cannot be reached with these slots and null experts; expected 0.5 to 1",
    ),
    ({"layer_budget": "5=0.5"}, "--layer-budget: names no layer with null experts"),
    ({"layer_budget": "0=x"}, "--layer-budget: is no budget of layers"),
    ({"min_real": 2}, "--min-real: out of range; expected 0 to 1, found 2"),
    ({"null_kind": "copy"}, "--null-kind: unknown choice"),
    ({"null_init": "random"}, "--null-init: unknown choice"),
    ({"data": "text.txt"}, "--data: only means something with --target-compute or --layer-budget"),
    ({"via": "upcycle"}, "--via: is for a dense source, and this is a mixture (mixtral)"),
    ({"experts": 8}, "--experts: is for a dense source, and this is a mixture"),
    ({"layers": "7"}, "--layers: the model has blocks 0 to 1"),
    ({"materialize": True, "layers": "1"}, "--layers: does not go with --materialize"),
    ({"materialize": True, "null_kind": "identity"}, "--null-kind: does not go with --materialize"),
    ({"materialize": True, "null_init": "bias"}, "--null-init: does not go with --materialize"),
    ({"materialize": True, "min_real": 1}, "--min-real: does not go with --materialize"),
    ({"materialize": True, "target_compute": 0.5}, "--target-compute: does not go with"),
    ({"materialize": True, "null_weights": "real"}, "--null-weights: does not go with"),
    (
        {"materialize": True, "top_k": 3},
        "--top-k: does not go with --materialize: with other slots",
    ),
    ({"target_compute": 0.4, "min_real": 1}, "found 0.4. --min-real 0 allows 0 to 2"),
    ({"nul_experts": 4}, "adamoe: nul_experts: unknown option. Did you mean null_experts?"),
]
OF_DENSE_MODELS = [
    ({"num_experts": 4}, "--num-experts: only means something with --via moefy"),
    ({"via": "moefy", "experts": 4}, "--experts: only means something with --via upcycle"),
    (
        {"via": "moefy", "null_init": "exact"},
        "--null-init: every token runs all 2 experts, so copies of their rows can displace none",
    ),
    (
        {"via": "moefy", "target_compute": 0.5, "data": "text.txt"},
        "--data: the routers of a split model are zero until they are trained",
    ),
    (
        {"router_init": "zeros", "target_compute": 0.5, "data": "text.txt"},
        "--router-init: does not go with --data: no bias can tell tokens apart by routers of zeros",
    ),
    (
        {"via": "moefy", "materialize": True},
        "--materialize: does not go with --via moefy: all experts of a split model run",
    ),
    (
        {"router_init": "zeros", "materialize": True},
        "--router-init: does not go with --materialize: all logits tie",
    ),
    (
        {"experts": 4, "base_top_k": 4, "materialize": True},
        "--materialize: every token runs all 4 experts of the source",
    ),
    ({"base_top_k": 9}, "--base-top-k: more experts per token than there are experts"),
    ({"target": "glm4_moe"}, "--target: "),
]


@pytest.mark.parametrize(("options", "message"), OF_MIXTURES)
def test_options_that_do_not_fit_a_mixture(
    options: dict[str, object], message: str, mixture: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        adaconvert.convert(mixture, destination=tmp_path / "out", method="adamoe", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "message"), OF_DENSE_MODELS)
def test_options_that_do_not_fit_a_dense_model(
    options: dict[str, object], message: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        adaconvert.convert(dense, destination=tmp_path / "out", method="adamoe", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "glm4_moe",
            "its routing is not covered: sigmoid scores with a correction bias (glm4_moe)",
        ),
        ("dots1", "its routing is not covered: sigmoid scores with a correction bias (dots1)"),
        ("ernie4_5_moe", "softmax scores with a correction bias (ernie4_5_moe)"),
        (
            "deepseek_v2-groups",
            "group-limited top-k (deepseek_v2 with topk_method group_limited_greedy)",
        ),
    ],
)
def test_routings_the_formula_does_not_cover_are_refused_by_name(
    name: str, message: str, tmp_path: Path
) -> None:
    source = make(name, tmp_path / "moe", max_shard_size="1GB")
    with pytest.raises(SourceError, match=re.escape(message)):
        adaconvert.convert(source, destination=tmp_path / "out", method="adamoe")


def test_null_experts_are_given_once(nulled: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"nulled/config\.json: has null experts already\."):
        adaconvert.convert(nulled, destination=tmp_path / "out", method="adamoe")
    with pytest.raises(OptionError, match="--null-experts: changes nothing: the source has null"):
        adaconvert.convert(
            nulled, destination=tmp_path / "out", method="adamoe", materialize=True, null_experts=8
        )


@pytest.mark.parametrize("method", ["moefy", "upcycle", "unmoefy", "d2dmoe"])
def test_other_methods_name_what_they_find(method: str, nulled: Path, tmp_path: Path) -> None:
    options = {"stages": "2"} if method == "d2dmoe" else {}
    with pytest.raises(SourceError, match="is a mixture with null experts"):
        adaconvert.convert(nulled, destination=tmp_path / "out", method=method, **options)


def test_a_split_model_gets_none(dense: Path, tmp_path: Path) -> None:
    split = tmp_path / "split"
    adaconvert.convert(dense, destination=split, method="moefy", split="contiguous", verify=False)
    with pytest.raises(SourceError, match=r"is adaptive: .* are split.*Start from the dense model"):
        adaconvert.convert(split, destination=tmp_path / "out", method="adamoe")


def test_several_mixtures_do_not_become_one(mixture: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="takes one mixture; several sources are for dense"):
        adaconvert.convert(mixture, mixture, destination=tmp_path / "out", method="adamoe")


def test_several_checkpoints_with_null_experts_do_not_become_one(nulled: Path) -> None:
    with pytest.raises(OptionError, match="takes one checkpoint with null experts"):
        adaconvert.plan(nulled, nulled, method="adamoe", materialize=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "weights of the real experts alone"),
        ({"null_weights": "selected", "null_kind": "identity"}, "null experts of kind identity"),
        ({"null_weights": "selected", "min_real": 1}, "a real expert in every token"),
        ({"null_weights": "selected", "layers": "1"}, "only some of its sparse blocks"),
        (
            {"null_weights": "selected", "null_init": "bias"},
            "null_experts.bias is -10000, and a stock router has no bias",
        ),
    ],
)
def test_what_a_stock_mixture_cannot_hold_is_named(
    options: dict[str, object], message: str, mixture: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "nulled"
    adaconvert.convert(mixture, destination=folder, method="adamoe", verify=False, **options)
    with pytest.raises(OptionError, match=f"--materialize: cannot be written as a .*{message}"):
        adaconvert.convert(folder, destination=tmp_path / "out", method="adamoe", materialize=True)
    assert not (tmp_path / "out").exists()
