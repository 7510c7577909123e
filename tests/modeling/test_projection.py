"""Networks in place of attention projections: what sites can do, they can do."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaconvert.errors import SourceError
from adaconvert.modeling import adaptive_schema
from adaconvert.modeling.adaptive_projection import AdaptiveProjection, drop_plans
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.networks_by_hand import ROUTER_WIDTH, add_networks

#: rounding of float32 sums in another order, as a share of the largest logit.
CLOSE = 1e-5
#: family -> projections that are matrices of their own there; GPT-2 stores them transposed, with
#: biases, and Qwen-2 has biases on some.
ROLES = {"llama": "qkvo", "qwen2": "qkvo", "gemma3_text": "qkvo", "gpt2": "o", "gpt_neox": "o"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("projection")

    def get(family: str = "llama", **options: Any) -> Path:
        key = "-".join(f"{k}={v}" for k, v in sorted(options.items()))
        folder = root / f"{family}-{key}".replace(" ", "")
        if not folder.exists():
            if not (root / family).exists():
                tiny_models.make(family, root / family, max_shard_size="1GB")
            make_adaptive(root / family, folder)
            options.setdefault("roles", ROLES.get(family, "qkvo"))
            add_networks(folder, **options)
        return folder

    return get


@pytest.fixture
def llama(folders: Any) -> Any:
    return load_model(folders(), dtype="float32")


def ids_of(rows: int = 2, length: int = 13) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 300, (rows, length), generator=generator)


def by_hand(model: Any, path: str, share: int | None = None) -> nn.Module:
    """Return a plain module that does what a site should: its `share` best experts of each token,
    all when None."""
    site = model.get_submodule(path)

    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.relu(nn.functional.linear(x, site.up.weight, site.up.bias))
            if share is not None:
                w1, w2 = site.router.w1, site.router.w2
                scores = (torch.relu(x @ w1.T) @ w2.T).abs()
                mask = torch.zeros_like(scores).scatter(-1, scores.topk(share, dim=-1).indices, 1)
                hidden = hidden * mask.repeat_interleave(hidden.shape[-1] // scores.shape[-1], -1)
            return nn.functional.linear(hidden, site.down.weight, site.down.bias)

    return Plain()


def replaced(model: Any, share: int | None = None) -> Any:
    """Return a copy of a model whose networks are plain modules."""
    other = copy.deepcopy(model)
    paths = [p for p, s in model.adaptive_sites().items() if s.adaptive_slot == "linear"]
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(other.get_submodule(parent), name, by_hand(model, path, share))
    other.adaptive_runtime.sites = tuple(p for p in model.adaptive_sites() if p not in paths)
    return other


def networks(model: Any) -> dict[str, Any]:
    return {p: s for p, s in model.adaptive_sites().items() if s.adaptive_slot == "linear"}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("family", [pytest.param(f, marks=pytest.mark.smoke) for f in ROLES])
def test_a_site_computes_its_network_and_its_chosen_experts(folders: Any, family: str) -> None:
    model: Any = load_model(folders(family), dtype="float32")
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, replaced(model)(ids).logits)
        with model.set_select("top-k", k=2, sites=list(networks(model))):
            assert_close(model(ids).logits, replaced(model, 2)(ids).logits)
            assert (model(ids).logits - replaced(model)(ids).logits).abs().max() > 1e-3
    assert len(networks(model)) == 2 * len(ROLES[family])


def test_nothing_of_the_matrix_is_left(llama: Any) -> None:
    site = llama.model.layers[0].self_attn.q_proj
    assert isinstance(site, AdaptiveProjection)
    assert not isinstance(site, nn.Linear), "quantisation and adapters would look for its weight"
    assert not hasattr(site, "weight")
    names = [n for n in llama.state_dict() if ".layers.0.self_attn.k_proj." in n]
    assert [n.split("k_proj.")[1] for n in names] == [
        *("up.weight", "down.weight", "router.w1", "router.w2"),
    ]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(llama: Any, how: Any) -> None:
    ids = ids_of()
    other = how(llama)
    with torch.no_grad(), llama.set_select("top-k", k=2), other.set_select("top-k", k=2):
        assert torch.equal(other(ids).logits, llama(ids).logits)


def test_resaved_checkpoint_is_the_same(llama: Any, folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    llama.save_pretrained(tmp_path / "again")
    before = load_file(folders() / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in after)
    other: Any = load_model(tmp_path / "again", dtype="float32")
    with torch.no_grad():
        assert torch.equal(other(ids_of()).logits, llama(ids_of()).logits)


def test_routers_stay_in_float32_and_networks_do_not(folders: Any) -> None:
    model: Any = load_model(folders(), dtype="bfloat16")
    site = model.model.layers[1].self_attn.o_proj
    assert (site.up.weight.dtype, site.down.weight.dtype) == (torch.bfloat16,) * 2
    assert site.router.w1.dtype == torch.float32
    with torch.no_grad(), model.set_select("dynamic-k", tau=0.5):
        assert model(ids_of()).logits.isfinite().all()


def test_cache_equals_full_pass(llama: Any) -> None:
    ids = ids_of(1, 9)
    with torch.no_grad(), llama.set_select("dynamic-k", tau=0.4):
        whole = llama(ids).logits
        past, pieces = None, []
        for piece in (ids[:, :6], ids[:, 6:7], ids[:, 7:8], ids[:, 8:]):
            out = llama(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            pieces.append(out.logits)
    assert_close(torch.cat(pieces, dim=1), whole)


def test_padding_is_neither_routed_nor_counted(llama: Any) -> None:
    ids = ids_of(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad(), llama.set_select("top-k", k=2):
        with llama.account() as account, llama.collect("router_scores") as got:
            padded = llama(ids, attention_mask=mask).logits
        alone = llama(ids[:1, 4:]).logits
    assert_close(padded[:1, 4:], alone)
    for path in networks(llama):
        site = account.sites[path]
        assert (site.tokens, int(site.experts.sum())) == (16, 32)
        assert torch.cat(list(got[path])).shape == (16, 4)


def test_account_counts_what_ran(llama: Any) -> None:
    ids = ids_of(1, 8)
    with torch.no_grad(), llama.set_select("top-k", k=1), llama.account() as account:
        llama(ids)
    flops, size = account.flops_per_token(), account.weight_bytes_per_token()
    # hidden 32; q and o 32 wide, k and v 16; one expert of 3 neurons of each; two blocks
    widths = [(32, 32), (32, 16), (32, 16), (32, 32)]
    chosen = 2 * sum(3 * (into + out) for into, out in widths)
    assert flops["linear"] == 2 * chosen
    assert size["linear"] == 4 * chosen
    routers = 2 * 4 * ROUTER_WIDTH * (32 + 4)
    ffn_routers = 2 * 8 * 32
    assert flops["router"] == 2 * (routers + ffn_routers)
    assert size["router"] == 4 * (routers + ffn_routers)
    rest = flops["total"] - flops["linear"] - flops["router"] - flops["ffn"]
    # every matrix outside sites is the head; the rest is attention
    assert account.static_flops == 2 * 32 * tiny_models.VOCAB
    assert rest == account.static_flops + account.attention_flops / 8


def test_compute_is_kept_by_both_kinds_of_sites(llama: Any) -> None:
    ids = ids_of()
    with torch.no_grad(), llama.account() as account:
        llama(ids)
    whole = account.compute()
    with pytest.raises(ValueError, match=r"this model can run 0\.\d+ to 1") as told:
        llama.set_compute(0.01)
    least = float(str(told.value).split("can run ")[1].split(" to 1")[0])
    assert least < 0.9 < whole
    for compute in (0.95, 0.9, least):
        with llama.set_compute(compute), torch.no_grad(), llama.account() as account:
            llama(ids)
        assert account.compute() <= compute + 1e-9
        # whole experts only, so not all of it is spent
        assert account.compute() > compute - 0.2


def test_one_number_of_experts_serves_sites_of_both_sizes(llama: Any) -> None:
    # 8 experts in the feed-forward networks, 4 in the others
    with torch.no_grad(), llama.set_select("top-k", k=6), llama.account() as account:
        llama(ids_of(1, 5))
    uses = {path: int(site.experts.sum()) for path, site in account.sites.items()}
    assert uses["model.layers.0.mlp"] == 30
    assert uses["model.layers.0.self_attn.q_proj"] == 20
    with pytest.raises(ValueError, match="k is 9, expected 1 to 8"):
        llama.set_select("top-k", k=9)
    with pytest.raises(ValueError, match="k is 6, expected 1 to 4"):
        llama.set_select("top-k", k=6, sites=["model.layers.0.self_attn.q_proj"])


def test_a_network_of_one_expert_is_run_as_it_is(folders: Any) -> None:
    folder = folders(roles="v", experts=1, width=10, layers=(1,))
    model: Any = load_model(folder, dtype="float32")
    ids = ids_of()
    with torch.no_grad():
        whole = model(ids).logits
        with model.set_select("dynamic-k", tau=1.0, sites=["model.layers.1.self_attn.v_proj"]):
            assert torch.equal(model(ids).logits, whole)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_networks_and_routers(folders: Any, checkpointing: bool) -> None:
    model: Any = load_model(folders(), dtype="float32").train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = ids_of()
    path = "model.layers.0.self_attn.k_proj"
    with model.set_select("top-k", k=2), model.account() as account:
        with model.collect("router_scores") as got:
            loss = model(ids, labels=ids, use_cache=False).loss
            penalty = sum(scores.square().mean() for found in got.values() for scores in found)
        (loss + penalty).backward()
    site = model.get_submodule(path)
    for name in ("up", "down"):
        assert getattr(site, name).weight.grad.abs().sum() > 0
    assert site.router.w1.grad.abs().sum() > 0
    assert account.sites[path].tokens == ids.numel()
    assert len(got[path]) == 1


def test_adapters_on_a_network_are_never_skipped(folders: Any) -> None:
    peft = pytest.importorskip("peft")
    model: Any = load_model(folders(), dtype="float32")
    ids = ids_of()
    with torch.no_grad(), model.set_select("top-k", k=2):
        before = model(ids).logits
    options = {"r": 2, "target_modules": ["q_proj.up", "q_proj.down"], "init_lora_weights": False}
    tuned = peft.get_peft_model(model, peft.LoraConfig(**options))
    with torch.no_grad(), model.set_select("top-k", k=2):
        assert (tuned(ids).logits - before).abs().max() > 1e-4
    with pytest.raises(ValueError, match="is not supported"):
        peft.get_peft_model(
            load_model(folders(), dtype="float32"), peft.LoraConfig(target_modules=["q_proj"])
        )


def test_generation_obeys_the_knob(llama: Any) -> None:
    ids = ids_of(1, 6)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    grown = llama.generate(ids, compute=0.9, **options)
    with llama.set_compute(0.9):
        assert torch.equal(llama.generate(ids, **options), grown)


def test_attention_with_a_network_is_not_split_over_devices(llama: Any) -> None:
    llama._tp_plan = {
        "model.layers.*.self_attn.q_proj": "colwise",
        "model.layers.*.mlp2.up_proj": "colwise",
        "lm_head": "colwise",
    }
    llama.model._tp_plan = {"layers.*.self_attn.o_proj": "rowwise"}
    drop_plans(llama, ["model.layers.3.self_attn.k_proj"])
    assert set(llama._tp_plan) == {"model.layers.*.mlp2.up_proj", "lm_head"}
    assert llama.model._tp_plan == {}


@pytest.mark.smoke
def test_fresh_process_reproduces_logits_exactly(
    folders: Any, elsewhere: Callable[..., dict[str, torch.Tensor]]
) -> None:
    folder = folders(roles="qo")
    got = elsewhere(folder, 'set_select("dynamic-k", tau=0.5)')
    model: Any = load_model(folder, dtype="float32")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(got["full"], model(ids).logits)
        with model.set_select("dynamic-k", tau=0.5):
            assert torch.equal(got["less"], model(ids).logits)


def test_backbone_alone_finds_its_networks(folders: Any) -> None:
    from adaconvert.modeling import modeling_adaptive

    own: Any = modeling_adaptive.AdaptiveLlamaModel
    backbone = own.from_pretrained(folders(), dtype=torch.float32).eval()
    assert len(networks(backbone)) == 8
    model: Any = load_model(folders(), dtype="float32")
    ids = ids_of()
    with torch.no_grad(), backbone.set_select("top-k", k=1), model.set_select("top-k", k=1):
        assert torch.equal(backbone(ids)[0], model.model(ids)[0])


def edited(folder: Path, target: Path, change: Any) -> Path:
    """Return a copy of a checkpoint whose config was changed."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config["adaptive"]["sites"])
    (target / "config.json").write_text(json.dumps(config))
    return target


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[Q]["linear"]["mlp"].update(hidden=31), r"\(32, 32\), not \(31, 32\)"),
        (lambda s: s[Q]["linear"]["mlp"].update(output=0), "hidden, output and intermediate are"),
        (lambda s: s[Q]["linear"]["mlp"].update(extra=1), "unknown keys extra"),
        (lambda s: s[Q]["linear"]["mlp"].update(intermediate=13), "do not make 13 neurons"),
        (lambda s: s[Q]["linear"]["mlp"].pop("bias"), "bias is NoneType, expected an object"),
        (lambda s: s[Q]["linear"]["mlp"].pop("router"), "lacks 'router'"),
        (lambda s: s[Q].update(linear={"adapters": []}), "linear lacks 'router'"),
        (
            lambda s: s.update({"model.layers.0.mlp.up_proj": s.pop(Q)}),
            "stands for a matrix of the split network 'model.layers.0.mlp'",
        ),
        (lambda s: s.update({"model.norm": s.pop(Q)}), r"stands for .* \(0, 0\), not \(32, 32\)"),
        (lambda s: s.update({"model.layers.9.q": s.pop(Q)}), "does not have"),
        (lambda s: s[Q]["linear"]["mlp"]["select"].update(rule="best"), "rule is 'best'"),
    ],
)
def test_config_that_cannot_be_run_is_refused(
    folders: Any, tmp_path: Path, change: Any, message: str
) -> None:
    folder = edited(folders(), tmp_path / "changed", change)
    with pytest.raises(SourceError, match=message):
        load_model(folder)


def test_missing_tensors_are_refused(folders: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in (f"{Q}.up.weight", f"{Q}.router.w2"):
        folder = tmp_path / name
        shutil.copytree(folders(), folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError, match=f"lacks {name}"):
            load_model(folder)


def test_routed_specs_name_every_site(llama: Any) -> None:
    found = adaptive_schema.routed_specs(llama.config.adaptive)
    assert set(found) == set(llama.adaptive_sites())
    assert adaptive_schema.parts(llama.config.adaptive) == {"linear", "ffn"}
