"""`calibrate` of masked language models: what is hidden, and the loss of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adaconvert import api
from adaconvert.data.text import documents_of
from adaconvert.data.tokens import token_blocks
from adaconvert.errors import DataError
from adaconvert.evaluate.masking import SHARE, hide
from adaconvert.evaluate.sweep import Measurer, given
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adaptive_by_hand import make_adaptive

MASK = "<|im_start|>"
OPTIONS: dict[str, Any] = {"length": 24, "max_tokens": None, "rules": ("top-k",)}
TEXTS = tuple(f"document {n}: few of {n * n} experts run " * (1 + n % 3) for n in range(60))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adaptive BERT whose tokenizer has a mask token."""
    folder = tmp_path_factory.mktemp("masked")
    dense = tiny_models.make("bert", folder / "dense", architecture="BertForMaskedLM")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        known = json.loads((dense / name).read_text())
        (dense / name).write_text(json.dumps({**known, "mask_token": MASK}))
    return make_adaptive(dense, folder / "adaptive", router="gate", experts=16)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_a_share_of_each_block_is_hidden_and_nothing_the_tokenizer_added(bert: Path) -> None:
    blocks = token_blocks(documents_of((*TEXTS, MASK * 3)), bert, length=24)
    hidden = hide(blocks, bert, seed=0)
    assert not (hidden.places & ~blocks.weights).any()
    own = blocks.weights.sum(axis=1)
    ours = np.array([blocks.document[n] < len(TEXTS) for n in range(len(blocks))])
    expected = np.maximum(1, np.round(SHARE * own))
    assert (hidden.places.sum(axis=1) == expected)[ours].all()
    # a text of nothing but marks has to be asked for something
    assert (hidden.places.sum(axis=1) >= 1).all()
    special = blocks.ids == hidden.token
    assert not (hidden.places & special)[ours].any()
    assert (hide(blocks, bert, seed=0).places == hidden.places).all()
    assert (hide(blocks, bert, seed=1).places != hidden.places).any()


def test_losses_are_those_of_the_hidden_tokens(bert: Path) -> None:
    blocks = token_blocks(documents_of(TEXTS[:6]), bert, length=24)
    hidden, model = hide(blocks, bert, seed=0), load_model(bert)
    everything = np.arange(len(blocks))
    assert not blocks.weights.all()
    alone, together = (
        Measurer(model, blocks, batch=n, hidden=hidden).measure(given("top-k", 5), everything)
        for n in (1, 4)
    )
    assert alone.loss == pytest.approx(together.loss, rel=2e-6)
    assert (alone.changed == together.changed).all()
    for at in everything:
        ids = torch.from_numpy(blocks.ids[at][blocks.weights[at]])[None]
        places = torch.from_numpy(hidden.places[at][blocks.weights[at]])[None]
        fed = torch.where(places, hidden.token, ids)
        with torch.no_grad():
            every = model(input_ids=fed).logits
            with model.set_select("top-k", k=5):
                few = model(input_ids=fed, labels=torch.where(places, ids, -100))
        assert alone.loss[at] == pytest.approx(float(few.loss), rel=2e-6)
        differs = (few.logits.argmax(-1) != every.argmax(-1))[places]
        assert alone.changed[at] == pytest.approx(float(differs.float().mean()))


def test_it_is_calibrated_like_any_other(bert: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = api.calibrate(bert, text, destination=out, max_loss_increase=0.3, **OPTIONS)
    assert said.chosen is not None
    assert said.rows[said.chosen].guaranteed
    assert said.rows[said.chosen].compute < 1
    assert any("15 % of the tokens, hidden from the model" in note for note in said.notes)
    found = json.loads((out / "config.json").read_text())["adaptive"]
    for slots in found["sites"].values():
        assert slots["ffn"]["select"]["rule"] == "top-k"
    model: Any = load_model(out)
    with model.set_compute(said.rows[said.chosen].compute):
        pass


def test_a_tokenizer_without_mask_token_is_refused(bert: Path, text: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(bert, tmp_path / "source"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        known = json.loads((source / name).read_text())
        known.pop("mask_token")
        (source / name).write_text(json.dumps(known))
    with pytest.raises(DataError, match="source: the tokenizer has no mask token"):
        api.calibrate(source, text, destination=tmp_path / "out", budget=0.9, **OPTIONS)
    assert not (tmp_path / "out").exists()
