"""Keys and values at slots: passes through some blocks, of some rows, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.modeling.adaptive_exit_cache import ExitCache
from adaconvert.modeling.adaptive_exit_passes import Passes
from adaconvert.modeling.adaptive_stages import Stage
from adaconvert.modeling.loading import load_model
from adaconvert.testing.exits_decoded import BLOCKS, DECODERS, model_with_exits, prompts

CLOSE = 1e-5
PROMPT, NEW = 14, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


class Case:
    """A model, a padded prompt that has run, tokens behind it and the logits they should get."""

    def __init__(self, root: Path, family: str) -> None:
        self.model = model_with_exits(root, family, [2, 3], "layer")
        batch = prompts(3, PROMPT)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        self.more = prompts(3, NEW, 1)["input_ids"]
        later = positions[:, -1:] + 1 + torch.arange(NEW)
        stock: Any = load_model(root / family)
        self.expected = stock(
            input_ids=torch.cat([ids, self.more], 1),
            attention_mask=torch.cat([mask, torch.ones(3, NEW, dtype=mask.dtype)], 1),
            position_ids=torch.cat([positions, later], 1),
        ).logits[:, PROMPT:]
        self.cache = ExitCache()
        self.passes = Passes(self.model, self.cache, (2, 3))
        self.passes.prompt(input_ids=ids, attention_mask=mask, position_ids=positions)
        self.passes.begin(mask, positions)

    def run(self, stage: Stage, rows: list[int] | None, starts: list[int], ids: Any) -> Tensor:
        width = ids.shape[1] if ids is not None else stage.entering.shape[1]  # type: ignore[union-attr]
        places = self.cache.places(starts, width, rows)
        return self.passes.run(stage, places, ids=ids)

    def close(self, found: Tensor, expected: Tensor) -> None:
        assert (found - expected).abs().max() <= CLOSE * (1 + expected.abs().max())


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_blocks_that_run_later_give_what_one_pass_gives(root: Path, family: str) -> None:
    case = Case(root, family)
    assert case.cache.get_seq_length() == PROMPT
    found = []
    for step in range(4):
        stage = Stage(0, 2, exit=2)
        case.run(stage, None, [PROMPT + step] * 3, case.more[:, step : step + 1])
        found.append(stage.hidden)
    deep = Stage(2, BLOCKS, entering=torch.cat([h for h in found if h is not None], 1))
    case.close(case.run(deep, None, [PROMPT] * 3, None), case.expected[:, :4])
    some = case.run(Stage(0, BLOCKS), [2, 0], [PROMPT + 4] * 2, case.more[[2, 0], 4:6])
    case.close(some, case.expected[[2, 0], 4:6])


@torch.no_grad()
def test_what_is_written_again_replaces_what_was_there(root: Path) -> None:
    case = Case(root, "gemma3_text")
    wrong = torch.randint(3, 300, (3, 5))
    case.run(Stage(0, BLOCKS), None, [PROMPT] * 3, wrong)
    case.close(case.run(Stage(0, BLOCKS), None, [PROMPT] * 3, case.more), case.expected)


@torch.no_grad()
def test_rows_of_different_lengths_run_together(root: Path) -> None:
    case = Case(root, "llama")
    case.run(Stage(0, BLOCKS), [1], [PROMPT], case.more[[1], :2])
    ids = torch.stack([case.more[0, :3], case.more[1, 2:5], case.more[2, :3]])
    found = case.run(Stage(0, BLOCKS), None, [PROMPT, PROMPT + 2, PROMPT], ids)
    case.close(found[0], case.expected[0, :3])
    case.close(found[1], case.expected[1, 2:5])
    case.close(found[2], case.expected[2, :3])


@torch.no_grad()
def test_rows_move_repeat_and_lose_tokens(root: Path) -> None:
    case = Case(root, "llama")
    case.run(Stage(0, BLOCKS), None, [PROMPT] * 3, case.more[:, :2])
    case.cache.lengths = [PROMPT + 2] * 3
    case.cache.crop(-1)
    assert case.cache.get_seq_length() == PROMPT + 1
    case.cache.reorder_cache(torch.tensor([2, 2, 1]))
    order = [2, 2, 1]
    found = case.run(Stage(0, BLOCKS), None, [PROMPT + 1] * 3, case.more[order, 1:3])
    case.close(found, case.expected[order, 1:3])
    case.cache.batch_repeat_interleave(2)
    assert case.cache.batch == len(case.cache.lengths) == 6
    again = [2, 2, 2, 2, 1, 1]
    found = case.run(Stage(0, BLOCKS), None, [PROMPT + 3] * 6, case.more[again, 3:5])
    case.close(found, case.expected[again, 3:5])
    case.cache.reset()
    assert not case.cache.is_initialized
    assert case.cache.get_seq_length() == 0


@torch.no_grad()
def test_a_copy_for_stock_code_goes_on(root: Path) -> None:
    case = Case(root, "gemma2")
    case.run(Stage(0, BLOCKS), None, [PROMPT] * 3, case.more[:, :2])
    case.cache.lengths = [PROMPT + 2] * 3
    copied = case.cache.as_dynamic()
    mask = torch.cat([prompts(3, PROMPT)["attention_mask"], torch.ones(3, 3).long()], 1)
    found = case.model(
        input_ids=case.more[:, 2:3],
        attention_mask=mask,
        position_ids=mask.sum(1, keepdim=True) - 1,
        past_key_values=copied,
    ).logits
    case.close(found[:, 0], case.expected[:, 2])
    case.cache.lengths = [PROMPT, PROMPT + 1, PROMPT]
    assert case.cache.as_dynamic() is None
