"""Drafts of a model's own first blocks change nothing but the number of passes."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from adaconvert.modeling.adaptive_checks import AdaptiveConfigError
from adaconvert.modeling.adaptive_drafting import Costs, DraftLength
from adaconvert.testing.exits_decoded import (
    BLOCKS,
    DECODERS,
    alone,
    model_with_exits,
    prompts,
)

GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speculate")


@pytest.fixture(scope="module")
def llama(root: Path) -> Any:
    return model_with_exits(root, "llama", [2, 3])


@pytest.fixture(scope="module")
def gemma(root: Path) -> Any:
    """Its drafts are nearly always accepted: tied, and the residual stream keeps its token."""
    return model_with_exits(root, "gemma", [2, 3])


def both(model: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """Return plain output and drafted output; nothing may fall back."""
    draft = {"draft_exit": 3, "draft_tokens": 4, "draft_schedule": "constant"}
    draft |= {k: options.pop(k) for k in list(options) if k.startswith("draft")}
    given = {**GREEDY, "return_dict_in_generate": True, **options}
    plain = model.generate(**batch, **given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return plain, model.generate(**batch, **draft, **given)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["norm", "full"])
def test_greedy_tokens_are_those_of_plain_decoding(root: Path, family: str, kind: str) -> None:
    kind = "layer" if kind == "full" and family == "mixtral" else kind
    model = model_with_exits(root, family, [2, 3], kind)
    for number, schedule in enumerate(["constant", "adaptive", "constant"]):
        batch = prompts([1, 3, 2][number], 7 + 3 * number, number)
        plain, drafted = both(
            model, batch, max_new_tokens=14, eos_token_id=None, draft_schedule=schedule
        )
        assert torch.equal(plain.sequences, drafted.sequences)


def test_many_prompts(llama: Any, gemma: Any) -> None:
    accepted = drafted = 0
    for seed in range(25):
        for model in (llama, gemma):
            batch = prompts(4, 6 + seed % 5, seed)
            plain, found = both(model, batch, max_new_tokens=10, eos_token_id=[2, 17, 40, 90])
            assert torch.equal(plain.sequences, found.sequences)
            accepted += found.draft["accepted"]
            drafted += found.draft["drafted"]
            assert found.draft["rounds"] > 0
    assert 0 < accepted < drafted


def test_a_batch_gives_what_each_prompt_gives_alone(llama: Any) -> None:
    batch = prompts(4, 9)
    options = {**GREEDY, "max_new_tokens": 12, "eos_token_id": None, "draft_exit": 2}
    found = llama.generate(**batch, **options)
    for row in range(4):
        single = llama.generate(**alone(batch, row), **options)
        assert torch.equal(single[0, -12:], found[row, -12:])


def test_sequences_end_inside_an_accepted_run(gemma: Any) -> None:
    batch = prompts(3, 8)
    free = gemma.generate(**batch, **GREEDY, max_new_tokens=12, eos_token_id=None)[:, 8:]
    for step in range(1, 8):
        ends = [int(free[0, step]), int(free[1, step + 1])]
        plain, found = both(gemma, batch, max_new_tokens=12, eos_token_id=ends)
        assert torch.equal(plain.sequences, found.sequences)
    assert found.draft["accepted"] > 0


@pytest.mark.parametrize("new", [1, 2, 3, 5])
def test_a_draft_is_cut_at_the_length_asked_for(gemma: Any, new: int) -> None:
    for rows in (1, 3):
        plain, found = both(gemma, prompts(rows, 8), max_new_tokens=new, eos_token_id=None)
        assert found.sequences.shape == (rows, 8 + new)
        assert torch.equal(plain.sequences, found.sequences)


class _Parity(LogitsProcessor):  # type: ignore[misc]
    """Forbids tokens of the parity that the row's number and length say."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        odd = (torch.arange(len(scores)) + input_ids.shape[1]) % 2
        return scores.masked_fill((torch.arange(scores.shape[1]) % 2)[None] == odd[:, None], -1e9)


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_processors_are_obeyed(llama: Any, rows: int) -> None:
    batch = prompts(rows, 8)
    for options in (
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 5, "eos_token_id": list(range(2, 160))},
        {"logits_processor": [_Parity()]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [10 + row, 20 + row, 30 + len(ids)]},
    ):
        plain, found = both(llama, batch, max_new_tokens=12, **{"eos_token_id": None, **options})
        assert torch.equal(plain.sequences, found.sequences)


class _After(StoppingCriteria):  # type: ignore[misc]
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] == self.token


def test_stopping_criteria_are_obeyed(gemma: Any) -> None:
    batch = prompts(1, 8)
    free = gemma.generate(**batch, **GREEDY, max_new_tokens=12, eos_token_id=None)[0, 8:]
    for step in (1, 4, 6):
        stops = StoppingCriteriaList([_After(int(free[step]))])
        plain, found = both(
            gemma, batch, max_new_tokens=12, eos_token_id=None, stopping_criteria=stops
        )
        assert torch.equal(plain.sequences, found.sequences)
        assert found.sequences.shape[1] <= 8 + step + 1


class _Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Any) -> None:
        self.tokens += value.reshape(-1).tolist()

    def end(self) -> None:
        self.ended = True


def test_streams_and_scores_of_one_sequence(gemma: Any) -> None:
    streamer = _Streamer()
    batch = prompts(1, 8)
    plain, found = both(
        gemma, batch, max_new_tokens=9, eos_token_id=None, output_scores=True, output_logits=True
    )
    assert len(found.scores) == len(found.logits) == 9
    for mine, theirs in zip(found.logits, plain.logits, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4)
    assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()
    gemma.generate(**batch, **GREEDY, max_new_tokens=9, draft_exit=2, streamer=streamer)
    assert streamer.ended
    assert streamer.tokens == found.sequences[0].tolist()


