"""What early exits save and lose: fractions of a reference, and losses of mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_decoded import BLOCKS, model_with_exits, prompts

NEVER = {"measure": "max", "thresholds": [1.0, None], "decay": None, "patience": None}


def converted(folder: Path, family: str) -> Any:
    """Return a model with exits whose reference is that of a model of its size."""
    dense = tiny_models.make(family, folder / "dense", layers=BLOCKS, max_shard_size="1GB")
    api.convert(
        dense, destination=folder / "exits", method="early-exit", exits="1,3", head="affine"
    )
    return load_model(folder / "exits")


def ids(length: int) -> torch.Tensor:
    return torch.randint(5, 60, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@torch.no_grad()
def test_a_fraction_of_the_reference_does_not_depend_on_the_length(
    tmp_path: Path, family: str
) -> None:
    model = converted(tmp_path, family)
    found = []
    for length in (4, 40):
        with model.account() as whole:
            model(input_ids=ids(length))
        assert whole.compute() == 1.0
        with model.set_exits([0.0, None]), model.account() as early:
            model(input_ids=ids(length))
        found.append(early.compute())
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    reference = model.config.adaptive["reference"]["flops_per_token"]
    config = model.config
    head = 2 * config.vocab_size * config.hidden_size
    # what all blocks cost is the rest of the reference, and one of four runs
    wanted = head + 2 * config.hidden_size**2 + (reference - head) / BLOCKS
    if family == "llama":
        assert found[0] * reference == pytest.approx(wanted, abs=1)
    assert found[0] > head / reference


@torch.no_grad()
def test_no_text_is_so_long_that_leaving_saves_more_than_there_is(tmp_path: Path) -> None:
    model = converted(tmp_path, "llama")
    with model.set_exits([0.0, None]), model.account() as early:
        model(input_ids=torch.randint(5, 60, (1, 3000)), use_cache=False, logits_to_keep=1)
    flops = early.flops_per_token()
    assert 0 < early.compute() < 1
    assert flops["total"] > 0


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@torch.no_grad()
def test_the_loss_of_a_mixture_that_balances_is_the_stock_one(tmp_path: Path, kv: str) -> None:
    model = model_with_exits(tmp_path, "mixtral", (1, 3), decide=NEVER, kv=kv)
    model.router_aux_loss_coef = 0.7
    batch = prompts(1, 9)
    given = {**batch, "labels": batch["input_ids"], "output_router_logits": True}
    found = model(**given)
    with model.set_exits(None):
        stock = model(**given)
    assert bool((found.exit_layers == BLOCKS).all())
    assert torch.equal(found.loss, stock.loss)
    assert torch.equal(found.aux_loss, stock.aux_loss)
    plain = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(found.loss, plain.loss + 0.7 * found.aux_loss)
    with model.set_exits(0.0):
        left = model(**given)
        without = model(**batch, labels=batch["input_ids"])
    torch.testing.assert_close(left.loss, without.loss + 0.7 * left.aux_loss)
