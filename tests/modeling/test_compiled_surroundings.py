"""Compiled networks and what goes on around them: changed weights, hooks, modes that watch."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adaconvert.modeling.adaptive_execution import prepare
from adaconvert.modeling.loading import load_model
from adaconvert.testing.compilers import has_compiler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not has_compiler(),
        reason="torch.compile needs a C++ compiler here",
    ),
]
IDS, TOKEN = torch.arange(3, 12)[None], torch.tensor([[5]])


@pytest.fixture(autouse=True)
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even tiny matrices are compiled."""
    torch._dynamo.reset()
    monkeypatch.setenv("ADACONVERT_COMPILE", "1")


@pytest.fixture
def model(folders: Any) -> Any:
    folder = folders("llama", router="contribution", experts=8)[1]
    return load_model(folder, dtype="float32").requires_grad_(False)


def logits(model: Any, ids: Tensor, k: int = 4) -> Tensor:
    with torch.no_grad(), model.set_select("top-k", k=k):
        found: Tensor = model(ids).logits
    return found


def assert_same(found: Tensor, wanted: Tensor) -> None:
    """Equal but for rounding: sums of float32 numbers in another order, logits of order one."""
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max().clamp_min(1)


def test_decoding_leaves_a_copy_behind_that_a_prompt_has_found_out_of_date(model: Any) -> None:
    assert prepare(model) == len(model.adaptive_sites())
    for ids, k in ((TOKEN, 2), (IDS, 4), (TOKEN, 2)):
        logits(model, ids, k)
    for site in model.adaptive_sites().values():
        weight = site.down_proj.weight
        weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    logits(model, IDS)
    assert_same(logits(model, TOKEN, 2), logits(copy.deepcopy(model), TOKEN, 2))


def test_counted_flops_are_those_of_the_uncompiled_network(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted() -> int:
        with FlopCounterMode(display=False) as flops:
            logits(model, IDS)
        return int(flops.get_total_flops())

    first, wanted = counted(), logits(model, IDS)
    assert counted() == first
    monkeypatch.setenv("ADACONVERT_COMPILE", "0")
    other = copy.deepcopy(model)
    with FlopCounterMode(display=False) as flops:
        assert_same(logits(other, IDS), wanted)
    assert flops.get_total_flops() == first


def test_parameters_may_be_no_leaves_and_come_in_stacks(model: Any) -> None:
    # the same numbers, as functions of others
    leaves = {name: p.clone().requires_grad_() for name, p in model.named_parameters()}
    given = {name: leaf * 1.0 for name, leaf in leaves.items()}
    wanted = logits(model, IDS)
    with torch.no_grad(), model.set_select("top-k", k=4):
        found = torch.func.functional_call(model, given, (IDS,)).logits
        assert_same(found, wanted)
        stacked = {name: torch.stack([p, p * 1.1]) for name, p in model.named_parameters()}
        both = torch.vmap(
            lambda one: torch.func.functional_call(model, one, (IDS,), {"use_cache": False}).logits
        )(stacked)
    assert_same(both[0], wanted)
    assert_same(logits(model, IDS), wanted)


class Rounded(nn.Module):
    """A matrix held in another form, as quantisation does."""

    def __init__(self, stock: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("kept", stock.weight.detach().half())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.kept.float())


def test_matrices_that_were_replaced_are_let_go(folders: Any) -> None:
    folder = folders("phi3", router="contribution")[1]
    model: Any = load_model(folder, dtype="float32").requires_grad_(False)
    logits(model, IDS, 3)
    sites = model.adaptive_sites().values()
    seen = [weakref.ref(site.gate_up_proj.weight) for site in sites]
    for site in sites:
        site.gate_up_proj = Rounded(site.gate_up_proj)
    logits(model, IDS, 3)
    gc.collect()
    assert [one() for one in seen] == [None] * len(seen)


def test_hooks_of_a_router_see_prompts(model: Any) -> None:
    wanted = logits(model, IDS)
    site = next(iter(model.adaptive_sites().values()))
    seen: list[int] = []
    handle = site.router.register_forward_hook(lambda *_: seen.append(1))
    assert_same(logits(model, IDS), wanted)
    assert seen == [1]
    handle.remove()
    assert_same(logits(model, IDS), wanted)
    assert seen == [1]


def test_a_first_prompt_that_is_not_finite_spoils_nothing(model: Any) -> None:
    weight = model.get_input_embeddings().weight
    kept = weight[3].clone()
    weight[3] = float("nan")
    logits(model, IDS)
    weight[3] = kept
    found = logits(model, IDS)
    assert_same(found, logits(copy.deepcopy(model), IDS))
    assert bool(found.isfinite().all())
