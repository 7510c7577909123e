"""Routed adapters on models that choose experts as well, and what they count."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.errors import SourceError
from adaconvert.modeling import adaptive_schema
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.adapters_looped import RULES, Looped
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.compilers import has_compiler
from adaconvert.testing.networks_by_hand import add_networks
from adaconvert.testing.null_by_hand import make_nulled

#: sums of float64 numbers in another order, through two blocks.
CLOSE = 2**10 * torch.finfo(torch.float64).eps
MLP = ("gate_proj", "up_proj", "down_proj")
Adapt = Callable[..., Path]


def ids_of(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def assert_close(found: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= close * expected.norm()


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_models.make("llama", tmp_path / "dense")


# -- split feed-forward networks


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("router", ["param-center", "gate", "oracle"])
def test_adapters_on_a_split_network(dense: Path, reads: str, router: str) -> None:
    split = make_adaptive(dense, dense.parent / "split", router=router)
    folder = make_adapted(split, dense.parent / "both", linears=MLP, reads=reads)
    plain = make_adapted(dense, dense.parent / "plain", linears=MLP, reads=reads)
    model: Any = load_model(folder, dtype="float64")
    other: Any = load_model(plain, dtype="float64")
    zero = make_adapted(split, dense.parent / "zero", linears=MLP, reads=reads, random=False)
    start: Any = load_model(zero, dtype="float64")
    without: Any = load_model(split, dtype="float64")
    with torch.no_grad():
        # with every expert on it is the dense model with adapters
        assert torch.equal(model(ids_of()).logits, other(ids_of()).logits)
        for one in (start, without, model):
            one.set_select("top-k", k=3)
        assert_close(start(ids_of()).logits, without(ids_of()).logits)
        fewer = model(ids_of()).logits
        assert (fewer - other(ids_of()).logits).norm() > 0.01 * fewer.norm()
        generated = model.generate(ids_of(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 17)


def test_a_split_network_gives_chosen_neurons_alone_to_its_adapters(dense: Path) -> None:
    split = make_adaptive(dense, dense.parent / "split")
    folder = make_adapted(split, dense.parent / "both", linears=MLP)
    plain = make_adapted(dense, dense.parent / "plain", linears=MLP)
    model: Any = load_model(folder, dtype="float64")
    mlp = Looped(dense, plain).model.model.layers[0].mlp
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    site = model.adaptive_sites()["model.layers.0.mlp"]
    with torch.no_grad(), model.set_select("top-k", k=3):
        site.adaptive_spec = {**site.adaptive_spec, "select": {"rule": "top-k", "k": 3}}
        chosen = torch.zeros(9, 8, dtype=torch.float64)
        chosen.scatter_(1, site.router(x[0]).topk(3, dim=-1).indices, 1)
        hidden = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        wanted = mlp.down_proj(hidden * chosen.repeat_interleave(8, dim=-1))
        assert_close(site(x), wanted)


# -- mixtures and networks in place of projections


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_adapters_beside_null_experts(tmp_path: Path, family: str, reads: str) -> None:
    stock = tiny_models.make(family, tmp_path / "stock")
    nulled = make_nulled(stock, tmp_path / "nulled")
    options = {"linears": ("q_proj", "o_proj"), "reads": reads}
    model: Any = load_model(make_adapted(nulled, tmp_path / "both", **options), dtype="float32")
    plain = make_adapted(stock, tmp_path / "plain", **options)
    other: Any = load_model(plain, dtype="float32")
    close = 2**8 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        wanted = other(ids_of()).logits
        # at the exact start null experts change nothing
        assert_close(model(ids_of()).logits, wanted, close)
        assert_close(wanted.double(), Looped(stock, plain).model(ids_of()).logits, close)
        with model.set_select("top-k", k=1):
            assert (model(ids_of()).logits - wanted).norm() > 0.01 * wanted.norm()


def test_a_mixtures_own_router_keeps_the_dtype_of_the_model(tmp_path: Path) -> None:
    stock = tiny_models.make("granitemoe", tmp_path / "stock")
    folder = make_adapted(stock, tmp_path / "both", linears=("q_proj",))
    model: Any = load_model(folder, dtype="bfloat16")
    block = model.model.layers[0]
    assert block.block_sparse_moe.router.weight.dtype == torch.bfloat16
    assert block.self_attn.q_proj.router.weight.dtype == torch.float32
    assert model(ids_of()).logits.isfinite().all()


def test_adapters_on_a_network_in_place_of_a_projection(dense: Path) -> None:
    folder = make_adaptive(dense, dense.parent / "split")
    add_networks(folder, roles="q")
    adapted = make_adapted(folder, dense.parent / "both", linears=("up", "down"))
    model: Any = load_model(adapted, dtype="float64")
    merged: Any = load_model(folder, dtype="float64")
    sites = model.adaptive_adapters()
    assert next(iter(sites)) == "model.layers.0.self_attn.q_proj.up"
    for path, site in sites.items():
        delta = sum(2 / 4 * b @ a for a, b in zip(site.adapters.a, site.adapters.b, strict=True))
        merged.get_submodule(path).weight.data += delta
    with torch.no_grad(), model.set_adapters("uniform"):
        assert_close(model(ids_of()).logits, merged(ids_of()).logits)
        for one in (model, merged):
            one.set_select("top-k", k=2)
        assert_close(model(ids_of()).logits, merged(ids_of()).logits)


# -- what is counted


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_adapters_cost_what_their_sizes_say(adapt: Adapt, reads: str) -> None:
    model: Any = load_model(adapt(reads=reads, linears=("q_proj", "v_proj")), dtype="float32")
    ids = ids_of()
    plain: Any = load_model(adapt(reads=reads, linears=("q_proj",)), dtype="float32")
    with torch.no_grad():
        with model.account() as soft:
            model(ids)
        with model.set_adapters("top-k", k=1), model.account() as one:
            model(ids)
        with model.set_adapters("uniform"), model.account() as even:
            model(ids)
        with plain.account() as half:
            plain(ids)
    # q is 32 x 32, v 32 x 16; rank 2
    adapter = 2 * 2 * ((32 + 32) + (32 + 16))
    router = 2 * 4 * 32 * (2 if reads == "module" else 1)
    assert soft.flops_per_token()["adapters"] == 2 * 4 * adapter
    assert one.flops_per_token()["adapters"] == 2 * adapter
    assert soft.flops_per_token()["router"] == one.flops_per_token()["router"] == 2 * router
    assert even.flops_per_token()["router"] == 0
    assert soft.static_flops == half.static_flops
    assert soft.compute() > one.compute() > 1
    for site in one.sites.values():
        assert site.tokens == ids.numel()
        assert site.neurons == int(site.experts.sum()) == ids.numel()
        assert site.neurons <= site.executed <= 4 * ids.numel()


def test_shared_a_and_scales_cost_less(adapt: Adapt) -> None:
    found = {}
    for name, options in {"a": {"share": "a"}, "ia3": {"kind": "ia3"}}.items():
        model: Any = load_model(adapt(linears=("q_proj",), **options), dtype="float32")
        with torch.no_grad(), model.account() as account:
            model(ids_of())
        found[name] = account.flops_per_token()
    # two blocks; one A is run for every token whatever is selected
    assert found["a"]["adapters"] == 2 * 4 * 2 * 2 * 32
    assert found["a"]["router"] == 2 * (2 * 4 * 32 + 2 * 2 * 32)
    assert found["ia3"]["adapters"] == 2 * 4 * 2 * 32


def test_padding_is_not_counted(adapt: Adapt) -> None:
    model: Any = load_model(adapt(reads="shared"), dtype="float32")
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad(), model.account() as account:
        model(ids_of(), attention_mask=mask)
    assert {site.tokens for site in account.sites.values()} == {21}


def test_a_model_of_adapters_alone_has_no_experts_to_leave_out(adapt: Adapt) -> None:
    model: Any = load_model(adapt(), dtype="float32")
    wanted = model(ids_of()).logits
    with model.set_compute(1.0):
        assert torch.equal(model(ids_of()).logits, wanted)
    with pytest.raises(ValueError, match="no experts to leave out"):
        model.set_compute(0.5)
    with pytest.raises(AdaptiveConfigError, match="no experts to choose from"):
        model.set_select("top-k", k=1)
    assert model.adaptive_sites() == {}


# -- what is refused


@pytest.mark.parametrize(
    ("rule", "value", "message"),
    [
        ("top-9", {}, "known: soft, uniform"),
        ("top-k", {}, "needs k above 0"),
        ("top-k", {"k": 5}, "at most 4"),
        ("top-k", {"k": 1.5}, "needs k"),
        ("top-p", {"p": 0}, "needs p above 0"),
        ("soft", {"k": 1}, "unknown keys k"),
    ],
)
def test_rules_that_mean_nothing(
    adapt: Adapt, rule: str, value: dict[str, Any], message: str
) -> None:
    model: Any = load_model(adapt(linears=("q_proj",)), dtype="float32")
    with pytest.raises(AdaptiveConfigError, match=message):
        model.set_adapters(rule, **value)
    assert model.adaptive_runtime.adapters is None


def test_a_model_without_adapters_has_none_to_set(dense: Path) -> None:
    model: Any = load_model(make_adaptive(dense, dense.parent / "split"), dtype="float32")
    with pytest.raises(AdaptiveConfigError, match="has no routed adapters"):
        model.set_adapters("soft")


SITE = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("adapters", "rank"), 0, "rank is 0"),
        (("adapters", "rank"), True, "rank is True"),
        (("adapters", "kind"), "dora", "unknown keys"),
        (("adapters", "input"), 31, "has adapters for a matrix of"),
        (("adapters", "share"), "b", "share is 'b'"),
        (("adapters", "scaling"), [1.0, 2.0], "scaling is"),
        (("adapters", "scaling"), "two", "scaling is"),
        (("router", "reads"), "model", "reads is 'model'"),
        (("router", "kind"), "mlp", "kind is 'mlp'"),
        (("router", "of"), "model.layers.0.self_attn.k_proj", "which has none"),
        (("router", "scale"), "1", "scale '1'"),
        (("select", "rule"), "all", "rule is 'all'"),
        (("more",), 1, "unknown keys more"),
    ],
)
def test_descriptions_that_mean_nothing(
    dense: Path, keys: tuple[str, ...], value: Any, message: str
) -> None:
    folder = make_adapted(dense, dense.parent / "both", linears=("q_proj",), reads="layer")
    config = json.loads((folder / "config.json").read_text())
    spec = config["adaptive"]["sites"][SITE]["linear"]
    for key in keys[:-1]:
        spec = spec[key]
    spec[keys[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=message):
        load_model(folder)


def test_missing_tensors_are_named(dense: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapted(dense, dense.parent / "both", linears=("q_proj",))
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{SITE}.adapters.b"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=f"lacks {SITE}.adapters.b"):
        load_model(folder)


def test_a_linear_has_adapters_or_a_network_in_its_place(dense: Path) -> None:
    folder = make_adapted(dense, dense.parent / "both", linears=("q_proj",))
    adaptive = json.loads((folder / "config.json").read_text())["adaptive"]
    wrong = copy.deepcopy(adaptive)
    wrong["sites"][SITE]["linear"]["mlp"] = {}
    with pytest.raises(AdaptiveConfigError, match="unknown keys adapters"):
        adaptive_schema.read(wrong)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler here")
@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_a_compiled_model_computes_the_same(adapt: Adapt, reads: str) -> None:
    torch._dynamo.reset()
    model: Any = load_model(adapt(reads=reads, select=RULES["top-2"]), dtype="float32")
    wanted = model(ids_of()).logits
    # one of them all the way; the graphs are what differs
    compiled = torch.compile(model, backend="inductor" if reads == "module" else "aot_eager")
    for _ in range(2):
        assert_close(compiled(ids_of()).logits, wanted, 2**8 * torch.finfo(torch.float32).eps)
    with model.set_adapters("soft"):
        wanted = model(ids_of()).logits
        assert_close(compiled(ids_of()).logits, wanted, 2**8 * torch.finfo(torch.float32).eps)
