"""Drafts against plain decoding where rounding is fine, and where it is coarse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.testing.exits_decoded import model_with_exits, prompts, teacher_forced

OPTIONS: dict[str, Any] = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "return_dict_in_generate": True,
}
DRAFT = {"draft_exit": 3, "draft_tokens": 4, "draft_schedule": "constant"}


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_two_hundred_prompts_in_float64(tmp_path: Path, family: str) -> None:
    model = model_with_exits(tmp_path, family, [2, 3]).double()
    accepted = drafted = 0
    for seed in range(10):
        batch = prompts(20, 8, seed)
        plain = model.generate(**batch, **OPTIONS, max_new_tokens=8)
        found = model.generate(**batch, **OPTIONS, **DRAFT, max_new_tokens=8)
        assert torch.equal(plain.sequences, found.sequences)
        accepted += found.draft["accepted"]
        drafted += found.draft["drafted"]
    assert 0 < accepted < drafted


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_in_bfloat16_tokens_differ_at_near_ties_alone(tmp_path: Path, family: str) -> None:
    model = model_with_exits(tmp_path, family, [2, 3]).to(torch.bfloat16)
    exact = copy.deepcopy(model).double()
    for seed in range(15, 25):
        batch = prompts(1 + seed % 3, 7 + seed % 4, seed)
        length = batch["input_ids"].shape[1]
        plain = model.generate(**batch, **OPTIONS, max_new_tokens=14, output_logits=True)
        found = model.generate(**batch, **OPTIONS, **DRAFT, max_new_tokens=14).sequences
        true = teacher_forced(exact, plain.sequences, batch["attention_mask"], length)[4]
        told = torch.stack(plain.logits, 1).double()
        for row, same in enumerate(plain.sequences[:, length:] == found[:, length:]):
            if bool(same.all()):
                continue
            step = int((~same).nonzero()[0])
            logits = told[row, step]
            other = int(found[row, length + step])
            # both ways of decoding are off by their rounding, and so are both tokens' logits
            off = float((logits - true[row, step]).abs().max())
            assert float(logits.max() - logits[other]) <= 2 * off
            # the second best, or as good as that
            assert int((logits > logits[other]).sum()) <= 1
