"""Keys and values of a frozen state: one pass gives those of a pass for each block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert.modeling.adaptive_exit_decode import Leaver
from adaconvert.modeling.adaptive_exit_passes import Passes
from adaconvert.modeling.adaptive_stages import Stage
from adaconvert.testing.exits_decoded import model_with_exits, prompts

RULE = {"measure": "max", "thresholds": [0.004] * 2, "decay": None, "patience": None}
OPTIONS: dict[str, Any] = {
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "max_new_tokens": 12,
    "return_dict_in_generate": True,
    "output_logits": True,
}


def block_by_block(self: Any, at: int, rows: list[int]) -> None:
    """Do what `Leaver._propagate` does in as many passes as there are blocks."""
    cache = self.cache
    places = cache.places([cache.lengths[row] for row in rows], 1, rows)
    states = cache.held[at][rows, :1]
    for block in range(at, self.passes.count):
        with cache.keys_only():
            self.passes.fill(Stage(block, block + 1, entering=states), places)
    for row in rows:
        cache.waiting[at][row] = 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "mixtral", "olmo2"])
def test_one_pass_is_as_many_as_blocks(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_with_exits(tmp_path, family, [1, 3], decide=RULE, kv="propagate")
    ran: list[int] = []
    fill = Passes.fill
    monkeypatch.setattr(Passes, "fill", lambda *a, **k: (ran.append(1), fill(*a, **k))[1])
    networks = [block.mlp for block in model.base_model.get_submodule(_blocks(model))]
    seen: list[int] = []
    hooks = [m.register_forward_hook(lambda *_: seen.append(1)) for m in networks[3:]]
    found = model.generate(**prompts(3, 8), **OPTIONS)
    once, deep = len(ran), len(seen)
    for hook in hooks:
        hook.remove()
    monkeypatch.setattr(Leaver, "_propagate", block_by_block)
    ran.clear()
    wanted = model.generate(**prompts(3, 8), **OPTIONS)
    left = int((found.exit_layers < 4).sum())
    assert 0 < once <= left
    assert len(ran) > once
    # the last network runs for the prompt and for tokens that went there
    assert deep <= 1 + int((found.exit_layers[:, 1:] == 4).any(0).sum())
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.equal(found.exit_layers, wanted.exit_layers)
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert torch.equal(one, other)


def _blocks(model: Any) -> str:
    path: str = model.adaptive_runtime.exits["blocks"]
    return path.removeprefix(f"{model.base_model_prefix}.")
