"""Null experts while they are trained: the balance loss, gradients, padding, recomputation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.layerwise.quiet import quiet
from adaconvert.modeling import stock_experts
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.kept import kept_bytes
from adaconvert.testing.null_by_hand import make_nulled
from adaconvert.train.budgets import Budgets, realised
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.losses import language_model, null_balance
from adaconvert.train.memory import need_of
from adaconvert.train.parts import part_of
from adaconvert.train.routing import Routers
from adaconvert.train.routing_config import Routing
from adaconvert.train.routing_sites import NullRouter, find_routers

FAMILIES = ["mixtral", "qwen2_moe", "granitemoe", "olmoe", "deepseek_v2"]
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module", params=FAMILIES)
def nulled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_nulled(tiny_models.make(request.param, folder / "src"), folder / "nulled")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    return make_nulled(tiny_models.make("mixtral", folder / "src"), folder / "nulled")


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def parted(folder: Path, bias: float = 0.3) -> Any:
    """Return a model whose null experts are no longer copies, which would tie."""
    model: Any = load_model(folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for router in routers_of(model):
            weight = router.site.null_experts.weight
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
            router.null_bias.fill_(bias)
    return model


def routers_of(model: Any) -> list[NullRouter]:
    found = list(find_routers(model))
    assert found
    assert all(isinstance(router, NullRouter) for router in found)
    return found  # type: ignore[return-value]


def begin(watch: Routers, mask: Tensor, weights: Tensor | None = None, **now: Any) -> None:
    even = torch.full((mask.shape[0],), 1 / mask.shape[0]) if weights is None else weights
    watch.begin(weights=even, mask=mask.float(), scale=1.0, ending=True, **now)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: Tensor, expected: Tensor, roundings: float) -> None:
    assert float((found - expected).norm()) <= roundings * EPS * float(expected.norm())


def written_out(router: NullRouter, x: Tensor, mask: Tensor, target: float) -> Tensor:
    """Return the balance loss of every sequence from the block's input, [B, S, d] -> [B]."""
    null, spec = router.site.null_experts, router.site.adaptive_spec
    weight = router.site.adaptive_router.weight
    logits = torch.cat([x @ weight.T, x @ null.weight.T + null.bias], dim=-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(router.slots, dim=-1).indices, 1.0)
    counts = (chosen * mask[..., None]).sum(dim=1)
    share = torch.tensor(target * spec["mixture"]["top_k"] / router.slots)
    probabilities = logits.softmax(dim=-1)
    return null_balance(probabilities, counts, mask, experts=router.experts, share=share)


def test_gradients_are_those_of_the_loss_written_out(nulled: Path) -> None:
    model = parted(nulled)
    ids, mask = ids_of(3, 12), torch.ones(3, 12)
    mask[2, 7:] = 0
    routers = routers_of(model)
    inputs: list[Tensor] = []
    hooks = [
        r.site.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for r in routers
    ]
    plain = language_model(model(input_ids=ids, attention_mask=mask).logits, ids)
    parts = [written_out(r, x, mask, 0.7).mean() for r, x in zip(routers, inputs, strict=True)]
    penalty = torch.stack(parts).mean()
    (plain + 0.3 * penalty).backward()
    expected = gradients(model)
    for hook in hooks:
        hook.remove()
    watch = Routers(routers, Routing(balance=0.3, ramp=0.0), goals={r.path: 0.7 for r in routers})
    begin(watch, mask)
    language_model(model(input_ids=ids, attention_mask=mask).logits, ids).backward()
    found = gradients(model)
    assert set(found) == set(expected)
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    for name in expected:
        # the same numbers, added in another order
        assert float((found[name] - expected[name]).norm()) <= 64 * EPS * float(whole), name
    values, layers = watch.drain(1)
    assert values["balance"] == pytest.approx(float(penalty.detach()), rel=1e-5)
    assert {layer.tokens for layer in layers} == {31}


def test_the_language_loss_reaches_null_rows_and_the_null_bias(nulled: Path) -> None:
    model = parted(nulled).train()
    language_model(model(input_ids=ids_of(2, 16)).logits, ids_of(2, 16)).backward()
    for router in routers_of(model):
        null = router.site.null_experts
        assert float(null.weight.grad.norm()) > 0
        assert float(null.bias.grad.norm()) > 0


def test_tokens_with_one_real_expert_give_the_router_a_gradient(tmp_path: Path) -> None:
    stock = tiny_models.make("mixtral", tmp_path / "src")
    model = parted(make_nulled(stock, tmp_path / "nulled", min_real=1), bias=20.0).train()
    with model.collect("experts_run") as runs:
        language_model(model(input_ids=ids_of(2, 16)).logits, ids_of(2, 16)).backward()
    for router in routers_of(model):
        assert {int(n) for n in runs[router.path][0]} == {1}
        assert float(router.site.adaptive_router.weight.grad.norm()) > 0
        assert float(router.site.null_experts.weight.grad.norm()) > 0


