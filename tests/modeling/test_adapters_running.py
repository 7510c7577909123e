"""Routed adapters of standalone checkpoints among everything else a model does."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from adaconvert.modeling import modeling_adaptive
from adaconvert.modeling.adaptive_adapters import Gates, scale_by
from adaconvert.modeling.adaptive_linear import Reader, read
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing.adapters_looped import RULES

EPS = torch.finfo(torch.float64).eps
#: sums of numbers in another order, through two blocks, as a share of the norm of the logits.
CLOSE = 2**10 * EPS
Adapt = Callable[..., Path]


def ids_of(rows: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(0))


def assert_close(found: Tensor, expected: Tensor, close: float = CLOSE) -> None:
    assert found.dtype == expected.dtype
    assert (found - expected).norm() <= close * expected.norm()


def gradients(model: Any, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("rule", ["soft", "top-2"])
def test_other_sequences_and_padding_change_nothing(adapt: Adapt, reads: str, rule: str) -> None:
    model: Any = load_model(adapt(reads=reads, select=RULES[rule]), dtype="float64")
    ids = ids_of(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(13) >= 4).long()[None]
    both = torch.cat([padded, ids_of(1, 13)])
    with torch.no_grad(), model.collect("adapter_logits") as kept:
        mask = torch.cat([mask, torch.ones_like(mask)])
        # the angles of rotary positions are rounded to float32
        places = (mask.cumsum(dim=1) - 1).clamp_min(0)
        found = model(both, attention_mask=mask, position_ids=places).logits
        assert {len(logits) for passes in kept.values() for logits in passes} == {9 + 13}
        assert_close(found[:1, 4:], model(ids).logits)


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_generation_with_and_without_a_cache_is_the_same(adapt: Adapt, reads: str) -> None:
    model: Any = load_model(adapt(reads=reads, select=RULES["top-2"]), dtype="float64")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = ids_of()
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    beams = model.generate(ids, num_beams=3, **options)
    assert beams.shape == cached.shape


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("rule", ["soft", "top-2"])
def test_checkpointing_gives_the_same_gradients(adapt: Adapt, reads: str, rule: str) -> None:
    model: Any = load_model(adapt(reads=reads, select=RULES[rule]), dtype="float32").train()
    with model.collect("adapter_logits") as first, model.account() as counted:
        wanted = gradients(model, ids_of())
    model.gradient_checkpointing_enable()
    with model.collect("adapter_logits") as second, model.account() as again:
        found = gradients(model, ids_of())
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert {p: len(v) for p, v in first.items()} == {p: len(v) for p, v in second.items()}
    assert counted.flops_per_token() == again.flops_per_token()


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_by_themselves(
    adapt: Adapt, reads: str, how: Callable[[Any], Any]
) -> None:
    model: Any = load_model(adapt(reads=reads), dtype="float32")
    other = how(model)
    with torch.no_grad():
        wanted = model(ids_of()).logits
        assert torch.equal(other(ids_of()).logits, wanted)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(model(ids_of()).logits, wanted)
        assert not torch.equal(other(ids_of()).logits, wanted)
        # a router of the copy's own
        next(s.router for s in other.adaptive_adapters().values() if s.router).weight.zero_()
        assert torch.equal(model(ids_of()).logits, wanted)


def test_threads_do_not_see_each_others_blocks(adapt: Adapt) -> None:
    model: Any = load_model(adapt(reads="layer"), dtype="float32")
    texts = [ids_of(1, length) for length in (5, 8, 11, 14)]
    with torch.no_grad():
        wanted = [model(ids).logits for ids in texts]
    found: dict[int, list[Tensor]] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            found[index] = [model(texts[index]).logits for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, values in found.items():
        assert all(torch.equal(value, wanted[index]) for value in values)
    assert len(found) == 4


def test_a_failed_pass_leaves_nothing_behind(adapt: Adapt) -> None:
    model: Any = load_model(adapt(reads="layer"), dtype="float32")
    wanted = model(ids_of()).logits
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids_of())
    hook.remove()
    with pytest.raises(RuntimeError, match="called outside the block"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))
    assert torch.equal(model(ids_of()).logits, wanted)


@pytest.mark.parametrize("reads", ["module", "layer", "shared"])
def test_bfloat16_keeps_routers_and_gates_in_float32(adapt: Adapt, reads: str) -> None:
    folder = adapt(reads=reads)
    model: Any = load_model(folder, dtype="bfloat16")
    kinds = {n.rpartition(".")[0].rpartition(".")[2]: p.dtype for n, p in model.named_parameters()}
    assert kinds["router"] == torch.float32
    assert kinds["adapters"] == kinds["q_proj"] == torch.bfloat16
    with torch.no_grad(), model.collect("adapter_logits") as kept:
        found = model(ids_of()).logits
    assert {logits.dtype for passes in kept.values() for logits in passes} == {torch.float32}
    wide: Any = load_model(folder, dtype="float32")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = wide(ids_of()).logits
        wanted = wide.float()(ids_of()).logits
    assert found.dtype == mixed.dtype == wanted.dtype == torch.bfloat16


def test_saving_and_loading_gives_the_same_model(adapt: Adapt, tmp_path: Path) -> None:
    model: Any = load_model(adapt(reads="shared"), dtype="float32")
    model.save_pretrained(tmp_path / "again")
    other: Any = load_model(tmp_path / "again", dtype="float32")
    assert set(other.state_dict()) == set(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids_of()).logits, model(ids_of()).logits)


def test_a_backbone_by_itself_routes_as_the_model_does(adapt: Adapt) -> None:
    folder = adapt(reads="layer")
    model: Any = load_model(folder, dtype="float32")
    named: Any = modeling_adaptive
    alone = named.AdaptiveLlamaModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        states = model.model(ids_of()).last_hidden_state
        assert torch.equal(alone(ids_of()).last_hidden_state, states)
        assert len(alone.adaptive_adapters()) == len(model.adaptive_adapters())


def test_a_checkpoint_runs_where_adaconvert_is_not(adapt: Adapt, elsewhere: Any) -> None:
    for reads in ("module", "layer"):
        folder = adapt(reads=reads)
        got = elsewhere(folder, "set_adapters('top-k', k=2)")
        model: Any = load_model(folder, dtype="float32")
        ids = torch.arange(3, 20)[None]
        with torch.no_grad():
            assert torch.equal(got["full"], model(ids).logits)
            with model.set_adapters("top-k", k=2):
                # kernels, which are not there, sum in another order
                assert_close(model(ids).logits, got["less"], 2**8 * torch.finfo(torch.float32).eps)
            grown = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(got["grown"], grown)


class Scaled(nn.Module):
    """A linear whose output is multiplied by what the block's router says."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        gates = read("r").gates({"rule": "top-k", "k": 2}, x.device, plan=True)
        out: Tensor = self.linear(x)
        return out * gates.dense(4)[:, :1].sigmoid().reshape(*x.shape[:-1], 1)


