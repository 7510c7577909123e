"""Mixtures with null experts compute what the stock mixture does, until the bias moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.null_by_hand import make_nulled

FAMILIES = [
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "granitemoeshared"),
    "deepseek_v2",
]
EPS = torch.finfo(torch.float32).eps
SOME = {"rule": "null", "bias": 0.6}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("nulled")

    def get(family: str, dtype: str = "float32", **options: Any) -> tuple[Path, Path]:
        stock = root / f"{family}-{dtype}"
        if not stock.exists():
            overrides = options.pop("overrides", {})
            tiny_models.make(family, stock, dtype=dtype, max_shard_size="1GB", **overrides)
        key = "-".join(f"{k}={v}" for k, v in sorted(options.items()))
        nulled = root / f"{family}-{dtype}-{key}"
        if not nulled.exists():
            make_nulled(stock, nulled, **options)
        return stock, nulled

    return get


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(0))


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **inputs).logits
    return found


def error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"count": 8, "weights": "selected"},
        {"count": 3, "init": "bias"},
        {"kind": "identity", "min_real": 1},
        {"kind": "constant"},
    ],
    ids=str,
)
def test_the_start_is_the_stock_model(folders: Any, family: str, options: Any) -> None:
    stock, nulled = folders(family, **options)
    ids = tokens(2, 23)
    source, model = load_model(stock), load_model(nulled)
    wanted = logits(source, ids)
    with model.collect("experts_run") as run:
        got = logits(model, ids)
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert {int(n) for found in run.values() for n in torch.cat(found).unique()} == {2}
    with model.set_select("all"):
        assert error(logits(model, ids), wanted) <= 4 * EPS
    assert all(len(torch.cat(found)) == 46 for found in run.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_the_start_are_the_stock_gates(folders: Any, family: str) -> None:
    stock, nulled = folders(family)
    source, model = load_model(stock), load_model(nulled)
    path, site = next(iter(model.adaptive_sites().items()))
    block: Any = source.get_submodule(path)
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        at = site.adaptive_returned
        found = getattr(block, site.adaptive_spec["mixture"]["router"])(x)
        decision = site.adaptive_decide(x)
    wanted = torch.zeros(50, 4).scatter(-1, found[at.index], found[at.weights].float())
    got = torch.zeros(50, 4).scatter(-1, decision.order, decision.weights)
    assert (got - wanted).abs().max() <= 1e-6
    assert torch.equal(decision.logits, found[at.logits].float())
    assert torch.equal(decision.null_logits, decision.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_the_stock_model_to_two_roundings(folders: Any, family: str) -> None:
    """Logits tie often in bfloat16; a token keeps the experts the stock router takes."""
    stock, nulled = folders(family, dtype="bfloat16", kind="identity")
    source, model = load_model(stock), load_model(nulled)
    ids = tokens(8, 120)
    with model.collect("experts_run") as run:
        got = logits(model, ids)
    assert {int(n) for found in run.values() for n in torch.cat(found).unique()} == {2}
    wanted = logits(source, ids)
    # softmax over two logits or over four, rounded: a last place of a few gates
    assert error(got.float(), wanted.float()) <= 2 * torch.finfo(torch.bfloat16).eps
    for site in model.adaptive_sites().values():
        null = site.null_experts
        assert null.weight.dtype == site.adaptive_router.weight.dtype == torch.bfloat16
        assert null.bias.dtype == null.scale.dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_agree_where_slots_are_dropped(folders: Any, family: str) -> None:
    from adaconvert.modeling import stock_experts

    stock_experts.register()
    _, nulled = folders(family, kind="constant")
    model: Any = load_model(nulled)
    for site in model.adaptive_sites().values():
        torch.nn.init.normal_(site.null_experts.value)
    ids = tokens(2, 23)
    found, grads = {}, {}
    with model.set_select(**SOME), model.collect("experts_run") as run:
        for name in ("eager", "batched_mm", "grouped_mm", "adaconvert"):
            model.config._experts_implementation = name
            found[name] = logits(model, ids)
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            grads[name] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    numbers = torch.cat([torch.cat(kept) for kept in run.values()])
    assert numbers.unique().numel() > 1, "nothing to drop"
    for name, got in found.items():
        assert error(got, found["eager"]) <= 32 * EPS, name
        assert grads[name].keys() == grads["eager"].keys()
        for key, grad in grads[name].items():
            assert (grad - grads["eager"][key]).norm() <= 1e-4 * grads["eager"][key].norm(), key


def test_our_kernels_are_told_of_empty_slots(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from adaconvert.kernels import experts
    from adaconvert.modeling import stock_experts

    stock_experts.register()
    model: Any = load_model(folders("mixtral")[1])
    ids, told = tokens(2, 23), []
    with model.set_select(**SOME):
        wanted = logits(model, ids)
        model.config._experts_implementation = "adaconvert"
        plan = experts.route_plan

        def watched(index: Tensor, count: int, *, may_drop: bool) -> Any:
            told.append((may_drop, bool((index < 0).any())))
            return plan(index, count, may_drop=may_drop)

        monkeypatch.setattr(experts, "route_plan", watched)
        assert error(logits(model, ids), wanted) <= 32 * EPS
        assert told == [(True, True)] * 2
        # what they refuse goes to transformers' own, without the empty slots
        for site in model.adaptive_sites().values():
            site.experts.act_fn.register_forward_hook(lambda *_: None)
        assert error(logits(model, ids), wanted) <= 32 * EPS
    assert len(told) == 2


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "adaconvert"])
def test_tokens_without_any_expert(folders: Any, implementation: str) -> None:
    """A batch of nothing but null experts runs, and its blocks add nothing."""
    from adaconvert.modeling import stock_experts

    stock_experts.register()
    _, nulled = folders("mixtral")
    model: Any = load_model(nulled)
    model.config._experts_implementation = implementation
    ids = tokens(2, 9)
    with model.set_select("null", bias=1e4), model.account() as account:
        got = logits(model, ids)
        for site in account.sites.values():
            assert (site.idle, site.neurons) == (18, 0)
    for layer in model.model.layers:
        layer.mlp.forward = torch.zeros_like
    assert torch.equal(got, logits(model, ids))


@pytest.mark.parametrize("kind", ["identity", "constant"])
def test_what_null_experts_add(folders: Any, kind: str) -> None:
    _, nulled = folders("olmoe", kind=kind, count=8)
    model: Any = load_model(nulled)
    site = next(iter(model.adaptive_sites().values()))
    x = torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(3))
    null = site.null_experts
    with torch.no_grad(), model.set_select(**SOME):
        without = site(x)
        decision = site.adaptive_decide(x[0], SOME)
        if kind == "identity":
            null.scale.fill_(0.7)
            wanted = 0.7 * decision.null_weights.sum(dim=-1, keepdim=True) * x[0]
        else:
            null.value.normal_()
            wanted = decision.null_weights @ null.value
        added = site(x) - without
    assert wanted.norm() > 0
    # a site by itself runs what the configuration says
    assert not decision.null_weights.equal(site.adaptive_decide(x[0]).null_weights)
    with torch.no_grad():
        plain = site.adaptive_decide(x[0])
    again = (
        0.7 * plain.null_weights.sum(dim=-1, keepdim=True) * x[0]
        if kind == "identity"
        else plain.null_weights @ null.value
    )
    assert (added[0] - again).norm() <= 64 * EPS * (again.norm() + without.norm())


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_caches_and_padding(folders: Any, family: str, beams: int) -> None:
    _, nulled = folders(family, kind="identity")
    model: Any = load_model(nulled)
    for site in model.adaptive_sites().values():
        torch.nn.init.ones_(site.null_experts.scale)
    ids = tokens(2, 14)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 3).long().expand(2, -1)
    told = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    with model.set_select(**SOME):
        plain = model.generate(ids, attention_mask=torch.ones_like(ids), **told)
        left = model.generate(padded, attention_mask=mask, **told)
        uncached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **told)
    assert torch.equal(plain, left[:, 3:])
    assert torch.equal(plain, uncached)
    with model.set_compute(0.9):
        less = model.generate(ids, attention_mask=torch.ones_like(ids), **told)
    assert torch.equal(
        less, model.generate(ids, attention_mask=torch.ones_like(ids), compute=0.9, **told)
    )


def test_padding_is_neither_routed_nor_counted(folders: Any) -> None:
    _, nulled = folders("qwen3_moe")
    model: Any = load_model(nulled)
    ids = tokens(2, 12)
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(17) >= 5).long().expand(2, -1)
    names = ("router_scores", "experts_run", "decisions")
    with model.set_select(**SOME):
        with model.account() as plain, model.collect(*names) as found:
            wanted = logits(model, ids)
        with model.account() as account, model.collect(*names) as got:
            left = logits(model, padded, attention_mask=mask)
    assert error(left[:, 5:], wanted) <= 64 * EPS
    assert (account.tokens, plain.tokens) == (24, 24)
    for path, site in account.sites.items():
        assert site.tokens == 24
        assert torch.equal(site.experts, plain.sites[path].experts)
        assert (site.neurons, site.idle) == (plain.sites[path].neurons, plain.sites[path].idle)
        (run,), (scores,) = got["experts_run"][path], got["router_scores"][path]
        assert torch.equal(run, found["experts_run"][path][0])
        assert scores.shape == (24, 4)
        assert torch.equal(run, (scores >= 0.6).sum(dim=-1))
        assert len(got["decisions"][path][0].order) == 34


def test_what_does_not_fit_is_refused(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    stock, nulled = folders("mixtral")
    model: Any = load_model(nulled)
    for rule, value in (("threshold", {"threshold": 0.1}), ("dynamic-k", {"tau": 0.5})):
        with pytest.raises(AdaptiveConfigError, match=f"{rule}.*known: null, all, top-k"):
            model.set_select(rule, **value)
    with pytest.raises(AdaptiveConfigError, match="needs a number bias"):
        model.set_select("null", bias=float("nan"))
    with pytest.raises(AdaptiveConfigError, match="null takes bias"):
        model.set_select("null", tau=0.5)
    broken = make_nulled(stock, tmp_path / "broken")
    file = broken / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.block_sparse_moe.null_experts.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"lacks model.layers.1.mlp.null_experts.weight"):
        load_model(broken)


def test_blocks_whose_weights_are_elsewhere(folders: Any) -> None:
    """Offloaded weights come when a module is called, those of null experts too."""
    import accelerate

    _, nulled = folders("mixtral", kind="identity")
    ids, found = tokens(2, 11), []
    for offloaded in (False, True):
        model: Any = load_model(nulled)
        for site in model.adaptive_sites().values():
            torch.nn.init.ones_(site.null_experts.scale)
        if offloaded:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
            assert site.null_experts.weight.is_meta
        with model.set_select(**SOME):
            found.append(logits(model, ids))
    assert torch.equal(*found)


def test_router_and_null_experts_trained_in_full_beside_adapters(folders: Any) -> None:
    import peft

    model: Any = load_model(folders("mixtral")[1])
    ids = tokens(2, 11)
    with model.set_select(**SOME):
        wanted = logits(model, ids)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["gate", "null_experts"]
    )
    adapted: Any = peft.get_peft_model(model, config)
    inner = adapted.get_base_model()
    with inner.set_select(**SOME), inner.account() as account:
        assert torch.equal(logits(adapted, ids), wanted)
        assert account.tokens == 22
        adapted(ids, labels=ids).loss.backward()
    for site in inner.adaptive_sites().values():
        trained = [site.adaptive_router, site.null_experts.modules_to_save["default"]]
        assert all(bool(module.weight.grad.any()) for module in trained)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v2"])
def test_autocast(folders: Any, family: str) -> None:
    stock, nulled = folders(family)
    source, model = load_model(stock), load_model(nulled)
    ids = tokens(2, 23)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with model.collect("experts_run") as run:
            got = logits(model, ids)
        wanted = logits(source, ids)
    assert {int(n) for found in run.values() for n in torch.cat(found).unique()} == {2}
    assert error(got.float(), wanted.float()) <= 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_moe", {"combine": "all"}, "norm_topk_prob True; its description says False"),
        ("olmoe", {"combine": "all"}, "norm_topk_prob True; its description says False"),
        ("deepseek_v2", {"scaling": 3.5}, r"routed_scaling_factor \S+; its description says 3.5"),
    ],
)
def test_weights_the_stock_router_does_not_give(
    tmp_path: Path, family: str, change: Any, message: str
) -> None:
    stock = tiny_models.make(family, tmp_path / "stock", max_shard_size="1GB")
    loaded = load_model(make_nulled(stock, tmp_path / "nulled"))
    site = next(iter(loaded.config.adaptive["sites"].values()))["ffn"]
    site["mixture"] = {**site["mixture"], **change}
    with pytest.raises(AdaptiveConfigError, match=message):
        type(loaded)(loaded.config)
