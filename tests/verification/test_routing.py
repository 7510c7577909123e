"""Routing statistics against numbers counted by hand, on every router the hosts have."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from adaconvert.layerwise.runner import LayerwiseModel
from adaconvert.testing.by_hand import upcycle_by_hand
from adaconvert.testing.tiny_models import make
from adaconvert.verification.routing import LayerRouting, RouterWatch, _split_groups, even_entropy

if TYPE_CHECKING:
    from adaconvert.testing.by_hand import Tensors

IDS = torch.arange(64).reshape(2, 32).mul(5).remainder(320)
ROUTERS = {
    "mixtral": "mlp.gate",
    "qwen2_moe": "mlp.gate",
    "qwen3_moe": "mlp.gate",
    "olmoe": "mlp.gate",
    "deepseek_v2": "mlp.gate",
    "granitemoe": "block_sparse_moe.router",
    "granitemoeshared": "block_sparse_moe.router",
    "flex_olmo": "mlp.gate",
    "glm4_moe": "mlp.gate",
    "dots1": "mlp.gate",
    "ernie4_5_moe": "mlp.gate",
}


def watched(folder: Path, layer: int = 1, **options: Any) -> LayerRouting | None:
    model = LayerwiseModel(folder)
    hidden = model.embed(IDS)
    for block in model.blocks():
        with RouterWatch(block.module, **options) as watch:
            hidden = block(hidden)
        if block.index == layer:
            return watch.summary(layer)
    return None


@pytest.mark.parametrize("family", ROUTERS)
def test_every_router_is_found_and_counted(family: str, tmp_path: Path) -> None:
    model = LayerwiseModel(make(family, tmp_path / "m"))
    block = model.block(1)
    seen: list[tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = []
    router = block.module.get_submodule(ROUTERS[family])
    router.register_forward_hook(lambda m, args, out: seen.append((args[0] @ m.weight.T, out)))
    with RouterWatch(block.module) as watch:
        block(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(1)))
    found = watch.summary(1)
    assert found is not None
    logits, output = seen[0]
    chosen = next(part for part in output if not part.is_floating_point())
    counts = [int((chosen == expert).sum()) for expert in range(4)]
    assert found.experts == 4
    assert found.load == pytest.approx(max(counts) / (sum(counts) / 4))
    assert found.dead == counts.count(0)
    scores = logits.reshape(-1, 4).double()
    sigmoid = family in {"glm4_moe", "dots1"}
    p = scores.sigmoid() if sigmoid else scores.exp()
    p = p / p.sum(-1, keepdim=True)
    assert found.top1 == pytest.approx(float(p.max(-1).values.mean()))
    assert found.entropy == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
    assert found.split_groups is None


def test_hooks_are_gone_afterwards(tmp_path: Path) -> None:
    block = LayerwiseModel(make("mixtral", tmp_path / "m")).block(0)
    with RouterWatch(block.module):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.module.modules())


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_a_dense_block_has_no_routing(family: str, tmp_path: Path) -> None:
    assert watched(make(family, tmp_path / "m")) is None


def test_a_dense_block_of_a_mixed_model_has_no_routing(tmp_path: Path) -> None:
    folder = make("qwen3_moe", tmp_path / "m", mlp_only_layers=[1])
    assert watched(folder, 1) is None
    assert watched(folder, 0) is not None


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("dense") / "m")


def routers(edit: Any) -> Any:
    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith("block_sparse_moe.gate.weight"):
                edit(tensor)

    return change


def test_a_zero_router_prefers_nothing(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", edit=routers(lambda w: w.zero_()))
    found = watched(target)
    assert found is not None
    assert found.entropy == pytest.approx(even_entropy(4)) == pytest.approx(math.log(4))
    assert found.top1 == pytest.approx(0.25)
    # ties go to the first experts, always the same ones
    assert (found.dead, found.load) == (2, 2.0)


def pairs(router: torch.Tensor) -> None:
    """Give experts 2j and 2j + 1 the same router row: two groups of two siblings."""
    router[1::2] = router[0::2]


def test_whole_groups_are_not_split(dense: Path, tmp_path: Path) -> None:
    target = upcycle_by_hand(dense, tmp_path / "t", edit=routers(pairs))
    found = watched(target, granularity=2, stored_dtype="bfloat16")
    assert found is not None
    assert (found.split_groups, found.split_groups_stored) == (0.0, 0.0)


def test_unpaired_routers_split_groups(dense: Path, tmp_path: Path) -> None:
    found = watched(upcycle_by_hand(dense, tmp_path / "t"), granularity=2)
    assert found is not None
    assert found.split_groups is not None
    assert found.split_groups > 0.2
    assert found.split_groups_stored == found.split_groups


def test_a_tie_that_only_the_stored_dtype_has_is_measured(dense: Path, tmp_path: Path) -> None:
    # rows of groups 1 and 3 agree in bfloat16 but not in float32, where one of both always wins
    def nearly_equal(router: torch.Tensor) -> None:
        pairs(router)
        router[6:] = router[2:4] * (1 + 2**-12)

    target = upcycle_by_hand(dense, tmp_path / "t", experts=8, edit=routers(nearly_equal))
    found = watched(target, granularity=2, stored_dtype="bfloat16")
    assert found is not None
    assert found.split_groups == 0.0
    assert found.split_groups_stored is not None
    assert found.split_groups_stored > 0.05
    assert watched(target, granularity=2, stored_dtype="float32") == replace(
        found, split_groups_stored=0.0
    )


def test_split_groups_counts_tokens() -> None:
    chosen = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4], [6, 7, 5, 4], [0, 2, 4, 6]])
    assert _split_groups(chosen, 2) == 0.5
    assert _split_groups(chosen, 4) == 0.5
    assert _split_groups(torch.tensor([[3, 2, 1, 0]]), 4) == 0.0
