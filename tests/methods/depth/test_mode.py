"""Mixtures of depths and experts: blocks that tokens skip, made of what other methods made before.

Staged: a router beside a block, and in the block a mixture or experts to choose. Integrated: null
experts in the router of a mixture, beside which blocks may be skipped too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adaconvert import api
from adaconvert.modeling.loading import load_model

from .conftest import BLOCKS, inputs_of, logits_of, opened

CLOSE = 1e-5
#: what a llama becomes before its blocks are routed -> steps of methods and options.
MADE: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "upcycled": (("upcycle", {"experts": 4, "top_k": 2}),),
    "moefied": (("moefy", {"num_experts": 4}),),
    "nulled": (("adamoe", {"experts": 4, "null_experts": 4}),),
    "exits": (("early-exit", {"exits": "5", "head": "affine"}),),
    "moefied-exits": (("moefy", {"num_experts": 4}), ("early-exit", {"exits": "3"})),
}
WAYS = [
    ("upcycled", "mod"),
    ("upcycled", "skip"),
    ("moefied", "mod"),
    ("moefied", "skip"),
    ("nulled", "mod"),
    ("nulled", "skip"),
    ("exits", "skip"),
    ("exits", "mod"),
    ("moefied-exits", "skip"),
]
#: a setting that runs fewer experts.
FEWER: dict[str, dict[str, Any]] = {
    "moefied": {"rule": "dynamic-k", "tau": 0.9},
    "moefied-exits": {"rule": "top-k", "k": 1},
    "nulled": {"rule": "top-k", "k": 1},
}
ROUTED = {"mod": (3,), "skip": (2, 3, 4)}


class Made(NamedTuple):
    """Folders of the dense model, of what was made of it, and of that with routed blocks."""

    dense: Path
    before: Path
    out: Path


@pytest.fixture(scope="module")
def made(deep: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    root = tmp_path_factory.mktemp("mode")

    def make(name: str, kind: str) -> Made:
        dense = before = deep("llama")
        for number, (method, options) in enumerate(MADE[name]):
            target = root / f"{name}-{number}"
            if not target.exists():
                api.convert(before, destination=target, method=method, **options)
            before = target
        out = root / f"{name}-{kind}"
        if not out.exists():
            # an adapter that costs less than what it stands for
            more = {"adapter_width": 4} if kind == "skip" else {}
            api.convert(before, destination=out, method="depth", kind=kind, **more)
        return Made(dense, before, out)

    return make


def loaded(folder: Path, *, random: bool = True) -> Any:
    """Return a model, with routers of blocks that differ about tokens where asked for."""
    model = load_model(folder, dtype="float32")
    chance = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters() if random else ():
        if ".depth." in name:
            # logits around the threshold
            fresh = torch.randn(parameter.shape, generator=chance)
            parameter.data.copy_(fresh * (0.1 if name.endswith("bias") else 0.5))
    return model


@torch.no_grad()
def logits(model: Any, ids: Tensor, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **more).logits
    return found


def flops(model: Any, ids: Tensor) -> float:
    """Return FLOPs per token as the account counts them."""
    with model.account() as account:
        logits(model, ids, use_cache=False)
    return float(account.flops_per_token()["total"])


def ids_of(model: Any) -> Tensor:
    return inputs_of(model)["input_ids"]


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_as_converted_it_computes_what_the_source_does(
    made: Callable[..., Made], name: str, kind: str
) -> None:
    folders = made(name, kind)
    model = loaded(folders.out, random=False)
    found = logits_of(model)
    expected = logits_of(loaded(folders.before, random=False))
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    whole = logits_of(opened(folders.dense))
    assert (found - whole).abs().max() <= CLOSE * whole.abs().max()
    indices = [block.adaptive_layer["index"] for block in model.adaptive_depth().values()]
    assert tuple(indices) == ROUTED[kind]
    assert api.verify(folders.before, folders.out).ok


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_generating_with_a_cache_is_the_full_pass(
    made: Callable[..., Made], name: str, kind: str
) -> None:
    model = loaded(made(name, kind).out)
    if name in FEWER:
        chosen = dict(FEWER[name])
        model.set_select(chosen.pop("rule"), **chosen)
    ids = ids_of(model)
    with model.account() as account:
        whole = logits(model, ids, use_cache=False)
    layers = account.layers.values()
    assert 0 < sum(layer.run for layer in layers) < sum(layer.tokens for layer in layers)
    steps, cache = [], None
    for start, end in ((0, 9), (9, 13), *((at, at + 1) for at in range(13, ids.shape[1]))):
        with torch.no_grad():
            out = model(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() <= CLOSE * whole.abs().max()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = model.generate(input_ids=ids, **settings)
    for at in range(ids.shape[1], texts.shape[1]):
        assert logits(model, texts[:, :at], use_cache=False)[:, -1].argmax(-1).equal(texts[:, at])


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_the_account_counts_what_both_save(made: Callable[..., Made], name: str, kind: str) -> None:
    model = loaded(made(name, kind).out)
    ids = ids_of(model)
    with model.set_depth("all"):
        whole = flops(model, ids)
    with model.set_depth("none"):
        skipped = flops(model, ids)
    own = flops(model, ids)
    assert skipped < own < whole
    if name not in FEWER:
        return
    chosen = dict(FEWER[name])
    with model.set_select(chosen.pop("rule"), **chosen):
        with model.set_depth("all"):
            fewer = flops(model, ids)
        with model.set_depth("none"):
            least = flops(model, ids)
        both = flops(model, ids)
    assert fewer < whole
    assert least < both < min(fewer, own)
    if "k" in FEWER[name]:
        # alike in every block, and saved once in blocks that no token runs
        left = (BLOCKS - len(ROUTED[kind])) / BLOCKS
        saved = (whole - skipped) + left * (whole - fewer)
        assert whole - least == pytest.approx(saved, rel=1e-9)


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_what_is_saved_loads_again(
    made: Callable[..., Made], name: str, kind: str, tmp_path: Path
) -> None:
    model = loaded(made(name, kind).out)
    ids = ids_of(model)
    expected = logits(model, ids)
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype="float32")
    assert torch.equal(logits(again, ids), expected)
    assert list(again.adaptive_depth()) == list(model.adaptive_depth())
    assert set(again.adaptive_sites()) == set(model.adaptive_sites())
    assert list(again.adaptive_exits()) == list(model.adaptive_exits())


@pytest.mark.parametrize(("name", "kind"), WAYS)
def test_gradients_reach_routers_and_experts(
    made: Callable[..., Made], name: str, kind: str
) -> None:
    model = loaded(made(name, kind).out)
    ids = ids_of(model)
    model.train()
    with model.account() as account:
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(0 < layer.run < layer.tokens for layer in account.layers.values())
    for path, block in model.adaptive_depth().items():
        grad = block.depth.router.weight.grad
        assert torch.isfinite(grad).all(), path
        assert grad.abs().max() > 0, path
        # what the tokens that ran the block ran in it
        inside = {n: p.grad for n, p in block.named_parameters() if n.startswith("mlp.")}
        trained = {n for n, grad in inside.items() if grad is not None and grad.abs().max() > 0}
        routers = {n for n in inside if "gate." in f"{n}." and "proj" not in n}
        assert any("proj" in n for n in trained), path
        if name in {"upcycled", "nulled"}:
            assert routers & trained, path
        assert all(grad is None or torch.isfinite(grad).all() for grad in inside.values())


@pytest.mark.parametrize("kind", ["mod", "skip"])
def test_null_experts_and_skipped_blocks_together(made: Callable[..., Made], kind: str) -> None:
    model = loaded(made("nulled", kind).out)
    ids = ids_of(model)
    with model.set_depth("all"):
        costs = []
        for bias in (-1e4, 0.0, 1e4):
            with model.set_select("null", bias=bias):
                costs.append(flops(model, ids))
    assert costs[0] > costs[1] > costs[2]
    with model.set_select("null", bias=0.0), model.set_depth("threshold", threshold=0.0):
        assert flops(model, ids) < costs[1]


@pytest.mark.parametrize("kind", ["mod", "skip"])
def test_leaving_early_and_skipping_together(made: Callable[..., Made], kind: str) -> None:
    model = loaded(made("exits", kind).out)
    ids = ids_of(model)
    with model.set_depth("all"):
        stays = flops(model, ids)
        with model.set_exits([0.0]):
            leaves = flops(model, ids)
    with model.set_exits([0.0]):
        own = flops(model, ids)
        with model.set_depth("none"):
            both = flops(model, ids)
    assert both < own < leaves < stays
    # every token leaves, at the state that skipped blocks gave
    with model.set_exits([0.0]):
        found = logits(model, ids)
    with torch.no_grad():
        state = model.exit_states([5], input_ids=ids)[5]
        expected = model.exit_logits(5, state)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("kind", ["mod", "skip"])
def test_what_blocks_tell_beside_null_experts(made: Callable[..., Made], kind: str) -> None:
    model = loaded(made("nulled", kind).out)
    ids = ids_of(model)
    with model.collect("depth", "router_scores") as seen:
        logits(model, ids)
    blocks, sites = set(model.adaptive_depth()), set(model.adaptive_sites())
    assert set(seen["depth"]) == blocks
    assert set(seen["router_scores"]) == sites


@pytest.mark.parametrize("kind", ["mod", "skip"])
def test_experts_of_a_stock_mixture_are_saved_too(made: Callable[..., Made], kind: str) -> None:
    model = loaded(made("upcycled", kind).out)
    ids = ids_of(model)
    block, config = model.model.layers[3], model.config
    with model.set_depth("all"):
        whole = flops(model, ids)
    with model.set_depth("none"):
        skipped = flops(model, ids)
        with model.account() as account:
            logits(model, ids, use_cache=False)
    linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    kept = {f"self_attn.{name}_proj" for name in "qkv"} if kind == "skip" else set()
    gone = [m for n, m in linears.items() if n.startswith("self_attn.") and n not in kept]
    spared = sum(2 * m.weight.numel() for m in gone)
    # two of four experts of three matrices, and the mixture's own router
    spared += 2 * 2 * 3 * config.hidden_size * config.intermediate_size + 2 * 4 * config.hidden_size
    heads, length = config.num_attention_heads * config.head_dim, ids.shape[1]
    spared += 4 * heads * (length + 1) / 2
    # an adapter of width 4 in place of the block
    spared -= 2 * 2 * 4 * config.hidden_size if kind == "skip" else 0
    assert whole - skipped == pytest.approx(len(ROUTED[kind]) * spared, rel=1e-9)
    assert account.compute() < 1 - 0.1 * len(ROUTED[kind])


def test_a_branch_of_a_skipped_network_is_skipped_too(
    deep: Callable[..., Path], tmp_path: Path
) -> None:
    api.convert(deep("llama"), destination=tmp_path / "exits", method="early-exit", exits="3")
    out = tmp_path / "out"
    more = {"kind": "skip", "adapter_width": 4}
    api.convert(tmp_path / "exits", destination=out, method="depth", **more)
    model = loaded(out)
    for parameter in model.adaptive_exits()[3].network.parameters():
        # no longer the copy it began as
        parameter.data.mul_(1.5)
    ids = ids_of(model)
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: read.update({name: output})

    block = model.model.layers[2]
    hooks = [block.register_forward_hook(keep("block"))]
    with torch.no_grad(), model.collect("depth") as seen:
        state = model.exit_states([3], input_ids=ids)[3]
    for hook in hooks:
        hook.remove()
    run = seen["model.layers.2"][-1].run.view(ids.shape)
    assert 0 < run.sum() < run.numel()
    changed = (state - read["block"]).abs().amax(-1) > 0
    assert torch.equal(changed, run)
    with model.set_exits([0.0]):
        found = logits(model, ids)
    with torch.no_grad():
        expected = model.exit_logits(3, state)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