@pytest.mark.parametrize("recomputed", [False, True])
def test_recomputation_neither_counts_nor_adds_twice(mixtral: Path, recomputed: bool) -> None:
    model = parted(mixtral).train()
    routers = routers_of(model)
    goals = {router.path: 0.7 for router in routers}
    watch = Routers(routers, Routing(balance=0.3, z_loss=0.1), goals=goals)
    ids, mask, seen = ids_of(2, 8), torch.ones(2, 8), []
    for again in (False, recomputed):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        begin(watch, mask)
        loss = language_model(model(input_ids=ids, use_cache=False).logits, ids)
        watch.pause()
        loss.backward()
        sums = torch.stack([s.sums for s in watch.budgets._seen if s.sums is not None])
        seen.append((gradients(model), watch.drain(1), sums))
        watch.budgets = Budgets(routers, goals, watch.settings)
    (once, first, counted), (twice, second, recounted) = seen
    assert first == second
    assert torch.equal(counted, recounted)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_padding_is_neither_balanced_nor_counted(mixtral: Path) -> None:
    model = parted(mixtral)
    routers = routers_of(model)
    watch = Routers(routers, Routing(balance=0.3, ramp=0.0), goals={r.path: 0.7 for r in routers})
    ids, mask = ids_of(2, 10), torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    seen = []
    for length in (10, 16):
        longer = torch.cat([ids, torch.full((2, length - 10), 7)], dim=1)
        real = torch.cat([mask, mask.new_zeros(2, length - 10)], dim=1)
        begin(watch, real)
        model(input_ids=longer, attention_mask=real)
        seen.append(watch.drain(1))
    (values, layers), (more, others) = seen
    assert values == pytest.approx(more, rel=1e-5)
    assert [layer.counts for layer in layers] == [layer.counts for layer in others]
    assert [layer.share for layer in layers] == [layer.share for layer in others]
    assert {layer.tokens for layer in layers} == {16}


def test_shares_and_idle_tokens_are_those_the_runtime_runs(nulled: Path) -> None:
    model = parted(nulled, bias=1.5)
    routers = routers_of(model)
    watch = Routers(routers, Routing(balance=0.0))
    ids, mask = ids_of(4, 16), torch.ones(4, 16)
    begin(watch, mask)
    with realised(model) as shares:
        model(input_ids=ids)
        spent = shares()
    _, layers = watch.drain(1)
    with model.collect("experts_run") as runs:
        model(input_ids=ids)
    for router, layer in zip(routers, layers, strict=True):
        run = runs[router.path][0].double()
        assert layer.share == pytest.approx(float(run.mean()) / router.top_k, rel=1e-12)
        assert layer.idle == pytest.approx(float((run == 0).double().mean()), rel=1e-12)
        assert layer.idle > 0
    assert spent == pytest.approx([layer.share for layer in layers], rel=1e-12)


def balanced_by_hand(router: NullRouter, x: Tensor) -> Tensor:
    """Return the loss of every sequence, [B, S, d] -> [B]: uses of real experts over their mean,
    weighted by their probability, and the probability of the null ones, which are at their goal."""
    null, real = router.site.null_experts, router.experts
    weight = router.site.adaptive_router.weight
    logits = torch.cat([x @ weight.T, x @ null.weight.T + null.bias], dim=-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(router.slots, dim=-1).indices, 1.0)
    uses = chosen.sum(dim=1)[:, :real]
    mean = logits.softmax(dim=-1).mean(dim=1)
    parts = mean[:, :real] * uses / uses.mean(dim=1, keepdim=True)
    return parts.sum(dim=1) + mean[:, real:].sum(dim=1)


def test_without_a_budget_real_experts_are_balanced_among_each_other(mixtral: Path) -> None:
    model = parted(mixtral)
    routers = routers_of(model)
    inputs: list[Tensor] = []
    for router in routers:
        router.site.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    watch = Routers(routers, Routing(balance=1.0))
    begin(watch, torch.ones(4, 16))
    model(input_ids=ids_of(4, 16))
    values, _ = watch.drain(1)
    pairs = zip(routers, inputs, strict=True)
    expected = torch.stack([balanced_by_hand(*pair).mean() for pair in pairs]).mean()
    assert_close(torch.tensor(values["balance"]), expected.detach(), 64)
    assert watch.budgets.target(watch.budgets.routers[0]) is None
    assert not watch.budgets.moves


def test_null_experts_are_parts_of_the_router(mixtral: Path) -> None:
    model: Any = load_model(mixtral)
    sites = tuple(model.adaptive_sites())
    parts = {name: part_of(name, sites) for name, _ in model.named_parameters()}
    routers = {name.split("mlp.")[1] for name, part in parts.items() if part == "router"}
    assert routers == {"gate.weight", "null_experts.weight", "null_experts.bias"}


