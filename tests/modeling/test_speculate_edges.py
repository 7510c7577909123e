"""Drafts where they are rare: unsure samples, forbidden tokens, ends of tables, caches."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from adaconvert.modeling.adaptive_checks import AdaptiveConfigError
from adaconvert.testing.exits_decoded import model_with_exits, prompts

GREEDY = {"do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True}
DRAFT = {"draft_exit": 3, "draft_tokens": 4, "draft_schedule": "constant", "draft_threshold": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("edges")


@pytest.fixture(scope="module")
def llama(root: Path) -> Any:
    return model_with_exits(root, "llama", [2, 3]).double()


def test_unsure_samples_are_not_drawn_less_often(root: Path) -> None:
    """What is drafted may not depend on what was drawn: then likely tokens come too often."""
    model = model_with_exits(root, "llama", [2])
    with torch.no_grad():
        # blocks behind the exit add nothing: it says what the model says, sure of neither of two
        for block in model.model.layers[2:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    rows = 3000
    batch = {name: value.expand(rows, -1) for name, value in prompts(1, 6).items()}
    options: dict[str, Any] = {"do_sample": True, "top_k": 2, "max_new_tokens": 3}
    options |= {"pad_token_id": 0, "eos_token_id": None, "temperature": 2.0}
    draft = {"draft_exit": 2, "draft_tokens": 1, "draft_schedule": "constant"}
    torch.manual_seed(0)
    plain = model.generate(**batch, **options)[:, 6:8]
    # single sequences: of a batch the surest one decides for all
    one = {name: value[:1] for name, value in batch.items()}
    found = torch.cat(
        [model.generate(**one, **options, **draft, draft_threshold=0.5)[:, 6:8] for _ in range(700)]
    )
    # two tokens, two values each; the expected counts are those of many plain samples
    names = plain.unique(dim=0)
    statistic = 0.0
    for name in names:
        share = float((plain == name).all(1).double().mean())
        count = float((found == name).all(1).double().sum())
        expected = share * len(found)
        statistic += (count - expected) ** 2 / (expected * (1 + len(found) / rows))
    # chi-square of 3 degrees of freedom exceeds this once in ten thousand times
    assert len(names) == 4
    assert statistic < 21.1


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_processors_may_forbid_all_that_drafts_choose_among(root: Path, temperature: float) -> None:
    model = model_with_exits(root, "llama", [2, 3])
    model.adaptive_exits()[3].draft_tokens = torch.arange(3, 60)
    allowed = [100, 101, 102]
    found = model.generate(
        **prompts(2, 8),
        **DRAFT,
        do_sample=True,
        temperature=temperature,
        max_new_tokens=6,
        pad_token_id=0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda *_: allowed,
    )
    assert set(found[:, 8:].unique().tolist()) <= set(allowed)


def test_no_position_is_beyond_the_last_token(root: Path) -> None:
    """Rows that are ahead run to the end of a table of positions, and not over it."""
    model = model_with_exits(root, "gpt2", [2, 3]).double()
    most = model.config.n_positions
    ids = prompts(1, most - 20)["input_ids"].repeat(4, 1)
    ids[0], ids[1:, -1] = 9, torch.tensor([5, 6, 7])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {**GREEDY, "max_length": most, "eos_token_id": None}
    plain = model.generate(**batch, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(**batch, **options, **DRAFT)
    assert torch.equal(plain.sequences, found.sequences)


def test_the_cache_ends_with_the_tokens(llama: Any) -> None:
    """Also where a sequence ends inside the drafts it accepted."""
    cut = 0
    for seed in range(3):
        batch = prompts(1, 8, seed)
        free = llama.generate(**batch, **GREEDY, max_new_tokens=12, eos_token_id=None)
        for token in free.sequences[0, 9:].tolist():
            options = {**GREEDY, "max_new_tokens": 12, "eos_token_id": token}
            plain = llama.generate(**batch, **options)
            found = llama.generate(**batch, **options, **DRAFT)
            assert torch.equal(plain.sequences, found.sequences)
            length = plain.past_key_values.get_seq_length()
            assert found.past_key_values.get_seq_length() == length
            cut += found.sequences.shape[1] < 20
            for one, two in zip(
                plain.past_key_values.layers, found.past_key_values.layers, strict=True
            ):
                torch.testing.assert_close(one.keys, two.keys)
    assert cut


@pytest.mark.parametrize("lossy", [False, True])
def test_a_given_cache_is_filled(llama: Any, lossy: bool) -> None:
    cache, batch = DynamicCache(), prompts(1, 8)
    plain = llama.generate(**batch, **GREEDY, max_new_tokens=4)
    options = {"max_new_tokens": 4, "past_key_values": cache, **({} if lossy else DRAFT)}
    leaving = llama.set_exits(0.0 if lossy else None)
    with leaving, pytest.warns(UserWarning, match="cache was given"):
        found = llama.generate(**batch, **GREEDY, **options)
    assert torch.equal(plain.sequences, found.sequences)
    assert cache.get_seq_length() == found.sequences.shape[1] - 1


def test_stock_drafts_are_noticed_wherever_they_are_asked_for(llama: Any) -> None:
    config = GenerationConfig(
        assistant_early_exit=2, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    ids = prompts(1, 8)["input_ids"]
    plain = llama.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    with llama.set_exits(0.0), pytest.warns(UserWarning, match="stock code drafts"):
        found = llama.generate(ids, config)
    assert torch.equal(plain, found)


def test_rules_that_mean_nothing_are_refused(llama: Any) -> None:
    for given, reason in (
        ({"measure": "sure"}, "measure is 'sure'"),
        ({"thresholds": 0.5, "measure": ["max"]}, "measure is"),
        ({"kv": "forget"}, "kv is 'forget'"),
        ({"decay": {"rate": -1.0, "length": 4}}, "decay.rate"),
        ({"measure": "max", "patience": 1}, "only measure 'patience' knows"),
        ({"thresholds": 0.9, "measure": "patience"}, "patience is None"),
    ):
        with pytest.raises(AdaptiveConfigError, match=reason):
            llama.set_exits(**given)
    assert llama.adaptive_runtime.leaving() is None


def test_patience_is_as_configured_when_not_given(root: Path) -> None:
    decide = {"measure": "patience", "thresholds": [None, None], "decay": None, "patience": 1}
    model = model_with_exits(root, "llama", [2, 3], decide=decide)
    with model.set_exits(0.5):
        rule = model.adaptive_runtime.leaving()
    assert rule["patience"] == 1
    assert rule["thresholds"] == [0.5, 0.5]
