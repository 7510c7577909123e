"""Exits of models whose blocks choose experts, or hold routed adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.adapters_by_hand import make_adapted
from adaconvert.testing.adaptive_by_hand import make_adaptive
from adaconvert.testing.exits_by_hand import exits_of
from adaconvert.testing.exits_decoded import prompts
from adaconvert.testing.null_by_hand import make_nulled

BLOCKS, EXITS = 4, (1, 3)
TAIL = {"norm": "model.norm", "head": "lm_head"}
Get = Callable[..., Any]


def attach(folder: Path, family: str) -> Path:
    """Give a checkpoint exits whose norm and head differ a little from the model's."""
    config = json.loads((folder / "config.json").read_text())
    config["adaptive"]["model"]["exits"] = exits_of(family, EXITS)
    (folder / "config.json").write_text(json.dumps(config))
    files = sorted(folder.glob("*.safetensors"))
    tensors = {name: value for file in files for name, value in load_file(file).items()}
    generator = torch.Generator().manual_seed(2)
    for at in EXITS:
        for role, path in TAIL.items():
            value = tensors[f"{path}.weight"]
            noise = 1 + 0.02 * torch.randn(value.shape, generator=generator)
            tensors[f"exits.{at}.{role}.weight"] = (value * noise).to(value.dtype)
    for file in files:
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """Return what gives a model of a kind, without exits and with them."""
    root = tmp_path_factory.mktemp("composed")
    kinds = {
        "experts": ("llama", make_adaptive, {"select": {"rule": "dynamic-k", "tau": 0.6}}),
        "null": ("mixtral", make_nulled, {}),
        "adapters": ("llama", make_adapted, {"linears": ("q_proj", "up_proj", "down_proj")}),
    }

    def get(kind: str) -> tuple[Any, Any]:
        family, make, options = kinds[kind]
        dense = root / family
        if not dense.exists():
            tiny_models.make(family, dense, layers=BLOCKS, max_shard_size="1GB")
        number = len(list(root.iterdir()))
        plain = make(dense, root / f"{kind}-{number}", **options)
        with_exits = attach(make(dense, root / f"{kind}-{number}-exits", **options), family)
        return load_model(plain), load_model(with_exits)

    return get


KINDS = ["experts", "null", "adapters"]


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_leaves(made: Get, kind: str) -> None:
    plain, model = made(kind)
    batch = prompts(2, 9)
    with torch.no_grad():
        wanted = plain(**batch).logits
        assert torch.equal(model(**batch).logits, wanted)
        with model.set_exits(1.0, measure="max"):
            assert torch.equal(model(**batch).logits, wanted)


def level_of(model: Any, batch: dict[str, Any]) -> tuple[float, Any]:
    """Return a level half of the tokens are above at the first exit, and which they are."""
    with torch.no_grad():
        state = model.exit_states(**batch)[EXITS[0]]
        sure = model.exit_logits(EXITS[0], state).softmax(-1).amax(-1)
    ordered = sure[batch["attention_mask"].bool()].sort().values
    middle = len(ordered) // 2
    level = float(ordered[middle - 1 : middle + 1].mean())
    return level, sure > level


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("kind", KINDS)
def test_sites_count_the_tokens_that_reach_them(made: Get, kind: str, kv: str) -> None:
    _, model = made(kind)
    batch = prompts(2, 9)
    level, gone = level_of(model, batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), model.account() as whole:
        full = model(**batch)
    with torch.no_grad(), model.set_exits([level, None], measure="max", kv=kv):
        with model.account() as early:
            out = model(**batch)
        again = model(**batch)
    assert torch.equal((out.exit_layers == EXITS[0])[real], gone[real])
    # counting changes nothing
    torch.testing.assert_close(out.logits, again.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(out.exit_layers, again.exit_layers)
    if kv == "recompute":
        stay = real & ~gone
        torch.testing.assert_close(out.logits[stay], full.logits[stay], atol=1e-5, rtol=1e-5)
    left = int((gone & real).sum())
    assert 0 < left < int(real.sum())
    assert early.tokens == whole.tokens
    for path, site in early.sites.items():
        index = int(path.split("layers.")[1].split(".")[0])
        before = whole.sites[path].tokens
        assert site.tokens == (before if index < EXITS[0] else before - left)
        assert site.neurons <= whole.sites[path].neurons
    assert early.compute() < whole.compute()


def test_two_knobs_save_more_than_one(made: Get) -> None:
    _, model = made("experts")
    batch = prompts(2, 9)
    level, _ = level_of(model, batch)

    def ffn(levels: list[float | None] | None, experts: int) -> float:
        with (
            model.set_exits(levels, measure="max"),
            model.set_select("top-k", k=experts),
            torch.no_grad(),
            model.account() as account,
        ):
            model(**batch)
        return float(account.flops_per_token()["ffn"])

    assert ffn([0.0, None], 8) == ffn(None, 8) * EXITS[0] / BLOCKS
    assert ffn([0.0, None], 2) == ffn(None, 2) * EXITS[0] / BLOCKS == ffn(None, 8) / 16
    assert ffn([level, None], 2) < min(ffn([level, None], 8), ffn(None, 2))
