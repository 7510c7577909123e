"""Ways to generate greedily with a model that has exits: timed, counted, and tuned."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.candidate_generator import EarlyExitCandidateGenerator

from adaconvert.modeling.adaptive_drafting import DraftLength
from adaconvert.modeling.adaptive_speculate import Speculation

PLAIN = "plain"
STOCK = "stock assistant_early_exit"
OURS = "draft_exit"
#: (width that was asked for, positions that were checked) of a round.
Shape = tuple[int, int]


@dataclass(frozen=True)
class Settings:
    """How to draft.

    Attributes:
        tokens: drafts per round at most.
        threshold: of the probability below which drafting ends, 0 for never.
        schedule: "adaptive" or "constant" of ours; "constant" or "heuristic_transient" of stock.
    """

    tokens: int
    threshold: float
    schedule: str


@dataclass
class Outcome:
    """What one generation gave.

    Attributes:
        tokens: the new ones.
        cpu, wall: seconds.
        rounds, drafted, accepted: of drafts.
        missed: rounds with a draft that was wrong.
        shapes: how many rounds had which shape, of ours only.
    """

    tokens: list[int]
    cpu: float
    wall: float
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    missed: int = 0
    shapes: Counter[Shape] = field(default_factory=Counter)


@dataclass(frozen=True)
class Variant:
    """One way to generate.

    Attributes:
        kind: PLAIN, STOCK or OURS.
        at: exit, by the blocks before it; 0 of PLAIN.
        vocab: int64, tokens an exit of OURS chooses among, None for all.
        label: what to call the vocabulary.
        settings: None of PLAIN.
    """

    kind: str
    at: int = 0
    vocab: Tensor | None = None
    label: str = "full"
    settings: Settings | None = None

    def with_settings(self, settings: Settings) -> Variant:
        """Return the same way with other settings."""
        return Variant(self.kind, self.at, self.vocab, self.label, settings)


def only_greedy(model: Any) -> None:
    """Let a model generate greedily, as many tokens as it is asked for, and no token leave."""
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    model.set_exits(None)


def generated(model: Any, variant: Variant, ids: Tensor, count: int) -> Outcome:
    """Generate `count` tokens behind ids [1, P]."""
    given, settings = variant.settings, {"max_new_tokens": count}
    more: dict[str, Any] = {}
    found = Outcome([], 0.0, 0.0)
    if variant.kind == OURS:
        assert given is not None
        more = {
            "draft_exit": variant.at,
            "draft_tokens": given.tokens,
            "draft_threshold": given.threshold,
            "draft_schedule": given.schedule,
        }
    if variant.kind == STOCK:
        more = {"assistant_early_exit": variant.at}
    with _stock_settings(model, variant), vocabulary(model, variant), _counted(found):
        start, used = time.perf_counter(), time.process_time()
        sequences = model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **more)
        found.cpu = time.process_time() - used
        found.wall = time.perf_counter() - start
    found.tokens = sequences[0, ids.shape[1] :].tolist()
    return found


@contextmanager
def _stock_settings(model: Any, variant: Variant) -> Iterator[None]:
    """Set what stock code reads from the assistant's, here the model's own, configuration alone."""
    if variant.kind != STOCK:
        yield
        return
    given, config = variant.settings, model.generation_config
    assert given is not None
    before = {name: getattr(config, name) for name in _STOCK}
    values = (given.tokens, given.threshold, given.schedule)
    try:
        config.update(**dict(zip(_STOCK, values, strict=True)))
        yield
    finally:
        config.update(**before)
        # left behind when a draft fails
        model.config.num_hidden_layers = blocks_of(model)


_STOCK = (
    "num_assistant_tokens",
    "assistant_confidence_threshold",
    "num_assistant_tokens_schedule",
)


@contextmanager
def vocabulary(model: Any, variant: Variant) -> Iterator[None]:
    """Let the exit of a variant choose among the variant's tokens."""
    if variant.kind != OURS:
        yield
        return
    buffers = model.adaptive_exits()[variant.at]._buffers
    before = buffers.pop("draft_tokens", None)
    if variant.vocab is not None:
        buffers["draft_tokens"] = variant.vocab
    try:
        yield
    finally:
        buffers.pop("draft_tokens", None)
        if before is not None:
            buffers["draft_tokens"] = before


