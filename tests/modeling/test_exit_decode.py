"""Tokens that leave early: what they give is what the long way gives."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from adaconvert.modeling import adaptive_exit_decode
from adaconvert.modeling.adaptive_exit_cache import ExitCache
from adaconvert.modeling.adaptive_exit_decide import confidence
from adaconvert.modeling.adaptive_exit_passes import Passes
from adaconvert.modeling.adaptive_stages import Stage
from adaconvert.modeling.loading import load_model
from adaconvert.testing.exits_decoded import (
    BLOCKS,
    DECODERS,
    alone,
    model_with_exits,
    prompts,
    teacher_forced,
)

CLOSE = 1e-4
PLACES = (1, 2, 3)
LEVELS = (0.12, 0.08, 0.03)
GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
WHOLE = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("leaving")


def rule(
    levels: Sequence[float | None] = LEVELS, measure: str = "difference", **more: Any
) -> dict[str, Any]:
    return {"measure": measure, "thresholds": list(levels), "decay": None, "patience": None, **more}


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
    """Return what is generated; nothing may fall back."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return model.generate(**batch, **options)


def expected(
    logits: dict[int, Tensor], levels: Sequence[float | None] = LEVELS
) -> tuple[Tensor, Tensor]:
    """Return logits and depths of the reference: all blocks run, the first sure exit is taken."""
    chosen = logits[BLOCKS].clone()
    depths = torch.full(chosen.shape[:2], BLOCKS)
    for at, level in reversed(list(zip(PLACES, levels, strict=True))):
        if level is not None:
            state = chosen.new_zeros(1)
            sure = confidence("difference", logits[at], state=state, previous_state=None, head=None)
            taken = sure > level
            taken[:, 0] = False
            chosen[taken], depths[taken] = logits[at][taken], at
    return chosen, depths


def check(model: Any, batch: dict[str, Tensor], new: int = 24) -> Tensor:
    found = generated(model, batch, max_new_tokens=new, **WHOLE)
    prompt = batch["input_ids"].shape[1]
    logits = teacher_forced(model, found.sequences, batch["attention_mask"], prompt)
    chosen, depths = expected(logits)
    assert torch.equal(found.exit_layers, depths)
    assert (torch.stack(found.logits, 1) - chosen).abs().max() <= CLOSE * (1 + chosen.abs().max())
    assert torch.equal(found.sequences[:, prompt:], torch.stack(found.logits, 1).argmax(-1))
    return depths


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["norm", "layer"])
def test_tokens_are_those_of_a_teacher_forced_pass(root: Path, family: str, kind: str) -> None:
    model = model_with_exits(root, family, PLACES, kind, decide=rule())
    for rows in (1, 3):
        check(model, prompts(rows, 9, rows))


def test_exits_are_taken_and_not_taken(root: Path) -> None:
    found = set()
    for family in ("llama", "gpt2", "smollm3"):
        model = model_with_exits(root, family, PLACES, decide=rule())
        found |= set(check(model, prompts(4, 9)).flatten().tolist())
    assert found == {1, 2, 3, 4}


def test_a_batch_gives_what_each_prompt_gives_alone(root: Path) -> None:
    model = model_with_exits(root, "smollm3", PLACES, decide=rule())
    batch = prompts(4, 9)
    found = generated(model, batch, max_new_tokens=16, **WHOLE)
    for row in range(4):
        single = generated(model, alone(batch, row), max_new_tokens=16, **WHOLE)
        assert torch.equal(single.sequences[0, -16:], found.sequences[row, -16:])
        assert torch.equal(single.exit_layers[0], found.exit_layers[row])


def test_rows_that_ended_have_no_depth(root: Path) -> None:
    model = model_with_exits(root, "smollm3", PLACES, decide=rule())
    batch = prompts(3, 9)
    free = generated(model, batch, max_new_tokens=10, **WHOLE).sequences
    ended = generated(
        model, batch, max_new_tokens=10, **{**WHOLE, "eos_token_id": int(free[1, 12])}
    )
    row = ended.sequences[1, 9:].tolist()
    end = row.index(int(free[1, 12]))
    assert (ended.exit_layers[1, : end + 1] > 0).all()
    assert (ended.exit_layers[1, end + 1 :] == 0).all()


def test_no_thresholds_are_plain_generation(root: Path) -> None:
    batch = prompts(3, 9)
    off = model_with_exits(root, "llama", PLACES, decide=rule([None] * 3))
    one = off.generate(**batch, max_new_tokens=12, **WHOLE)
    assert not hasattr(one, "exit_layers")
    stock = load_model(root / "llama").generate(**batch, max_new_tokens=12, **WHOLE)
    assert all(torch.equal(a, b) for a, b in zip(one.logits, stock.logits, strict=True))


