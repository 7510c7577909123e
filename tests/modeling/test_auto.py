"""What `import adaconvert.auto` lets transformers' Auto classes load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import adaconvert.auto
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

assert adaconvert.auto


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_classifiers_load_from_any_family(tmp_path: Path, family: str) -> None:
    folder = make_adaptive(tiny_models.make(family, tmp_path / family), tmp_path / "adaptive")
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for kind in ("SequenceClassification", "TokenClassification"):
        auto: Any = getattr(transformers, f"AutoModelFor{kind}")
        model: Any = auto.from_pretrained(folder, num_labels=5, pad_token_id=0).eval()
        assert type(model).__name__.startswith("Adaptive")
        assert type(model).__name__.endswith(f"For{kind}")
        model.save_pretrained(tmp_path / kind)
        again: Any = auto.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad(), model.set_select("top-k", k=2), again.set_select("top-k", k=2):
            with model.account() as account:
                got = model(ids, attention_mask=mask).logits
            assert torch.equal(again(ids, attention_mask=mask).logits, got)
        assert account.tokens == 6
        assert all(site.neurons < site.tokens * 64 for site in account.sites.values())