def test_blocks_below_the_exit_run_once_for_each_token(gemma: Any) -> None:
    seen: Counter[int] = Counter()
    hooks = [
        block.self_attn.register_forward_hook(
            lambda module, args, kwargs, output, index=index: seen.update(
                {index: kwargs["hidden_states"].shape[1] if kwargs else args[0].shape[1]}
            ),
            with_kwargs=True,
        )
        for index, block in enumerate(gemma.model.layers)
    ]
    found = gemma.generate(
        **prompts(1, 8),
        **GREEDY,
        max_new_tokens=13,
        eos_token_id=None,
        draft_exit=3,
        draft_tokens=4,
        draft_schedule="constant",
        return_dict_in_generate=True,
    )
    for hook in hooks:
        hook.remove()
    rejected = found.draft["drafted"] - found.draft["accepted"]
    # all but the last token have run, and what was rejected
    assert seen[0] == seen[BLOCKS - 1] == 8 + 12 + rejected


@pytest.mark.parametrize("reduced", [False, True])
def test_samples_have_the_distribution_of_plain_ones(root: Path, reduced: bool) -> None:
    model = model_with_exits(root, "llama", [2])
    if reduced:
        model.adaptive_exits()[2].draft_tokens = torch.arange(3, 60)
    batch = prompts(1, 6)
    rows = 600
    batch = {name: value.expand(rows, -1) for name, value in batch.items()}
    options = {"do_sample": True, "top_k": 5, "max_new_tokens": 3, "pad_token_id": 0}
    options |= {"eos_token_id": None, "temperature": 1.5}
    torch.manual_seed(1)
    plain = model.generate(**batch, **options)[:, 6:]
    torch.manual_seed(2)
    given = {"draft_exit": 2, "draft_tokens": 2, "draft_schedule": "constant"}
    found = model.generate(**batch, **given, **options)[:, 6:]
    for columns in ((0,), (1,), (2,), (0, 1)):
        one = Counter(map(tuple, plain[:, columns].tolist()))
        two = Counter(map(tuple, found[:, columns].tolist()))
        statistic, freedom = 0.0, -1
        for key in one.keys() | two.keys():
            if one[key] + two[key] >= 10:
                statistic += (one[key] - two[key]) ** 2 / (one[key] + two[key])
                freedom += 1
        assert statistic < _bound(max(freedom, 1)), columns


def _bound(freedom: int) -> float:
    """Return what chi-square exceeds once in ten thousand times (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3


def test_drafts_from_a_part_of_the_vocabulary(root: Path) -> None:
    for family in ("gemma2", "granite"):
        model = model_with_exits(root, family, [2, 3], "shared")
        model.adaptive_exits()[3].draft_tokens = torch.arange(2, 200)
        for rows in (1, 3):
            plain, found = both(model, prompts(rows, 8), max_new_tokens=12, eos_token_id=None)
            assert torch.equal(plain.sequences, found.sequences)


def test_an_unsure_draft_ends_early(llama: Any) -> None:
    options = {**GREEDY, "max_new_tokens": 12, "eos_token_id": None, "draft_exit": 2}
    options |= {"return_dict_in_generate": True, "draft_schedule": "constant"}
    sure = llama.generate(**prompts(1, 8), **options, draft_threshold=1.0)
    free = llama.generate(**prompts(1, 8), **options, draft_threshold=0.0)
    assert sure.draft["drafted"] == 0 < free.draft["drafted"]
    assert torch.equal(sure.sequences, free.sequences)


def test_rounds_are_as_long_as_pays() -> None:
    cheap = DraftLength(8, Costs(0.05, 0.01, 0.95), adaptive=True)
    dear = DraftLength(8, Costs(0.7, 0.3, 0.3), adaptive=True)
    for _ in range(30):
        cheap.saw([8], 8)
        dear.saw([0], 4)
    assert cheap.width() == 9
    assert Counter(dear.width() for _ in range(16)) == {1: 14, 2: 2}
    assert DraftLength(5, Costs(0.7, 0.3, 0.3), adaptive=False).width() == 6


def test_what_cannot_be_drafted_runs_as_usual(llama: Any) -> None:
    batch = prompts(2, 8)
    for options, reason in (
        ({"use_cache": False}, "the cache is off"),
        ({"num_beams": 2}, "beams"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "hidden_states"),
        ({"cache_implementation": "static"}, "StaticCache"),
    ):
        given: dict[str, Any] = {**GREEDY, "max_new_tokens": 4, "eos_token_id": None, **options}
        plain = llama.generate(**batch, **given)
        with pytest.warns(UserWarning, match=reason):
            found = llama.generate(**batch, **given, draft_exit=2)
        same = getattr(found, "sequences", found) == getattr(plain, "sequences", plain)
        assert same.all()


def test_what_means_nothing_is_refused(llama: Any) -> None:
    for options, reason in (
        ({"draft_exit": 1}, "exits are at"),
        ({"draft_exit": True}, "no draft is configured"),
        ({"draft_exit": 2, "draft_tokens": 0}, "tokens"),
        ({"draft_exit": 2, "draft_threshold": 1.5}, "threshold"),
        ({"draft_exit": 2, "draft_schedule": "heuristic"}, "draft_schedule"),
        ({"draft_tokens": 3}, "draft_exit"),
    ):
        with pytest.raises(AdaptiveConfigError, match=reason):
            llama.generate(**prompts(1, 5), max_new_tokens=2, **options)