def test_a_stock_model_is_checkpointed_with_readers(adapt: Adapt) -> None:
    model: Any = load_model(adapt().parent / "dense", dtype="float32").train()
    router = nn.Linear(32, 4, bias=False)
    torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(0))
    model.router = router
    for layer in model.model.layers:
        layer.self_attn.q_proj = Scaled(layer.self_attn.q_proj)
        layer.mlp.up_proj = Scaled(layer.mlp.up_proj)
        Reader("r", router).attach(layer)
    wanted = gradients(model, ids_of())
    model.gradient_checkpointing_enable()
    for _ in range(2):
        found = gradients(model, ids_of())
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert wanted["router.weight"].any()
    model.gradient_checkpointing_disable()
    assert torch.equal(gradients(model, ids_of())["router.weight"], wanted["router.weight"])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        gradients(model, ids_of())


def test_an_interrupted_pass_leaves_nothing_behind(adapt: Adapt) -> None:
    model: Any = load_model(adapt(reads="layer"), dtype="float32")
    wanted = model(ids_of()).logits

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].mlp.register_forward_pre_hook(stop)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(ids_of())
    hook.remove()
    with pytest.raises(RuntimeError, match="called outside the block"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))
    assert torch.equal(model(ids_of()).logits, wanted)


def test_small_scales_survive_autocast() -> None:
    x, vectors = torch.randn(8, 32), torch.full((4, 32), 0.003)
    gates = Gates(torch.full((8, 4), 0.25))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = scale_by(x, gates, vectors)
    assert torch.equal(mixed, scale_by(x, gates, vectors))
    assert not torch.equal(mixed, x)


@pytest.mark.parametrize("value", ["false", [1], 1])
def test_whether_weights_are_renormalised_is_a_yes_or_no(adapt: Adapt, value: Any) -> None:
    model: Any = load_model(adapt())
    with pytest.raises(AdaptiveConfigError, match=r"renormalize is .*, no boolean"):
        model.set_adapters("top-k", k=2, renormalize=value)


def test_lora_on_top_leaves_the_knob(adapt: Adapt) -> None:
    model: Any = load_model(adapt())
    ids = torch.arange(3, 13)[None]
    with torch.no_grad(), model.set_adapters("uniform"):
        want = model(ids).logits
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with torch.no_grad(), model.set_adapters("uniform"):
        found = lora(ids).logits
    # its B is zero
    assert torch.equal(found, want)
