"""Drafts where they end: thresholds, the last position, caches and settings that are given."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from adaconvert.testing.exits_decoded import model_with_exits, prompts

OPTIONS = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("limits")


@pytest.fixture(scope="module")
def llama(root: Path) -> Any:
    return model_with_exits(root, "llama", [2, 3])


def test_giving_up_a_draft_leaves_samples_as_they_are(root: Path) -> None:
    model = model_with_exits(root, "llama", [2])
    batch, rows = prompts(1, 6), 700
    options = {**OPTIONS, "do_sample": True, "top_k": 2, "max_new_tokens": 3}
    expected = {
        (first, second): one * two
        for first, one in shares_after(model, batch["input_ids"])
        for second, two in shares_after(model, batch["input_ids"], first)
    }
    # of two tokens one has less: it would be given up, were its own probability what counts
    draft = {"draft_exit": 2, "draft_tokens": 1, "draft_schedule": "constant"}
    torch.manual_seed(2)
    found: Counter[tuple[int, int]] = Counter()
    for _ in range(rows):
        made = model.generate(**batch, **draft, draft_threshold=0.5, **options)
        found[int(made[0, 6]), int(made[0, 7])] += 1
    assert set(found) <= set(expected)
    statistic = sum(
        (found[pair] - rows * share) ** 2 / (rows * share) for pair, share in expected.items()
    )
    # exceeded once in ten thousand times, with three degrees of freedom
    assert statistic < 21.11


@torch.no_grad()
def shares_after(model: Any, ids: torch.Tensor, *more: int) -> list[tuple[int, float]]:
    """Return the two likeliest next tokens, and their shares of what both have."""
    best = model(torch.cat([ids, torch.tensor([more], dtype=ids.dtype)], 1)).logits[0, -1].topk(2)
    return list(zip(best.indices.tolist(), best.values.softmax(0).tolist(), strict=True))


@pytest.mark.parametrize("lossy", [False, True])
def test_a_text_may_fill_the_table_of_positions(root: Path, lossy: bool) -> None:
    model = model_with_exits(root, "gpt2", [2, 3])
    last = model.config.n_positions
    batch, new = prompts(2, last - 5), 5
    plain = model.generate(**batch, **OPTIONS, max_new_tokens=new)
    if lossy:
        with model.set_exits([1.0, 1.0], measure="max"):
            found = model.generate(**batch, **OPTIONS, max_new_tokens=new)
    else:
        found = model.generate(
            **batch, **OPTIONS, max_new_tokens=new, draft_exit=3, draft_schedule="constant"
        )
    assert found.shape[1] == last
    assert torch.equal(plain, found)


def test_a_cache_that_is_given_is_gone_on_with(llama: Any) -> None:
    batch = prompts(1, 8)
    plain = llama.generate(**batch, **OPTIONS, max_new_tokens=5)
    cache = DynamicCache(config=llama.config)
    with torch.no_grad():
        llama(input_ids=batch["input_ids"][:, :6], past_key_values=cache, use_cache=True)
    with pytest.warns(UserWarning, match="a cache was given"):
        found = llama.generate(
            **batch, **OPTIONS, max_new_tokens=5, past_key_values=cache, draft_exit=2
        )
    assert torch.equal(plain, found)
    assert cache.get_seq_length() == 8 + 4


def test_settings_may_be_given_by_position(llama: Any) -> None:
    batch = prompts(1, 8)
    ids = batch["input_ids"]
    plain = llama.generate(**batch, **OPTIONS, max_new_tokens=5)
    config = GenerationConfig(**OPTIONS, max_new_tokens=5, prompt_lookup_num_tokens=2)
    with (
        llama.set_exits(0.0, measure="max"),
        pytest.warns(UserWarning, match="stock code drafts"),
    ):
        found = llama.generate(ids, config, attention_mask=torch.ones_like(ids))
    assert torch.equal(plain, found)