@contextmanager
def _counted(found: Outcome) -> Iterator[None]:
    """Count rounds and drafts of the generation in the body."""
    plain, checked = Speculation._plain, Speculation._checked
    run, saw = Speculation.run, DraftLength.saw
    drafted = EarlyExitCandidateGenerator.get_candidates
    settled = EarlyExitCandidateGenerator.update_candidate_strategy

    def one(self: Any) -> Any:
        found.shapes[1, 1] += 1
        return plain(self)

    def several(self: Any, width: int) -> Any:
        made = checked(self, width)
        found.shapes[width, made[0].shape[1]] += 1
        return made

    def ran(self: Any, kwargs: Any) -> Any:
        made = run(self, kwargs)
        found.rounds, found.drafted = self.count.rounds, self.count.drafted
        found.accepted = self.count.accepted
        return made

    def looked(self: Any, accepted: list[int], offered: int) -> None:
        found.missed += sum(n < offered for n in accepted)
        saw(self, accepted, offered)

    def candidates(self: Any, ids: Tensor, **kwargs: Any) -> Any:
        made = drafted(self, ids, **kwargs)
        found.rounds += 1
        found.drafted += made[0].shape[1] - ids.shape[1]
        return made

    def after(self: Any, ids: Tensor, scores: Tensor, matches: Any) -> Any:
        found.accepted += int(matches)
        found.missed += int(matches) < scores.shape[1] - 1
        return settled(self, ids, scores, matches)

    stock = EarlyExitCandidateGenerator
    with (
        mock.patch.multiple(Speculation, _plain=one, _checked=several, run=ran),
        mock.patch.object(DraftLength, "saw", looked),
        mock.patch.multiple(stock, get_candidates=candidates, update_candidate_strategy=after),
    ):
        yield


def blocks_of(model: Any) -> int:
    """Return L."""
    return len(model.get_submodule(model.adaptive_runtime.exits["blocks"]))


def grid(kind: str, lengths: Sequence[int], thresholds: Sequence[float]) -> list[Settings]:
    """Return the settings to choose among: every constant length, and schedules that begin with, or
    go up to, the two greatest."""
    schedule = "adaptive" if kind == OURS else "heuristic_transient"
    made = [Settings(n, t, "constant") for n in lengths for t in thresholds]
    return made + [Settings(n, t, schedule) for n in sorted(lengths)[-2:] for t in thresholds]


def tuned(
    model: Any, variant: Variant, choices: Sequence[Settings], prompts: Sequence[Tensor], count: int
) -> Settings:
    """Return the settings with the least CPU time over the prompts.

    The worse half is left out after every prompt, as long as three are left.
    """
    spent = dict.fromkeys(choices, 0.0)
    for ids in prompts:
        for settings in spent:
            spent[settings] += generated(model, variant.with_settings(settings), ids, count).cpu
        order = sorted(spent, key=lambda settings: spent[settings])
        spent = {settings: spent[settings] for settings in order[: max(3, (len(order) + 1) // 2)]}
    return min(spent, key=lambda settings: spent[settings])


def in_turn(
    model: Any, variants: Sequence[Variant], prompts: Sequence[Tensor], count: int
) -> list[list[Outcome]]:
    """Return what every variant gave for every prompt; another one begins each time."""
    found: list[list[Outcome]] = [[] for _ in variants]
    for turn, ids in enumerate(prompts):
        start = turn % len(variants)
        for number in (*range(start, len(variants)), *range(start)):
            found[number].append(generated(model, variants[number], ids, count))
    return found
