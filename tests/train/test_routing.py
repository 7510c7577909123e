"""Router losses inside the model: gradients, padding, recomputation, biases, norms."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.train.losses import balance, language_model, router_z
from adaconvert.train.routing import Routers
from adaconvert.train.routing_config import Routing
from adaconvert.train.routing_sites import expert_norms, find_routers

EPS = torch.finfo(torch.float32).eps

FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "flex_olmo", "glm4_moe", "dots1"]
BOTH = Routing(balance=0.3, z_loss=0.2)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.make("mixtral", tmp_path_factory.mktemp("mixtral") / "src")


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(0))


def begin(watch: Routers, mask: Tensor, weights: Tensor | None = None) -> None:
    even = torch.full((mask.shape[0],), 1 / mask.shape[0]) if weights is None else weights
    watch.begin(weights=even, mask=mask.float(), scale=1.0, ending=True)


def gradients(model: Any) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def captured(model: Any, experts: int) -> Iterator[list[Tensor]]:
    """Yield the logits the routers of a model compute, as a list that fills."""
    logits: list[Tensor] = []
    hooks = [
        r.module.register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, output: logits.append(
                next(t for t in output if t.is_floating_point() and t.shape[-1] == experts)
            )
        )
        for r in find_routers(model)
    ]
    yield logits
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", [*FAMILIES, "granitemoeshared", "ernie4_5_moe"])
def test_routers_of_every_host_are_found_with_their_layers(family: str, tmp_path: Path) -> None:
    model = load_model(tiny_models.make(family, tmp_path / "src"))
    found = find_routers(model)
    dense_first = family in {"glm4_moe", "dots1", "ernie4_5_moe"}
    assert [router.layer for router in found] == ([1] if dense_first else [0, 1])
    assert {router.experts for router in found} == {4}
    assert all((router.bias is not None) == dense_first for router in found)


def test_gradients_are_those_of_the_losses_written_out(mixtral: Path) -> None:
    model: Any = load_model(mixtral)
    ids, labels = ids_of(3, 12), ids_of(3, 12)
    mask = torch.ones(3, 12)
    for logits in captured(model, 4):
        plain = language_model(model(input_ids=ids).logits, labels)
        penalty = torch.zeros(())
        for each in logits:
            wide = each.reshape(3, 12, 4)
            probabilities = wide.softmax(dim=-1)
            chosen = torch.zeros(3, 12, 4).scatter(-1, wide.topk(2, dim=-1).indices, 1.0)
            penalty = penalty + 0.3 * balance(probabilities, chosen.sum(dim=1), mask).mean()
            penalty = penalty + 0.2 * router_z(wide, mask).mean()
        (plain + penalty / 2).backward()
    expected = gradients(model)
    watch = Routers(find_routers(model), BOTH)
    begin(watch, mask)
    language_model(model(input_ids=ids).logits, labels).backward()
    found = gradients(model)
    assert set(found) == set(expected)
    for name in expected:
        # the same float32 numbers, added in another order
        assert (found[name] - expected[name]).norm() <= 16 * EPS * expected[name].norm(), name
    values, layers = watch.drain(1)
    assert sum(factor * values[name] for name, factor in (("balance", 0.3), ("z", 0.2))) == (
        pytest.approx(float(penalty.detach() / 2), rel=1e-6)
    )
    assert [sum(layer.counts) for layer in layers] == [72, 72]


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_padding_is_neither_balanced_nor_counted(family: str, tmp_path: Path) -> None:
    model: Any = load_model(tiny_models.make(family, tmp_path / "src"))
    settings = BOTH if family == "mixtral" else Routing(balance=0.3)
    watch = Routers(find_routers(model), settings)
    ids = ids_of(2, 10)
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[1, 6:] = 0
    weights = torch.tensor([0.7, 0.3])

    def run(rows: Tensor, real: Tensor, shares: Tensor) -> None:
        begin(watch, real, shares)
        out = model(input_ids=rows, attention_mask=real).logits
        # padding has no loss of its own
        ((out * real[..., None]).square().sum() / 1e4).backward()

    run(ids, mask, weights)
    padded, (values, layers) = gradients(model), watch.drain(1)
    run(ids[:1], mask[:1], weights[:1])
    run(ids[1:, :6], mask[1:, :6], weights[1:])
    alone, (expected, known) = gradients(model), watch.drain(1)
    assert values == pytest.approx(expected, rel=1e-5)
    assert [layer.counts for layer in layers] == [layer.counts for layer in known]
    assert {layer.tokens for layer in layers} == {16}
    for name in padded:
        # attention over other lengths sums in another order
        assert (padded[name] - alone[name]).norm() <= 64 * EPS * alone[name].norm(), name


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_recomputation_neither_counts_nor_adds_twice(family: str, tmp_path: Path) -> None:
    model: Any = load_model(tiny_models.make(family, tmp_path / "src")).train()
    watch = Routers(find_routers(model), BOTH)
    ids, mask = ids_of(2, 8), torch.ones(2, 8)
    seen = []
    for recomputed in (False, True):
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        begin(watch, mask)
        loss = language_model(model(input_ids=ids, use_cache=False).logits, ids)
        watch.pause()
        loss.backward()
        seen.append((gradients(model), watch.drain(1)))
    (once, first), (again, second) = seen
    assert first == second
    # the same operations on the same numbers
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_nothing_is_watched_outside_a_micro_batch(mixtral: Path) -> None:
    model: Any = load_model(mixtral)
    ids = ids_of(1, 8)
    before = model(input_ids=ids).logits
    watch = Routers(find_routers(model), BOTH)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert watch.drain(1) == ({}, [])


def test_bias_moves_by_its_rate_towards_an_even_load(tmp_path: Path) -> None:
    model: Any = load_model(tiny_models.make("glm4_moe", tmp_path / "src"))
    (router,) = found = find_routers(model)
    bias = router.bias
    assert bias is not None
    watch = Routers(found, Routing(balance=0.0, kind="bias", rate=0.25))
    mask = torch.ones(2, 9)
    bias.zero_()
    bias[3] = -10.0
    begin(watch, mask)
    model(input_ids=ids_of(2, 9))
    watch.step_done()
    _, (layer,) = watch.drain(1)
    mean = sum(layer.counts) / 4
    assert layer.dead == (3,)
    signs = [(mean > count) - (mean < count) for count in layer.counts]
    assert bias.tolist() == [0.25 * sign for sign in signs[:3]] + [-10.0 + 0.25]
    # a step without tokens moves nothing
    watch.step_done()
    assert bias[3] == -9.75


@pytest.mark.parametrize("family", ["llama-tied", "phi3", "gpt2"])
@pytest.mark.parametrize("shared", [0, 16])
def test_expert_norms_are_lengths_of_what_each_expert_adds(
    family: str, shared: int, tmp_path: Path
) -> None:
    dense = tiny_models.make(family, tmp_path / "dense")
    inner = 128 if family == "gpt2" else 64
    experts = (inner - shared) // 8
    folder = make_adaptive(
        dense, tmp_path / "out", router="contribution", experts=experts, shared=shared
    )
    model: Any = load_model(folder)
    site = next(iter(model.adaptive_sites().values()))
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    found = expert_norms(site, x)
    assert found is not None
    with torch.no_grad():
        hidden = site._hidden(x)
        down = site._child_weights()["down"][0]
        for e in range(experts):
            own = slice(shared + 8 * e, shared + 8 * (e + 1))
            length = (hidden[:, own] @ down[:, own].T).norm(dim=1)
            # squares of 8 terms; a float32 square root keeps half of them at worst
            torch.testing.assert_close(found[:, e], length, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("select", ["all", "top-k"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_contribution_routers_follow_their_experts_and_move_nothing_else(
    select: str, recomputed: bool, tmp_path: Path
) -> None:
    dense = tiny_models.make("llama-tied", tmp_path / "dense")
    folder = make_adaptive(dense, tmp_path / "out", router="contribution", experts=8)
    model: Any = load_model(folder).train()
    model.set_select(select, **({"k": 4} if select == "top-k" else {}))
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, mask = ids_of(2, 8), torch.ones(2, 8)
    language_model(model(input_ids=ids, use_cache=False).logits, ids).backward()
    plain = gradients(model)
    watch = Routers(find_routers(model), Routing(balance=0.0, regression=2.0))
    begin(watch, mask)
    loss = language_model(model(input_ids=ids, use_cache=False).logits, ids)
    watch.pause()
    loss.backward()
    found = gradients(model)
    routers = {name for name in found if ".router." in name}
    assert len(routers) == 4
    for name in set(found) - routers:
        assert torch.equal(found[name], plain[name]), name
    values, layers = watch.drain(1)
    assert values["regression"] > 0
    assert len(layers) == (0 if select == "all" else 2)
    # against the definition, on the input of the first site
    site = next(iter(model.adaptive_sites().values()))
    kept: list[Tensor] = []
    hook = site.register_forward_hook(lambda m, args, out: kept.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hook.remove()
    x = kept[0].reshape(-1, 32)
    norms = expert_norms(site, x)
    assert norms is not None
    size = norms.square().mean(dim=1).reshape(2, 8)
    size = torch.maximum(size, 0.01 * size.mean(dim=1, keepdim=True)).reshape(-1)
    error = ((site.router(x) - norms).square().mean(dim=1) / size).mean()
    (2.0 / 2 * error).backward()
    own = gradients(model)
    for name in own:
        # the same float32 formula, reduced in another order
        torch.testing.assert_close(found[name], own[name], rtol=1e-4, atol=1e-6)


def test_what_was_counted_survives_a_checkpoint(mixtral: Path) -> None:
    model: Any = load_model(mixtral)
    watch = Routers(find_routers(model), BOTH)
    begin(watch, torch.ones(2, 8))
    model(input_ids=ids_of(2, 8))
    again = Routers(find_routers(model), BOTH)
    assert again.at_the_end() == []
    again.restore(watch.state(), torch.device("cpu"))
    assert again.at_the_end() == watch.at_the_end()
    again.restore([None, None], torch.device("cpu"))
    assert again.at_the_end() == []
