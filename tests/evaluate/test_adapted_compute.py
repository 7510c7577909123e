"""What a model with routed adapters is counted to cost is what its shapes say, FFNs included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adaconvert
from adaconvert.arch.registry import describe
from adaconvert.evaluate.compute import Compute, Tally, estimated
from adaconvert.inspection import inspect_source
from adaconvert.io.source import Source
from adaconvert.modeling.loading import load_model
from adaconvert.planning.estimate import Costs, costs, unchosen_flops
from adaconvert.testing import tiny_models

Adapted = Callable[..., tuple[Path, Path]]
LENGTH = 21
HIDDEN, LAYERS, EXPERTS, RANK = 32, 2, 4, 2


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    """Return what gives a tiny model, and the same with routed adapters, standalone."""
    root = tmp_path_factory.mktemp("compute")

    def get(family: str, targets: str | None = None, **options: Any) -> tuple[Path, Path]:
        named = "For" in family
        stock = family.partition("For")[0].lower() if named else family
        dense = root / family
        if not dense.exists():
            tiny_models.make(stock, dense, architecture=family if named else None)
        made = root / str(len(list(root.iterdir())))
        return dense, attached(dense, made, target_modules=targets, **options)

    return get


def attached(dense: Path, made: Path, **options: Any) -> Path:
    sizes = {"experts": EXPERTS} | ({} if "experts_kind" in options else {"rank": RANK})
    given = {**sizes, "standalone": True, "verify": False, **options}
    adaconvert.convert(dense, destination=made, method="molora", **given)
    return made


def ids_of() -> torch.Tensor:
    return torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def counted(folder: Path, *, passes: int = 1, knob: str | None = None, **value: Any) -> Compute:
    model: Any = load_model(folder, dtype="float32")
    tally = Tally()
    for _ in range(passes):
        with torch.no_grad(), tally.counting(model), model.set_adapters(knob, **value):
            model(ids_of())
    found = tally.compute()
    assert found is not None
    return found


def shapes(folder: Path) -> Compute:
    found = estimated(Source.open(str(folder)), {LENGTH: 2}, "torch.float32")
    assert found is not None
    return found


def planned(folder: Path) -> Costs:
    source = Source.open(str(folder))
    stored = {name: ref.dtype for name, ref in source.tensors.items()}
    return costs(describe(source.config, source.tensors), stored)


FAMILIES = [
    *("llama", "phi3", "gpt2", "BertForSequenceClassification"),
    *("mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe", "deepseek_v2"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_figure_is_that_of_the_shapes(adapted: Adapted, family: str) -> None:
    dense, folder = adapted(family)
    found, wanted = counted(folder, passes=2), shapes(folder)
    assert (found.flops, found.ffn_flops) == (wanted.flops, wanted.ffn_flops)
    assert found.weight_bytes == wanted.weight_bytes
    assert found.ffn_bytes == 2 * found.ffn_flops
    assert found.ffn_flops == planned(folder).ffn_flops == inspected(folder)
    assert found.ffn_flops >= shapes(dense).ffn_flops > 0


def inspected(folder: Path) -> int:
    found = inspect_source(str(folder)).costs
    assert found is not None
    return found.ffn_flops


def test_adapters_on_attention_leave_the_figure_of_dense_networks(adapted: Adapted) -> None:
    dense, folder = adapted("llama", "q_proj,v_proj")
    found = counted(folder)
    assert found.ffn_flops == shapes(dense).ffn_flops == planned(dense).ffn_flops
    assert found.flops > shapes(dense).flops
    # 64 neurons of three matrices
    assert found.ffn_flops == 2 * LAYERS * 3 * HIDDEN * 64


@pytest.mark.parametrize(("knob", "chosen"), [("soft", 4), ("top-k", 2), ("uniform", 4)])
def test_adapters_on_a_matrix_of_the_network_count_as_many_as_run(
    adapted: Adapted, knob: str, chosen: int
) -> None:
    dense, folder = adapted("llama", "down_proj")
    found = counted(folder, knob=knob, **({"k": 2} if knob == "top-k" else {}))
    each = 2 * RANK * (64 + HIDDEN)
    assert found.ffn_flops == shapes(dense).ffn_flops + LAYERS * chosen * each
    routers = 0 if knob == "uniform" else 2 * LAYERS * EXPERTS * 64
    assert found.router_flops == routers
    assert found.flops == shapes(dense).flops + LAYERS * chosen * each + routers


def test_top_k_as_configured_is_planned_and_counted_alike(adapted: Adapted) -> None:
    _, folder = adapted("llama", routing="topk", k=1)
    assert counted(folder).ffn_flops == planned(folder).ffn_flops
    assert planned(folder).ffn_flops < planned(adapted("llama")[1]).ffn_flops


def test_one_a_for_all_is_part_of_the_network_and_no_gate(adapted: Adapted) -> None:
    dense, folder = adapted("llama", "up_proj", share="a")
    found = counted(folder)
    adapters = 2 * LAYERS * (RANK * HIDDEN + EXPERTS * RANK * 64)
    assert found.ffn_flops == planned(folder).ffn_flops
    assert found.ffn_flops == planned(dense).ffn_flops + adapters
    assert found.router_flops == 2 * LAYERS * EXPERTS * HIDDEN


def test_vectors_that_scale_hidden_units_count(adapted: Adapted) -> None:
    dense, folder = adapted("llama", "down_proj", experts_kind="ia3")
    vectors = 2 * LAYERS * EXPERTS * 64
    assert counted(folder).ffn_flops == planned(folder).ffn_flops
    assert planned(folder).ffn_flops == planned(dense).ffn_flops + vectors


@pytest.mark.parametrize("method", ["moefy", "adamoe"])
def test_sites_that_choose_are_not_counted_twice(
    adapted: Adapted, tmp_path: Path, method: str
) -> None:
    dense = tiny_models.make("llama" if method == "moefy" else "qwen2_moe", tmp_path / "dense")
    options = {"num_experts": 8, "split": "contiguous", "router": "similarity"}
    adaconvert.convert(
        dense,
        destination=tmp_path / "split",
        method=method,
        verify=False,
        **(options if method == "moefy" else {}),
    )
    plain: Any = load_model(tmp_path / "split", dtype="float32")
    before = Tally()
    with torch.no_grad(), before.counting(plain):
        plain(ids_of())
    bare = before.compute()
    found = counted(attached(tmp_path / "split", tmp_path / "out", target_modules="q_proj"))
    assert bare is not None
    _, unchosen = unchosen_flops(describe(plain.config.to_dict()))
    # shared experts choose nothing; networks and mixtures do
    assert (unchosen > 0) == (method == "adamoe")
    assert found.ffn_flops == bare.ffn_flops + unchosen
    adapters = 2 * LAYERS * EXPERTS * RANK * (HIDDEN + HIDDEN)
    assert found.flops == bare.flops + adapters + 2 * LAYERS * EXPERTS * HIDDEN


def test_without_adapters_the_figure_is_that_of_chosen_neurons(tmp_path: Path) -> None:
    dense = tiny_models.make("llama", tmp_path / "dense")
    folder = tmp_path / "split"
    options = {"num_experts": 8, "split": "contiguous", "layers": "0", "verify": False}
    adaconvert.convert(dense, destination=folder, method="moefy", **options)
    model: Any = load_model(folder, dtype="float32")
    tally = Tally()
    with torch.no_grad(), tally.counting(model):
        model(ids_of())
    found = tally.compute()
    assert found is not None
    assert found.ffn_flops == planned(dense).ffn_flops / LAYERS
