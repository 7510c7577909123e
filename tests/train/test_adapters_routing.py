"""Routed adapters while they are trained: what moves, what is balanced, counted and stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.errors import OptionError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.stored import tensors_of
from adaconvert.train.parts import choose, part_of
from adaconvert.train.result import FinetuneResult
from adaconvert.train.routing import Routers
from adaconvert.train.routing_config import Routing
from adaconvert.train.routing_sites import find_routers

Tune = Callable[..., FinetuneResult]
TOP_2 = {"rule": "top-k", "k": 2, "renormalize": True}
SITE = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def adapt(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    root = tmp_path_factory.mktemp("adapted")
    dense = tiny_models.make("llama", root / "dense")

    def get(**options: Any) -> Path:
        options = {"random": False, "linears": ("q_proj", "up_proj", "down_proj"), **options}
        return make_adapted(dense, root / str(len(list(root.iterdir()))), **options)

    return get


def test_parts_of_a_model_with_adapters(adapt: Callable[..., Path]) -> None:
    model: Any = load_model(adapt(reads="layer"), dtype="float32")
    assert part_of(f"{SITE}.adapters.a") == "adapters"
    assert part_of(f"{SITE}.router.weight") == "router"
    assert part_of(f"{SITE}.weight") == "rest"
    chosen = choose(model, ["adapters", "router"])
    assert set(chosen.by_part) == {"adapters", "router"}
    assert chosen.by_part["router"] == 2 * 4 * 32
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".adapters." in n or ".router." in n
    }


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"checkpointing": True},
        {"precision": "bf16", "checkpointing": True},
        {"balance": 0.01, "accumulate": 2},
    ],
)
@pytest.mark.parametrize("select", [{"rule": "soft"}, TOP_2])
def test_training_moves_adapters_and_routers_alone(
    adapt: Callable[..., Path],
    tune: Tune,
    reads: str,
    select: dict[str, Any],
    options: dict[str, Any],
) -> None:
    source = adapt(reads=reads, select=select)
    result = tune(source, train=["adapters", "router"], steps=6, **options)
    before, after = tensors_of(source), tensors_of(result.destination)
    assert set(before) == set(after)
    for name, value in before.items():
        own = ".adapters." in name or ".router." in name
        assert torch.equal(value, after[name]) is not own, name
        assert value.dtype == after[name].dtype
    routers = {"module": 6, "layer": 2, "shared": 1}[reads]
    rows = result.summary["routing"]["layers"]
    assert len(rows) == routers
    assert all(row["experts"] == 4 and "site" in row for row in rows)
    assert set(result.summary["by_part"]) == {"adapters", "router"}
    model: Any = load_model(result.destination, dtype="float32")
    assert len(model.adaptive_adapters()) == 6


def test_the_loss_falls(adapt: Callable[..., Path], tune: Tune) -> None:
    result = tune(adapt(), train=["adapters", "router"], steps=30, lr=1e-2)
    losses = [result.summary[name]["loss"] for name in ("first", "last")]
    assert losses[-1] < 0.9 * losses[0]


def gradients(model: Any, ids: Tensor, routers: Routers | None, *, checkpoint: bool) -> Any:
    model.train().zero_grad()
    if routers is not None:
        mask = torch.ones(ids.shape)
        routers.begin(ending=True, weights=torch.full((len(ids),), 0.5), mask=mask, scale=1.0)
    model.gradient_checkpointing_disable()
    if checkpoint:
        model.gradient_checkpointing_enable()
    out = model(ids, use_cache=False).logits
    if routers is not None:
        routers.pause()
    (out.sum() * 0).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("select", [{"rule": "soft"}, TOP_2, {"rule": "top-p", "p": 0.6}])
def test_the_balance_loss_is_what_the_collected_logits_say(
    adapt: Callable[..., Path], reads: str, select: dict[str, Any], checkpoint: bool
) -> None:
    source = adapt(reads=reads, select=select, random=True)
    model: Any = load_model(source, dtype="float32")
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    with model.collect("adapter_logits") as kept:
        model(ids)
    total, passes = torch.zeros(()), 0
    for found in kept.values():
        for logits in found:
            shares = logits.reshape(2, 11, 4).softmax(dim=-1)
            uses = shares.detach()
            if select["rule"] == "top-k":
                uses = torch.zeros_like(shares).scatter(-1, shares.topk(2, dim=-1).indices, 1)
            elif select["rule"] == "top-p":
                order = shares.argsort(dim=-1, descending=True)
                ranked = shares.gather(-1, order)
                before = ranked.cumsum(dim=-1) - ranked
                uses = torch.zeros_like(shares).scatter(-1, order, (before < 0.6).float())
            share = uses.sum(dim=1)
            share = share / share.sum(dim=-1, keepdim=True)
            total = total + 4 * (share * shares.mean(dim=1)).sum(dim=-1).mean()
            passes += 1
    model.zero_grad()
    (0.25 * total / passes).backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    routers = Routers(find_routers(model), Routing(balance=0.25), even_adapters=True)
    found = gradients(model, ids, routers, checkpoint=checkpoint)
    eps = torch.finfo(torch.float32).eps
    for name, value in wanted.items():
        assert (found[name] - value).norm() <= 2**10 * eps * value.norm().clamp_min(1e-3), name
    values, _ = routers.drain(1)
    assert abs(values["balance"] - float(total.detach()) / passes) <= 2**6 * eps * values["balance"]
    rows = routers.at_the_end()
    assert {row.tokens for row in rows} == {22 * (2 if reads == "shared" else 1)}


def test_balance_is_asked_for_and_judged_then_alone(adapt: Callable[..., Path], tune: Tune) -> None:
    source = adapt(select={"rule": "top-k", "k": 1})
    result = tune(source, train=["adapters", "router"], steps=3)
    assert result.summary["routing"]["balance"] == 0.0
    with pytest.raises(OptionError, match="weigh the same whatever"):
        tune(adapt(select={"rule": "uniform"}), "other", train=["router"], steps=3)


def test_adapters_alone_of_uniform_gates_are_trained(
    adapt: Callable[..., Path], tune: Tune
) -> None:
    source = adapt(select={"rule": "uniform"})
    result = tune(source, train=["adapters"], steps=4)
    before, after = tensors_of(source), tensors_of(result.destination)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if ".adapters." in name}


def test_one_adapter_with_a_sigmoid_gate_is_trained(adapt: Callable[..., Path], tune: Tune) -> None:
    source = adapt(experts=1, select={"rule": "sigmoid"}, random=True)
    result = tune(source, train=["router"], steps=4)
    before, after = tensors_of(source), tensors_of(result.destination)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if ".router." in name}


def test_lora_on_a_linear_with_routed_adapters_is_refused(
    adapt: Callable[..., Path], tune: Tune
) -> None:
    with pytest.raises(OptionError, match="has routed adapters"):
        tune(adapt(), lora=2, lora_targets=["attention"])


def test_a_bias_of_routers_is_refused(adapt: Callable[..., Path], tune: Tune) -> None:
    with pytest.raises(OptionError, match="cannot store a bias"):
        tune(adapt(), train=["router", "adapters"], balance_kind="bias")


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_a_base_in_4_bits(adapt: Callable[..., Path], tune: Tune, reads: str) -> None:
    pytest.importorskip("bitsandbytes")
    source = adapt(reads=reads)
    result = tune(source, train=["adapters", "router"], steps=5, load_in_4bit=True)
    before, after = tensors_of(source), tensors_of(result.destination)
    for name, value in before.items():
        own = ".adapters." in name or ".router." in name
        assert torch.equal(value, after[name]) is not own, name


def test_what_is_stored_says_how_routers_fared(adapt: Callable[..., Path], tune: Tune) -> None:
    result = tune(adapt(reads="layer", select=TOP_2), train=["adapters", "router"], balance=0.1)
    told = json.dumps(result.summary)
    assert "load" in told
    assert result.summary["routing"]["balance"] == 0.1


def test_adapters_leave_the_balance_of_a_mixture_as_it_is(tmp_path: Path, tune: Tune) -> None:
    stock = tiny_models.make("mixtral", tmp_path / "stock")
    source = make_adapted(stock, tmp_path / "both", random=False, linears=("q_proj", "o_proj"))
    options = {"train": ["router"], "steps": 2, "log_every": 1}
    plain = tune(stock, "plain", **options).summary
    both = tune(source, "out", **options).summary
    assert both["routing"]["balance"] == plain["routing"]["balance"] > 0
    assert both["first"]["balance"] == plain["first"]["balance"]
    assert len(both["routing"]["layers"]) == len(plain["routing"]["layers"]) + 4


def test_experts_and_base_of_a_mixture_in_4_bits(tmp_path: Path, tune: Tune) -> None:
    pytest.importorskip("bitsandbytes")
    stock = tiny_models.make("mixtral", tmp_path / "stock")
    options = {"random": False, "linears": ("q_proj", "o_proj"), "reads": "layer"}
    source = make_adapted(stock, tmp_path / "both", **options)
    result = tune(source, train=["adapters"], steps=2, load_in_4bit=True)
    before, after = tensors_of(source), tensors_of(result.destination)
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {name for name in before if name.endswith(".adapters.b")} | {
        name for name in before if name.endswith(".adapters.a")
    }


def test_what_cannot_be_trained_in_4_bits(adapt: Callable[..., Path], tune: Tune) -> None:
    pytest.importorskip("bitsandbytes")
    with pytest.raises(OptionError, match="train the routed adapters"):
        tune(adapt(), load_in_4bit=True)


def test_a_router_of_several_blocks_is_not_sharded(adapt: Callable[..., Path]) -> None:
    from adaconvert.methods.sources import open_source
    from adaconvert.train import routing_setup
    from adaconvert.train.config import FinetuneConfig

    source = adapt(reads="shared")
    model: Any = load_model(source, dtype="float32")
    train = ["adapters", "router"]
    config = FinetuneConfig.of(["x"], {"steps": 1, "fsdp": True, "train": train})
    with pytest.raises(OptionError, match=r"--fsdp: cannot be combined with a router"):
        routing_setup.prepare(model, open_source(source), config, choose(model, train))
