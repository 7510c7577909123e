"""Adaptive models over every family: what the stock class can do they can do, and route besides."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import SITES, make_adaptive

FAMILIES = sorted(SITES)
DECODERS = [family for family in FAMILIES if family != "bert"]
#: rounding of float32 sums in another order, on logits of order 10.
CLOSE = 1e-5


def ids_of(rows: int = 2, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 300, (rows, length), generator=generator)


def scale(logits: torch.Tensor) -> float:
    return float(logits.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_all_experts_are_the_dense_model_bit_for_bit(folders: Any, family: str) -> None:
    dense, adaptive = folders(family)
    stock = load_model(dense, dtype="float32")
    model = load_model(adaptive, dtype="float32")
    ids = ids_of()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_routed_path_with_every_expert_chosen_is_the_dense_model(folders: Any, family: str) -> None:
    dense, adaptive = folders(family)
    stock = load_model(dense, dtype="float32")
    model: Any = load_model(adaptive, dtype="float32")
    ids = ids_of()
    with torch.no_grad(), model.set_select("threshold", threshold=-1.0):
        routed, want = model(ids).logits, stock(ids).logits
    assert (routed - want).abs().max() <= CLOSE * scale(want)


@pytest.mark.parametrize(
    "router", ["param-center", "similarity", "analytic", "contribution", "gate", "oracle"]
)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_routers_and_rules_run_what_they_say(folders: Any, family: str, router: str) -> None:
    _, adaptive = folders(family, router=router)
    model: Any = load_model(adaptive, dtype="float32")
    ids = ids_of()
    before = None
    for k in (8, 5, 2):
        with torch.no_grad(), model.set_select("top-k", k=k), model.account() as account:
            model(ids)
        for site in account.sites.values():
            assert site.tokens == ids.numel()
            assert int(site.experts.sum()) == k * site.tokens
        total = account.flops_per_token()["total"]
        # with every expert on no router runs, so the routed forms may cost more than that
        assert before is None or k == 5 or total < before
        before = total
    for rule in (
        {"rule": "dynamic-k", "tau": 0.3},
        {"rule": "top-p", "p": 0.5},
        {"rule": "threshold", "threshold": 1e9},
    ):
        with torch.no_grad(), model.set_select(**rule), model.account() as account:
            model(ids)
        uses = [int(site.experts.sum()) for site in account.sites.values()]
        assert all(use >= ids.numel() for use in uses), "every token runs at least one expert"


def test_shared_neurons_always_run(folders: Any) -> None:
    _, adaptive = folders("llama", shared=16, experts=6)
    model: Any = load_model(adaptive, dtype="float32")
    with torch.no_grad(), model.set_select("top-k", k=1), model.account() as account:
        model(ids_of())
    for site in account.sites.values():
        assert site.neurons == site.tokens * (16 + 8)
    assert account.flops_per_token()["ffn"] == 2 * 3 * 2 * 32 * 24


@pytest.mark.parametrize("family", DECODERS)
def test_cache_equals_full_pass(folders: Any, family: str) -> None:
    model: Any = load_model(folders(family)[1], dtype="float32")
    ids = ids_of()
    with torch.no_grad(), model.set_select("top-k", k=3):
        full = model(ids).logits
        step = model(ids[:, :10], use_cache=True)
        parts = [step.logits]
        for at in range(10, 17):
            step = model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    assert (torch.cat(parts, dim=1) - full).abs().max() <= CLOSE * scale(full)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padded_batch_equals_single_runs_and_padding_is_not_counted(
    folders: Any, family: str
) -> None:
    model: Any = load_model(folders(family)[1], dtype="float32")
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), model.set_select("top-k", k=3):
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        with model.account() as account:
            batch = model(ids, attention_mask=mask, position_ids=positions).logits[1, 5:]
        with model.account() as one, model.account() as inner:
            single = model(ids[1:, 5:]).logits[0]
        both = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        grown = model.generate(ids, attention_mask=mask, **both)
        alone = model.generate(ids[1:, 5:], **both)
    assert (batch - single).abs().max() <= CLOSE * scale(single)
    assert torch.equal(grown[1, -5:], alone[0, -5:])
    assert account.tokens == 17 + 12
    assert {site.tokens for site in account.sites.values()} == {29}
    assert inner.tokens == 12
    assert one.tokens == 0, "the innermost account counts"


def test_resaved_checkpoint_is_complete(llama: Any, tmp_path: Path) -> None:
    ids = ids_of()
    llama.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    again: Any = load_model(tmp_path / "again", dtype="float32")
    with torch.no_grad(), llama.set_select("top-k", k=3), again.set_select("top-k", k=3):
        assert torch.equal(llama(ids).logits, again(ids).logits)
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"].startswith("modeling_adaptive.")
    assert (tmp_path / "again" / "adaptive_knobs.py").is_file()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_compute_the_same(llama: Any, how: str) -> None:
    other = copy.deepcopy(llama) if how == "deepcopy" else pickle.loads(pickle.dumps(llama))
    ids = ids_of()
    with torch.no_grad(), llama.set_select("top-k", k=3), other.set_select("top-k", k=3):
        assert torch.equal(llama(ids).logits, other(ids).logits)
    assert isinstance(other.model.layers[0].mlp, type(llama.model.layers[0].mlp))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    dense = tiny_models.make("llama", tmp_path / "dense", tie_word_embeddings=True)
    model: Any = load_model(make_adaptive(dense, tmp_path / "adaptive"), dtype="float32")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_routers_stay_in_float32(folders: Any) -> None:
    model: Any = load_model(folders("llama")[1], dtype="bfloat16")
    assert model.model.layers[0].mlp.router.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad(), model.set_select("top-k", k=3):
        assert model(ids_of()).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_gradient_checkpointing_changes_neither_gradients_nor_counts(
    folders: Any, family: str
) -> None:
    model: Any = load_model(folders(family)[1], dtype="float32").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    runs = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with (
            model.set_select("top-k", k=3),
            model.collect("router_scores") as got,
            model.account() as account,
        ):
            loss = model(ids, labels=ids, attention_mask=mask, use_cache=False).loss
            scores = [s for rows in got.values() for s in rows]
            (loss + sum(s.square().mean() for s in scores)).backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        counts = {path: (s.tokens, s.neurons) for path, s in account.sites.items()}
        runs.append((grads, counts, account.tokens, [s.shape for s in scores]))
    assert runs[0][1:] == runs[1][1:]
    assert any("router" in name for name in runs[0][0]), "auxiliary losses reach the routers"
    for name, grad in runs[0][0].items():
        assert (grad - runs[1][0][name]).abs().max() <= CLOSE * (1 + scale(grad)), name


def test_threads_see_their_own_knobs_in_generate(llama: Any) -> None:
    ids = ids_of(1, 6)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    alone = {x: llama.generate(ids, compute=x, **options) for x in (0.8, 1.0)}
    found: list[bool] = []

    def work(compute: float) -> None:
        for _ in range(5):
            got = llama.generate(ids, compute=compute, **options)
            found.append(torch.equal(got, alone[compute]))

    threads = [threading.Thread(target=work, args=(x,)) for x in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 10


def test_knobs_are_put_back(llama: Any) -> None:
    ids = ids_of()
    with torch.no_grad():
        want = llama(ids).logits
        with llama.set_compute(0.8), llama.set_select("top-k", k=1):
            assert not torch.equal(llama(ids).logits, want)
        assert torch.equal(llama(ids).logits, want)
        with pytest.raises(RuntimeError, match="stop"), llama.set_select("top-k", k=1):
            raise RuntimeError("stop")
        assert torch.equal(llama(ids).logits, want)


def test_resized_embeddings_and_beams(llama: Any) -> None:
    options = {"num_beams": 3, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with llama.set_select("top-k", k=3):
        one = llama.generate(ids_of(), **options)
        assert torch.equal(one, llama.generate(ids_of(), use_cache=False, **options))
    llama.resize_token_embeddings(400, mean_resizing=False)
    assert llama(ids_of()).logits.shape[-1] == 400


def test_compiled_model_computes_the_same(llama: Any) -> None:
    ids = ids_of()
    with torch.no_grad(), llama.set_select("top-k", k=3):
        want = llama(ids).logits
        got = torch.compile(llama, backend="eager")(ids).logits
    assert torch.equal(got, want)


def test_adapters_on_expert_matrices_are_never_skipped(folders: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model: Any = load_model(folders("llama")[1], dtype="float32")
    config = peft.LoraConfig(
        target_modules=["gate_proj", "up_proj", "down_proj"], r=4, init_lora_weights=False
    )
    wrapped = peft.get_peft_model(model, config).eval()
    ids = ids_of()
    with torch.no_grad(), model.set_select("top-k", k=3):
        adapted = wrapped(ids).logits
        with wrapped.disable_adapter():
            plain = wrapped(ids).logits
        merged = wrapped.merge_and_unload()(ids).logits
    assert (adapted - plain).abs().max() > 0.1
    assert (merged - adapted).abs().max() <= CLOSE * scale(adapted)


def test_sequence_classifier_loads_and_routes(folders: Any) -> None:
    _, adaptive = folders("llama")
    from adaconvert.modeling import modeling_adaptive

    made: Any = modeling_adaptive.AdaptiveLlamaForSequenceClassification
    torch.manual_seed(0)
    model = made.from_pretrained(adaptive, dtype=torch.float32, num_labels=3).eval()
    ids = ids_of()
    with torch.no_grad():
        full = model(ids).logits
        with model.set_select("top-k", k=1):
            assert not torch.equal(model(ids).logits, full)
    assert full.shape == (2, 3)


def test_backbone_alone_finds_its_sites(folders: Any) -> None:
    from adaconvert.modeling import modeling_adaptive

    _, adaptive = folders("llama")
    made: Any = modeling_adaptive.AdaptiveLlamaModel
    bare = made.from_pretrained(adaptive, dtype=torch.float32).eval()
    whole: Any = load_model(adaptive, dtype="float32")
    ids = ids_of()
    with torch.no_grad(), bare.set_select("top-k", k=2), whole.set_select("top-k", k=2):
        got = whole.lm_head(bare(ids).last_hidden_state)
        assert torch.equal(got, whole(ids).logits)


def test_compute_is_what_the_account_finds(llama: Any) -> None:
    for wanted in (0.6, 0.75, 0.9):
        with torch.no_grad(), llama.set_compute(wanted), llama.account() as account:
            llama(ids_of())
        assert account.compute() <= wanted
        assert account.compute() > wanted - 0.12, "one expert of eight is 0.09 of this model"


def test_stock_transformers_class_is_untouched(folders: Any) -> None:
    load_model(folders("llama")[1])
    assert transformers.LlamaForCausalLM.forward.__module__.startswith("transformers.")
    model = load_model(folders("llama")[0])
    assert type(model) is transformers.LlamaForCausalLM


def test_forward_of_its_own_on_a_matrix_is_never_skipped(llama: Any) -> None:
    # offloading replaces the forward of single modules and leaves their weights on meta
    ids = ids_of()
    up = llama.model.layers[0].mlp.up_proj
    with torch.no_grad(), llama.set_select("top-k", k=3):
        before = llama(ids).logits
        stock = up.forward
        up.forward = lambda x: 2 * stock(x)
        assert not torch.equal(llama(ids).logits, before)


def test_disk_offload_computes_the_same(folders: Any, tmp_path: Path) -> None:
    from adaconvert.modeling import modeling_adaptive

    _, adaptive = folders("llama")
    whole: Any = load_model(adaptive, dtype="float32")
    made: Any = modeling_adaptive.AdaptiveLlamaForCausalLM
    places = dict.fromkeys(
        ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu"
    )
    split = made.from_pretrained(
        adaptive,
        dtype=torch.float32,
        device_map={**places, "model.layers.1": "disk"},
        offload_folder=tmp_path / "offload",
    ).eval()
    ids = ids_of()
    with torch.no_grad(), whole.set_select("top-k", k=3), split.set_select("top-k", k=3):
        want = whole(ids).logits
        assert (split(ids).logits - want).abs().max() <= CLOSE * scale(want)


def test_what_is_not_selected_may_be_infinite(llama: Any) -> None:
    mlp = llama.model.layers[0].mlp
    ids = ids_of()
    with llama.set_select("top-k", k=1), torch.no_grad(), llama.account() as account:
        llama(ids)
    unused = int(account.sites["model.layers.0.mlp"].experts.argmin())
    if int(account.sites["model.layers.0.mlp"].experts[unused]) == 0:
        with torch.no_grad():
            mlp.up_proj.weight[unused * 8] = float("inf")
    with llama.set_select("top-k", k=1):
        assert torch.isfinite(llama(ids).logits).all()


def test_adapters_are_not_counted_as_another_network(folders: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model: Any = load_model(folders("llama")[1], dtype="float32")
    ids = ids_of()
    with torch.no_grad(), model.account() as plain:
        model(ids)
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=4)
    wrapped = peft.get_peft_model(model, config).eval()
    with torch.no_grad(), model.account() as adapted:
        wrapped(ids)
    assert adapted.flops_per_token() == plain.flops_per_token()