def test_what_never_leaves_runs_all_blocks(root: Path) -> None:
    batch = prompts(3, 9)
    model = model_with_exits(root, "llama", PLACES, decide=rule([1.0] * 3))
    found = generated(model, batch, max_new_tokens=12, **WHOLE)
    assert (found.exit_layers == BLOCKS).all()


def test_full_stacks_of_waiting_states_are_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive_exit_decode, "MAX_PENDING", 3)
    model = model_with_exits(root, "gemma", PLACES, decide=rule())
    most: list[int] = []
    hold = ExitCache.hold

    def held(cache: ExitCache, *args: Any) -> None:
        hold(cache, *args)
        most.extend(n for counts in cache.waiting.values() for n in counts)

    monkeypatch.setattr(ExitCache, "hold", held)
    check(model, prompts(3, 9))
    assert 3 <= max(most) <= 6


def test_stacks_empty_out_in_segments(root: Path) -> None:
    """A row that waits in front of a segment takes what waits in front of the next along."""
    model = model_with_exits(root, "gpt2", PLACES, decide=rule())
    check(model, prompts(5, 9, 3), new=40)


@pytest.mark.parametrize("measure", ["max", "entropy", "state", "classifier", "patience"])
def test_every_measure_decides_as_it_does_for_one_prompt(root: Path, measure: str) -> None:
    levels: Any = {"state": [0.2] * 3, "classifier": [0.5] * 3, "patience": [None] * 3}
    decide = rule(levels.get(measure, [0.05] * 3), measure)
    decide["patience"] = 1 if measure == "patience" else None
    asked = measure == "classifier"
    model = model_with_exits(root, "smollm3", PLACES, decide=decide, confidence=asked)
    batch = prompts(3, 9)
    found = generated(model, batch, max_new_tokens=12, **WHOLE)
    assert len(set(found.exit_layers.flatten().tolist())) > 1
    for row in range(3):
        single = generated(model, alone(batch, row), max_new_tokens=12, **WHOLE)
        assert torch.equal(single.exit_layers[0], found.exit_layers[row])


def test_thresholds_fall_with_the_position(root: Path) -> None:
    fixed = model_with_exits(root, "smollm3", PLACES, decide=rule([0.3] * 3))
    decay = {"rate": 1000.0, "length": 1}
    falling = model_with_exits(root, "smollm3", PLACES, decide=rule([0.3 / 0.9] * 3, decay=decay))
    one, two = (generated(m, prompts(2, 9), max_new_tokens=12, **WHOLE) for m in (fixed, falling))
    assert torch.equal(one.exit_layers, two.exit_layers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "phi3", "mixtral"])
@torch.no_grad()
def test_frozen_states_give_keys_and_values(root: Path, family: str) -> None:
    model = model_with_exits(root, family, [1], kv="propagate", decide=rule([0.1]))
    batch = prompts(1, 9)
    found = generated(model, batch, max_new_tokens=12, **WHOLE)
    cache = ExitCache()
    passes = Passes(model, cache, ())
    passes.prompt(input_ids=batch["input_ids"])
    passes.begin(None, None)
    for step in range(11):
        places = cache.places([9 + step], 1, None)
        stage = Stage(0, 1, exit=1)
        logits = passes.run(stage, places, ids=found.sequences[:, 9 + step : 10 + step])
        frozen = found.exit_layers[0, step + 1] == 1
        state = stage.hidden
        for block in range(1, BLOCKS):
            one = Stage(block, block + 1, entering=state)
            deep = passes.run(one, places) if block == BLOCKS - 1 else passes.fill(one, places)
            state = state if frozen else one.hidden
        wanted = (logits if frozen else deep)[:, -1]
        assert (found.logits[step + 1] - wanted).abs().max() <= CLOSE * (1 + wanted.abs().max())
    assert set(found.exit_layers[0].tolist()) <= {1, BLOCKS}


def test_propagation_batches_and_takes_fewer_blocks(root: Path) -> None:
    model = model_with_exits(root, "gpt2", PLACES, kv="propagate", decide=rule())
    batch = prompts(3, 9)
    found = generated(model, batch, max_new_tokens=12, **WHOLE)
    for row in range(3):
        single = generated(model, alone(batch, row), max_new_tokens=12, **WHOLE)
        assert torch.equal(single.exit_layers[0], found.exit_layers[row])
        assert torch.equal(single.sequences[0, -12:], found.sequences[row, -12:])
    ran: list[int] = []
    hooks = [b.mlp.register_forward_hook(lambda *a: ran.append(1)) for b in model.transformer.h]
    generated(model, alone(batch, 0), max_new_tokens=12, **WHOLE)
    for hook in hooks:
        hook.remove()
    assert len(ran) == int(found.exit_layers[0].sum())


