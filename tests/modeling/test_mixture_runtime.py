"""The runtime around mixtures with null experts: knobs, account, copies, saving, compiling."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from adaconvert.modeling import adaptive_mixture, adaptive_schema, modeling_adaptive
from adaconvert.modeling.adaptive_dispatch import compacted
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.null_by_hand import make_nulled

EPS = torch.finfo(torch.float32).eps
SOME: dict[str, Any] = {"rule": "null", "bias": 0.6}
IDS = torch.randint(3, 300, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("mixtures")

    def get(family: str = "mixtral", **options: Any) -> tuple[Path, Path]:
        stock = root / family
        if not stock.exists():
            tiny_models.make(family, stock, max_shard_size="1GB")
        key = "-".join(f"{k}={v}" for k, v in sorted(options.items()))
        nulled = root / f"{family}-{key}"
        if not nulled.exists():
            make_nulled(stock, nulled, **options)
        return stock, nulled

    return get


def logits(model: Any, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids, **inputs).logits
    return found


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "granitemoe", "deepseek_v2"])
def test_the_account(folders: Any, family: str) -> None:
    model: Any = load_model(folders(family, count=8)[1])
    with model.account() as account, model.set_select("all"):
        logits(model)
    # the source's own decision is the reference
    assert account.compute() == 1.0
    assert all(site.routed_tokens == 0 for site in account.sites.values())
    with model.account() as account, model.collect("experts_run") as run, model.set_select(**SOME):
        logits(model)
    whole = model.config.adaptive["reference"]["flops_per_token"]
    more = 0.0
    for path, site in account.sites.items():
        spec = model.adaptive_sites()[path].adaptive_spec
        experts = int(torch.cat(run[path]).sum())
        assert int(site.experts.sum()) == experts
        assert site.idle == int((torch.cat(run[path]) == 0).sum())
        assert site.neurons == site.executed == experts * spec["experts"]["width"]
        assert site.router_flops + site.gate_flops == 2 * 32 * (4 + 8)
        assert site.neuron_bytes * spec["intermediate"] == sum(
            4 * p.numel() for p in model.adaptive_sites()[path].experts.parameters()
        )
        routed = site.neurons * 2 * 32 * 3 + 42 * 2 * 32 * 8
        more += routed / 42 - 2 * 2 * 32 * 3 * spec["experts"]["width"]
    assert account.compute() == pytest.approx((whole + more) / whole, rel=1e-12)
    assert account.flops_per_token()["router"] == len(account.sites) * 2 * 32 * 12


def test_set_compute_without_a_table_runs_fewer_real_experts(folders: Any) -> None:
    model: Any = load_model(folders("mixtral")[1])
    with model.set_compute(1):
        assert model.adaptive_runtime.knobs == {"*": {"rule": "all"}}
    with model.set_compute(0.9), model.collect("experts_run") as run, model.account() as account:
        logits(model)
    assert {int(n) for found in run.values() for n in torch.cat(found)} == {1}
    assert account.compute() <= 0.9
    with pytest.raises(
        ValueError,
        match=r"out of reach: without calibration, by top-k of real experts alone, this model can "
        r"run 0\.\d{4} to 1 of the reference's FLOPs per token; `adaconvert calibrate` measures "
        r"what its null biases can do$",
    ):
        model.set_compute(0.1)
    low = account.compute()
    with model.set_compute(low), model.account() as again:
        logits(model)
    assert again.compute() == low


def test_a_calibrated_row_moves_the_bias(folders: Any) -> None:
    model: Any = load_model(folders("mixtral")[1])
    paths = list(model.adaptive_sites())
    row = {"compute": 0.8, "loss": 1.0, "select": dict.fromkeys(paths, SOME)}
    model.config.adaptive["calibration"] = {"rows": [row]}
    with model.set_select(**SOME):
        wanted = logits(model)
    with model.set_compute(0.85):
        assert torch.equal(logits(model), wanted)
    grown = model.generate(IDS, compute=0.85, max_new_tokens=3, do_sample=False, pad_token_id=0)
    with model.set_select(**SOME):
        again = model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(grown, again)


def test_top_k_runs_that_many_real_experts(folders: Any) -> None:
    stock, nulled = folders("qwen3_moe")
    model: Any = load_model(nulled)
    for k in (1, 2, 3, 9):
        source = load_model(stock, num_experts_per_tok=min(k, 4))
        with model.set_select("top-k", k=min(k, 4)), model.collect("experts_run") as run:
            got = logits(model)
        wanted = logits(source)
        assert (got - wanted).norm() <= 32 * EPS * wanted.norm()
        assert {int(n) for found in run.values() for n in torch.cat(found)} == {min(k, 4)}


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "olmoe"])
def test_copies_and_saved_models_are_the_model(folders: Any, family: str, tmp_path: Path) -> None:
    from safetensors import safe_open

    _, nulled = folders(family, kind="identity", select={"rule": "null", "bias": 0.6})
    model: Any = load_model(nulled)
    for site in model.adaptive_sites().values():
        torch.nn.init.ones_(site.null_experts.scale)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "saved")
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in [*copies, load_model(tmp_path / "saved")]:
        assert (logits(other) - wanted).norm() <= 4 * EPS * wanted.norm()
    for other in copies:
        # a copy's blocks read their own null experts
        for site in other.adaptive_sites().values():
            torch.nn.init.zeros_(site.null_experts.scale)
        assert not torch.equal(logits(other), wanted)
    assert torch.equal(logits(model), wanted)
    names = []
    for folder in (nulled, tmp_path / "saved"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            names.append(sorted(file.keys()))
    assert names[0] == names[1]


def test_a_copied_router_works_in_the_block_that_calls_it(folders: Any) -> None:
    """Adapters that train a module in full keep a copy of it."""
    model: Any = load_model(folders("mixtral")[1])
    with model.set_select(**SOME):
        wanted = logits(model)
        for site in model.adaptive_sites().values():
            site.gate = copy.deepcopy(site.gate)
            torch.nn.init.zeros_(site.null_experts.weight)
        assert not torch.equal(logits(model), wanted)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "deepseek_v2"])
def test_router_logits_are_those_of_real_experts(folders: Any, family: str) -> None:
    stock, nulled = folders(family)
    model: Any = load_model(nulled)
    with torch.no_grad(), model.set_select(**SOME):
        found = model.model(IDS, output_router_logits=True).get("router_logits")
        wanted = load_model(stock).model(IDS, output_router_logits=True).get("router_logits")
    if wanted is None:
        pytest.skip("this version of transformers records no router logits of the family")
    # the first block has the same input
    assert (found[0] - wanted[0]).norm() <= 4 * EPS * wanted[0].norm()
    assert [t.shape for t in found] == [t.shape for t in wanted]


def test_the_backbone_alone(folders: Any) -> None:
    model: Any = load_model(folders("mixtral")[1])
    with model.set_select(**SOME), torch.no_grad():
        inner = model.model(IDS).last_hidden_state
        with model.account() as account:
            model.model(IDS)
    assert account.tokens == 42
    backbone = modeling_adaptive.AdaptiveMixtralModel.from_pretrained(
        folders("mixtral")[1], dtype="float32"
    )
    with backbone.set_select(**SOME), torch.no_grad():
        alone = backbone(IDS).last_hidden_state
    assert (alone - inner).norm() <= 4 * EPS * inner.norm()


@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "olmoe"])
def test_gradient_checkpointing_changes_nothing(folders: Any, family: str) -> None:
    found = []
    for checkpointing in (False, True):
        model: Any = load_model(folders(family, kind="identity")[1]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for site in model.adaptive_sites().values():
            torch.nn.init.constant_(site.null_experts.bias, 0.6)
            torch.nn.init.ones_(site.null_experts.scale)
        with model.account() as account, model.collect("router_scores", "decisions") as got:
            loss = model(IDS, labels=IDS).loss
            scores = torch.cat([t for kept in got["router_scores"].values() for t in kept])
            (loss + scores.clamp(max=3).mean()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        assert all(grad is not None for grad in grads.values())
        assert all(len(kept) == 1 for kept in got["decisions"].values())
        found.append((float(loss.detach()), grads, account.compute()))
    (loss, grads, compute), (again, others, counted) = found
    assert (loss, compute) == (again, counted)
    for name, grad in grads.items():
        assert (grad - others[name]).norm() <= 64 * EPS * grad.norm(), name
        if "null_experts" in name or name.endswith("gate.weight"):
            assert bool(grad.any()), name


def test_without_values(folders: Any) -> None:
    loaded = load_model(folders("mixtral")[1])
    with torch.device("meta"):
        model: Any = type(loaded)(loaded.config)
    model = model.to(torch.bfloat16)
    model.config._experts_implementation = "grouped_mm"
    with model.account(), model.collect("router_scores", "experts_run"):
        assert model(IDS.to("meta")).logits.shape == (2, 21, 320)


def test_compiled(folders: Any) -> None:
    model: Any = load_model(folders("mixtral", kind="identity")[1])
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    with model.set_select(**SOME):
        wanted = logits(model)
        assert (logits(compiled) - wanted).norm() <= 16 * EPS * wanted.norm()
    torch._dynamo.reset()


def test_lora_on_experts_and_router(folders: Any) -> None:
    import peft

    model: Any = load_model(folders("mixtral")[1])
    with model.set_select(**SOME):
        wanted = logits(model)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        target_parameters=["gate.weight", "experts.gate_up_proj"],
    )
    adapted: Any = peft.get_peft_model(model, config)
    inner = adapted.get_base_model()
    with inner.set_select(**SOME):
        assert (logits(adapted) - wanted).norm() <= 16 * EPS * wanted.norm()
        with inner.account() as account:
            logits(adapted)
        site = next(iter(inner.adaptive_sites().values()))
        assert isinstance(site.adaptive_router, adaptive_mixture.MixtureRouter)
        x = torch.randn(6, 32)
        before = site.adaptive_decide(x).logits
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if ".gate." in name and "lora" in name:
                    parameter.normal_()
        # what is decided is decided with the adapter
        assert not torch.equal(site.adaptive_decide(x).logits, before)
        assert not torch.equal(logits(adapted), wanted)
    assert account.tokens == 42


def test_the_order_of_what_a_router_returns(folders: Any) -> None:
    for family, like in (("mixtral", ""), ("olmoe", "logits"), ("granitemoe", "input")):
        site = next(iter(load_model(folders(family)[1]).adaptive_sites().values()))
        at = site.adaptive_returned
        assert {at.logits, at.weights, at.index} == {0, 1, 2}
        assert at.weights_like == like
        found = site.adaptive_router(torch.randn(5, 32))
        assert found[at.logits].shape == (5, 4)
        assert not found[at.index].is_floating_point()
    with pytest.raises(AdaptiveConfigError, match="Linear is no router"):
        adaptive_mixture.returned_by(torch.nn.Linear(4, 4))


def test_pairs_are_compacted() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator)
    calls = []

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        calls.append(index.shape)
        assert bool((index >= 0).all())
        return (x[:, None] * (index + 1)[..., None] * weights[..., None]).sum(dim=1)

    index = torch.tensor(
        [[0, 1, -1], [2, -1, -1], [-1, -1, -1], [1, 3, -1], [0, -1, -1], [3, 2, -1]]
    )
    weights = torch.rand(6, 3, generator=generator).masked_fill(index < 0, 0)
    wanted = (x[:, None] * (index + 1)[..., None] * weights[..., None]).sum(dim=1)
    assert (compacted(run, x, index, weights) - wanted).norm() <= 8 * EPS * wanted.norm()
    assert calls == [(8, 1)]
    # as many for every token: as they are
    assert torch.equal(
        compacted(run, x[[0, 3, 5]], index[[0, 3, 5]], weights[[0, 3, 5]]), wanted[[0, 3, 5]]
    )
    assert calls[1:] == [(3, 2)]
    assert not compacted(run, x[2:3], index[2:3], weights[2:3]).any()
    assert compacted(run, x[:0], index[:0], weights[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"null": {"slots": 9}}, "null.slots is 9, expected 1 to 8"),
        ({"null": {"count": 0}}, "null.count is 0"),
        ({"null": {"kind": "copy"}}, "null.kind is 'copy', known: zero, identity, constant"),
        ({"null": {"weights": "some"}}, "null.weights is 'some'"),
        ({"null": {"count": True}}, "null.count is True, expected 1 or more"),
        ({"null": {"count": 4.0}}, "null.count is 4.0, expected 1 or more"),
        ({"null": {"slots": True}}, "null.slots is True, expected 1 to 8"),
        ({"null": {"slots": "4"}}, "null.slots is '4', expected 1 to 8"),
        ({"experts": {"count": 4.0}}, "experts.count is 4.0, expected 1 or more"),
        ({"null": {"min_real": 2}}, "null.min_real is 2, expected 0 to 1"),
        ({"null": {"min_real": True}}, "null.min_real is True, expected 0 to 1"),
        ({"null": {"min_real": 1.0}}, "null.min_real is 1.0, expected 0 to 1"),
        ({"null": {"gain": 0}}, "null.gain is 0, expected a number above 0"),
        ({"null": {"gain": float("inf")}}, "null.gain is inf, expected a number above 0"),
        ({"null": {"gain": "2"}}, "null.gain is '2', expected a number above 0"),
        ({"null": {"target": -0.1}}, "null.target is -0.1, expected null or a number, 0 or more"),
        ({"null": {"target": float("nan")}}, "null.target is nan, expected null or a number"),
        ({"null": {"target": True}}, "null.target is True, expected null or a number"),
        ({"mixture": {"scaling": 0.0}}, "mixture.scaling is 0.0, expected a number above 0"),
        ({"mixture": {"scaling": float("nan")}}, "mixture.scaling is nan, expected a number"),
        ({"null": {"cost": 2}}, "null has unknown keys cost"),
        ({"null": None}, "null is NoneType"),
        ({"mixture": {"combine": "sum"}}, "mixture.combine is 'sum'"),
        ({"mixture": {"top_k": 5}}, "mixture.top_k is 5, expected 1 to 4"),
        ({"mixture": {"top_k": 1}}, "has a router of .4, 32. and 2 experts"),
        ({"mixture": {"router": "router"}}, "has no router"),
        ({"select": {"rule": "top-p", "p": 0.5}}, "top-p.*known: null, all, top-k"),
        ({"router": {"kind": "none"}}, "router.kind is 'none', known: mixture"),
    ],
    ids=str,
)
def test_descriptions_that_mean_nothing(folders: Any, change: Any, message: str) -> None:
    config = json.loads((folders("mixtral")[1] / "config.json").read_text())
    spec = config["adaptive"]["sites"]["model.layers.0.mlp"]["ffn"]
    for part, values in change.items():
        replaces = values is None or part in ("select", "router")
        spec[part] = values if replaces else {**spec[part], **values}
    made = modeling_adaptive.AdaptiveMixtralForCausalLM
    with pytest.raises(AdaptiveConfigError, match=message):
        made(made.config_class(**config))


@pytest.mark.parametrize("target", [None, 0, 0.7, 1.5])
def test_targets_a_description_may_have(folders: Any, target: float | None) -> None:
    config = json.loads((folders("mixtral")[1] / "config.json").read_text())
    config["adaptive"]["sites"]["model.layers.0.mlp"]["ffn"]["null"]["target"] = target
    assert adaptive_schema.read(config["adaptive"]) == config["adaptive"]


def test_the_null_rule_is_of_mixtures_alone() -> None:
    with pytest.raises(AdaptiveConfigError, match="'null', known: all, top-k"):
        adaptive_schema.check_select("here", {"rule": "null"}, 4)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_a_fresh_process_without_adaconvert(
    tmp_path: Path, family: str, elsewhere: Callable[..., dict[str, Tensor]]
) -> None:
    stock = tiny_models.make(family, tmp_path / "stock.with dots", max_shard_size="1GB")
    folder = make_nulled(stock, tmp_path / "nulled.with dots", kind="identity")
    got = elsewhere(folder, "set_select('null', bias=0.6)", "compute=0.9")
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(got["full"], logits(model, ids))
    with model.set_select(**SOME):
        assert torch.equal(got["less"], logits(model, ids))
    grown = model.generate(ids, max_new_tokens=3, do_sample=False, compute=0.9, pad_token_id=0)
    assert torch.equal(got["grown"], grown)


def test_auto_classes(folders: Any) -> None:
    import adaconvert.auto  # noqa: F401

    model = transformers.AutoModelForCausalLM.from_pretrained(folders("mixtral")[1])
    assert type(model).__name__ == "AdaptiveMixtralForCausalLM"
