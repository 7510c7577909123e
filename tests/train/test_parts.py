"""Which parameters the names of parts stand for."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.train.parts import choose, part_of


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mlp.gate_proj.weight", "rest"),
        ("model.layers.0.mlp.gate.weight", "router"),
        ("model.layers.0.block_sparse_moe.router.layer.weight", "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", "experts"),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", "experts"),
        ("model.layers.0.block_sparse_moe.input_linear.weight", "experts"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "adapters"),
        ("model.norm.weight", "rest"),
    ],
)
def test_part_of_a_name(name: str, part: str) -> None:
    assert part_of(name) == part


def test_matrices_of_an_adaptive_site_are_experts_and_its_router_is_not() -> None:
    site = ("model.layers.0.mlp",)
    assert part_of("model.layers.0.mlp.up_proj.weight", site) == "experts"
    assert part_of("model.layers.0.mlp.router.weight", site) == "router"


def test_parts_add_up_and_everything_else_is_frozen(adaptive: Path) -> None:
    model = load_model(adaptive)
    chosen = choose(model, ("router", r"model\.norm"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "model.norm.weight",
        "model.layers.0.mlp.router.weight",
        "model.layers.1.mlp.router.weight",
    }
    assert chosen.by_part == {"rest": 32, "router": 2 * 8 * 32}
    assert chosen.routers == trained - {"model.norm.weight"}


def test_part_a_model_lacks_is_refused(tmp_path: Path) -> None:
    model = load_model(tiny_models.make("mixtral", tmp_path / "moe"))
    with pytest.raises(OptionError, match=r"--train exits: matches no parameter; expected all, e"):
        choose(model, ("exits",))
    with pytest.raises(OptionError, match=r"--train no-such: matches no parameter"):
        choose(model, ("no-such",))
