"""The output matrices of exits follow `resize_token_embeddings`, as the model's own does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.loading import load_model
from adaconvert.testing.exits_decoded import model_with_exits, prompts

VOCAB = 320
DRAFT = {"at": 2, "tokens": 3, "threshold": 0.0, "vocab": 200}


def exit_logits(model: Any, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        states = model.exit_states(**batch)
        return {at: model.exit_logits(at, state) for at, state in states.items()}


@pytest.mark.parametrize(
    ("family", "kind", "more"),
    [("llama", "norm", {}), ("gemma", "full", {}), ("llama", "norm", {"tie": True})],
)
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 9])
def test_heads_follow(
    tmp_path: Path, family: str, kind: str, more: dict[str, Any], size: int
) -> None:
    model = model_with_exits(tmp_path, family, [1, 2], kind, **more)
    assert model.config.vocab_size == VOCAB
    batch = prompts(2, 8)
    before = exit_logits(model, batch)
    model.resize_token_embeddings(size)
    after = exit_logits(model, batch)
    same = min(size, VOCAB)
    for at, logits in after.items():
        assert logits.shape[-1] == size
        # products of another width add in another order
        torch.testing.assert_close(logits[..., :same], before[at][..., :same])
    assert not torch.allclose(after[1], after[4])
    with model.set_exits(0.0), torch.no_grad():
        assert set(model(**batch).exit_layers.unique().tolist()) <= {0, 1}
    model.save_pretrained(tmp_path / "saved")
    again = exit_logits(load_model(tmp_path / "saved"), batch)
    for at, logits in after.items():
        assert torch.equal(again[at], logits)


@pytest.mark.parametrize(("size", "kept"), [(VOCAB + 8, 200), (120, 120)])
def test_a_drafting_vocabulary_stays_valid(tmp_path: Path, size: int, kept: int) -> None:
    model = model_with_exits(tmp_path, "llama", [2], draft=DRAFT)
    model.resize_token_embeddings(size)
    assert model.adaptive_exits()[2].draft_tokens.tolist() == list(range(kept))
    model.save_pretrained(tmp_path / "saved")
    batch = prompts(2, 8, vocab=100)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for found in (model, load_model(tmp_path / "saved")):
        plain = found.generate(**batch, **options)
        assert torch.equal(found.generate(**batch, **options, draft_exit=True), plain)
    assert found.config.adaptive["model"]["exits"]["draft"]["vocab"] == kept


def test_drafts_choose_among_all_where_none_of_theirs_is_left(tmp_path: Path) -> None:
    model = model_with_exits(tmp_path, "llama", [2], draft={**DRAFT, "vocab": 4})
    model.adaptive_exits()[2].draft_tokens.fill_(VOCAB - 1)
    model.resize_token_embeddings(100)
    assert model.adaptive_exits()[2].draft_tokens is None
    assert model.config.adaptive["model"]["exits"]["draft"]["vocab"] is None