def test_other_rules_than_null_are_watched_and_have_no_budget(mixtral: Path) -> None:
    model = parted(mixtral)
    routers = routers_of(model)
    watch = Routers(routers, Routing(balance=0.5), goals={r.path: 0.7 for r in routers})
    for rule in ({"rule": "all"}, {"rule": "top-k", "k": 1}):
        with model.set_select(**rule):
            begin(watch, torch.ones(2, 8))
            model(input_ids=ids_of(2, 8))
        _, layers = watch.drain(1)
        assert {layer.share for layer in layers} == {1.0 if rule["rule"] == "all" else 0.5}
    watch.step_done()
    assert all(float(router.null_bias) == pytest.approx(0.3) for router in routers)


def budgeted(folder: Path, **options: Any) -> tuple[Any, Routers]:
    """Return a model, and what holds its budgets of 0.6."""
    model = parted(folder)
    routers = routers_of(model)
    return model, Routers(routers, Routing(**options), goals={r.path: 0.6 for r in routers})


def run_step(model: Any, watch: Routers, step: int, mask: Tensor) -> None:
    begin(watch, mask, step=step, steps=6)
    with torch.no_grad():
        model(input_ids=ids_of(4, 16) + step)
    watch.step_done()


def test_budgets_begin_at_the_first_step_that_has_tokens(mixtral: Path) -> None:
    for options in ({}, {"ramp": 0.0}):
        model, watch = budgeted(mixtral, **options)
        before = [float(router.null_bias) for router in routers_of(model)]
        run_step(model, watch, 0, torch.zeros(4, 16))
        assert [float(router.null_bias) for router in routers_of(model)] == before
        for step in range(1, 4):
            run_step(model, watch, step, torch.ones(4, 16))
        assert all(slope > 0 for slope in watch.budgets._slopes)
        assert all(0.5 < watch.budgets.target(r) < 1.0 for r in routers_of(model))
        assert [float(router.null_bias) for router in routers_of(model)] != before


def test_a_process_whose_first_tokens_are_all_padding_does_as_the_others(mixtral: Path) -> None:
    model, watch = budgeted(mixtral, ramp=0.0)
    others = {2: torch.tensor([64.0, 120.0, 0.0]), 1: torch.tensor([1.0, 0.75, -0.5, 0.5, 2.0])}
    watch.reduce = lambda value: value + others[value.dim()]
    run_step(model, watch, 0, torch.zeros(4, 16))
    assert watch.budgets._slopes == [2.0, 2.0]
    # what the others found, which is then where the budget is
    assert [float(router.null_bias) for router in routers_of(model)] == [0.75, 0.75]


def test_budgets_go_on_from_a_state_without_tokens(mixtral: Path) -> None:
    masks = [torch.zeros(4, 16), *[torch.ones(4, 16)] * 5]
    (one, whole), (other, parts) = budgeted(mixtral), budgeted(mixtral)
    for step, mask in enumerate(masks):
        run_step(one, whole, step, mask)
        run_step(other, parts, step, mask)
        state = json.loads(json.dumps(parts.budgets.state()))
        parts.budgets = Budgets(
            routers_of(other), {r.path: 0.6 for r in routers_of(other)}, parts.settings
        )
        parts.budgets.restore(state)
    pairs = zip(routers_of(one), routers_of(other), strict=True)
    assert all(torch.equal(a.null_bias, b.null_bias) for a, b in pairs)
    assert whole.budgets.state() == parts.budgets.state()


def test_targets_move_when_the_losses_train_the_biases(mixtral: Path) -> None:
    model, watch = budgeted(mixtral, null_rate=0.0, ramp=1.0)
    (first, *_), seen = routers_of(model), []
    for step in range(6):
        seen.append(watch.budgets.target(first))
        run_step(model, watch, step, torch.ones(4, 16))
    assert seen[0] is None
    assert all(a > b > 0.6 for a, b in pairwise(seen[1:]))
    assert watch.budgets.target(first) == pytest.approx(0.6)
    # nothing moves a bias but a gradient
    assert {float(router.null_bias) for router in routers_of(model)} == {
        float(torch.tensor(0.3, dtype=torch.float32))
    }


@pytest.mark.parametrize("init", ["exact", "bias"])
def test_activations_are_estimated_at_what_the_budget_lets_run(init: str, tmp_path: Path) -> None:
    stock = tiny_models.make("mixtral", tmp_path / "src")
    folder = make_nulled(stock, tmp_path / "nulled", init=init)
    options = {"steps": 1, "seq_len": 64, "batch_size": 2, "target_compute": 0.7}
    with quiet():
        config = FinetuneConfig.of(["x"], options)
        estimate = need_of(load_model(folder, device_map="meta"), config).activations
        model: Any = load_model(folder).float().train()
        stock_experts.use(model)
        with kept_bytes(model) as kept:
            logits = model(input_ids=ids_of(2, 64), use_cache=False).logits
    assert 0.9 * kept.total <= estimate - 4 * logits.numel() * 4 <= 1.6 * kept.total