def test_skipped_blocks_do_not_run(root: Path) -> None:
    model = model_with_exits(root, "gemma", [1], decide=rule([0.0]))
    ran: list[int] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *a: None)
    hook.remove()
    hook = model.model.layers[-1].mlp.register_forward_hook(lambda *a: ran.append(a[1][0].shape[1]))
    found = generated(model, alone(prompts(1, 9), 0), max_new_tokens=12, **WHOLE)
    hook.remove()
    assert found.exit_layers[0].tolist() == [BLOCKS] + [1] * 11
    assert ran == [9]


@pytest.mark.parametrize("kv", ["recompute", "propagate"])
def test_beams_and_samples_go_through(root: Path, kv: str) -> None:
    model = model_with_exits(root, "smollm3", PLACES, decide=rule([1.0] * 3), kv=kv)
    batch = prompts(3, 9)
    plain = model_with_exits(root, "smollm3", PLACES)
    beams = {**GREEDY, "num_beams": 3, "max_new_tokens": 8}
    assert torch.equal(generated(model, batch, **beams), plain.generate(**batch, **beams))
    leaving = model_with_exits(root, "smollm3", PLACES, decide=rule(), kv=kv)
    together = generated(leaving, batch, **beams)
    for row in range(3):
        single = generated(leaving, alone(batch, row), **beams)
        assert torch.equal(single[0, -8:], together[row, -8:])
    options = {"do_sample": True, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    several = generated(leaving, batch, num_return_sequences=2, **options)
    assert several.shape == (6, 15)


def test_what_cannot_leave_runs_all_blocks(root: Path) -> None:
    model = model_with_exits(root, "smollm3", PLACES, decide=rule())
    plain = model_with_exits(root, "smollm3", PLACES)
    batch = prompts(2, 9)
    for options, reason in (
        ({"use_cache": False}, "the cache is off"),
        ({"cache_implementation": "static"}, "StaticCache"),
    ):
        given: dict[str, Any] = {**GREEDY, "max_new_tokens": 4, **options}
        with pytest.warns(UserWarning, match=reason):
            found = model.generate(**batch, **given)
        assert torch.equal(found, plain.generate(**batch, **given))


def test_chunks_of_a_prompt_and_drafts(root: Path) -> None:
    model = model_with_exits(root, "smollm3", PLACES, decide=rule())
    plain = model_with_exits(root, "smollm3", PLACES)
    batch = prompts(2, 9)
    given = {**GREEDY, "max_new_tokens": 10}
    whole = generated(model, batch, **given)
    assert torch.equal(whole, generated(model, batch, prefill_chunk_size=4, **given))
    # drafts are for what all blocks give
    drafted = generated(model, batch, draft_exit=2, **given)
    assert torch.equal(drafted, plain.generate(**batch, **given))


def test_an_account_counts_what_tokens_ran(root: Path) -> None:
    batch = prompts(3, 9)
    plain = model_with_exits(root, "gemma", PLACES)
    model = model_with_exits(root, "gemma", PLACES, decide=rule())
    with plain.account() as whole:
        plain.generate(**batch, max_new_tokens=12, **GREEDY)
    with model.account() as less:
        found = generated(model, batch, max_new_tokens=12, **WHOLE)
    assert less.tokens == whole.tokens
    assert less.attention_flops == whole.attention_flops
    assert whole.skipped_flops == whole.exit_flops == 0
    assert (found.exit_layers < BLOCKS).any()
    assert less.skipped_flops > 0
    assert less.exit_flops > 0
    assert less.flops_per_token()["total"] != whole.flops_per_token()["total"]


@pytest.mark.parametrize("family", ["smollm3", "gpt2", "gemma2"])
@pytest.mark.parametrize("kv", ["recompute", "propagate"])
@pytest.mark.parametrize("measure", ["difference", "patience"])
@torch.no_grad()
def test_a_pass_behind_the_prompt_gives_the_same(
    root: Path, family: str, kv: str, measure: str
) -> None:
    decide = rule([None] * 3, measure, patience=1) if measure == "patience" else rule()
    model = model_with_exits(root, family, PLACES, decide=decide, kv=kv)
    batch = prompts(3, 9)
    found = generated(model, batch, max_new_tokens=14, **WHOLE)
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 13).long()], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = DynamicCache()
    model.adaptive_runtime.leave = {}
    model(**batch, position_ids=positions[:, :9], past_key_values=cache)
    model.adaptive_runtime.leave = None
    passed = model(
        input_ids=found.sequences[:, 9:-1],
        attention_mask=mask,
        position_ids=positions[:, 9:],
        past_key_values=cache,
    )
    assert torch.equal(passed.exit_layers, found.exit_layers[:, 1:])
    wanted = torch.stack(found.logits[1:], 1)
    assert (passed.logits - wanted).abs().max() <= CLOSE * (1 + wanted.abs().max())
