"""Tokens that leave early, against the whole model and against the model cut off at an exit."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from bench.exit_variants import blocks_of
from torch import Tensor

#: what all others are compared with.
WHOLE = "plain"


@dataclass(frozen=True)
class Way:
    """One way to generate.

    Attributes:
        threshold: of all exits, None where no token leaves.
        cut: blocks that run at all, those before an exit, None for all.
    """

    threshold: float | None = None
    cut: int | None = None

    @property
    def name(self) -> str:
        """Return what rows call it."""
        if self.cut is not None:
            return f"cut off at {self.cut}"
        return WHOLE if self.threshold is None else "leaving"


@dataclass
class Left:
    """What one generation gave.

    Attributes:
        tokens: the new ones.
        depths: blocks each of them ran, of the first one all.
        cpu, wall: seconds.
        forced: share of the whole model's tokens that it chooses, given those before.
    """

    tokens: list[int]
    depths: list[int]
    cpu: float
    wall: float
    forced: float = 1.0


def ways(model: Any, thresholds: Sequence[float]) -> list[Way]:
    """Return the whole model, thresholds, and the model cut off at every exit that can be."""
    heads = model.adaptive_exits()
    # stock caches have no place for a block of an exit
    cuts = [
        at for at, head in heads.items() if head.part("block") is None and at < blocks_of(model)
    ]
    return [Way(), *(Way(threshold=t) for t in thresholds), *(Way(cut=at) for at in sorted(cuts))]


@contextmanager
def taken(model: Any, way: Way) -> Iterator[None]:
    """Let the model compute a way in the body."""
    blocks = blocks_of(model)
    with model.set_exits(way.threshold):
        # as stock `assistant_early_exit` does: stock loops end there, with the exit's head
        model.config.num_hidden_layers = way.cut or blocks
        try:
            yield
        finally:
            model.config.num_hidden_layers = blocks


def generated(model: Any, way: Way, ids: Tensor, count: int) -> Left:
    """Generate `count` tokens behind ids [1, P]."""
    with taken(model, way):
        start, used = time.perf_counter(), time.process_time()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            return_dict_in_generate=True,
        )
        cpu, wall = time.process_time() - used, time.perf_counter() - start
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    found = getattr(output, "exit_layers", None)
    ran = way.cut or blocks_of(model)
    depths = [ran] * len(tokens) if found is None else found[0].tolist()
    return Left(tokens, depths, cpu, wall)


@torch.no_grad()
def forced(model: Any, way: Way, ids: Tensor, tokens: Sequence[int]) -> float:
    """Return in which share of places a way chooses the tokens given."""
    wanted = torch.tensor([list(tokens)])
    whole = torch.cat([ids, wanted[:, :-1]], dim=1)
    with taken(model, way):
        logits = model(whole, use_cache=False).logits[:, ids.shape[1] - 1 :]
    return float((logits.argmax(-1) == wanted).double().mean())


def in_turn(
    model: Any, all_ways: Sequence[Way], prompts: Sequence[Tensor], count: int
) -> list[list[Left]]:
    """Return what every way gave for every prompt; another one begins each time."""
    found: list[list[Left]] = [[] for _ in all_ways]
    for turn, ids in enumerate(prompts):
        start = turn % len(all_ways)
        for number in (*range(start, len(all_ways)), *range(start)):
            found[number].append(generated(model, all_ways[number], ids, count))
        for way, mine in zip(all_ways, found, strict=True):
            if way.name != WHOLE:
                mine[-1].forced = forced(model, way, ids, found[0][-1].tokens)
    return found


def depth(found: Sequence[Left]) -> float:
    """Return the mean blocks of a token, without those of prompts."""
    all_depths = [n for left in found for n in left.depths[1:]]
    return sum(all_depths) / max(len(all_depths), 1)


def equal_depth(model: Any, way: Way, found: Sequence[Left]) -> float:
    """Return how many blocks, with one head, are as many weights as a token read on average.

    What waits for exact keys and values runs later all the same, and is no part of it.
    """
    heads, exits = model.adaptive_exits(), model.adaptive_runtime.exits
    blocks = model.get_submodule(exits["blocks"])
    looked = [] if way.threshold is None else [at for at in heads if at < len(blocks)]
    whole = _size(model.get_submodule(exits["tail"]["head"]))
    block = _size(blocks[0])
    spent = []
    for left in found:
        for ran in left.depths[1:]:
            # the exit a token leaves at is among those looked at; the model's own head else
            seen = [at for at in looked if at <= ran]
            more = sum(_size(heads[at]) + _shared(heads[at], whole) for at in seen)
            more += 0 if ran in looked else whole
            spent.append(ran + (more - whole) / block)
    return sum(spent) / max(len(spent), 1)


def _shared(head: Any, whole: int) -> int:
    return whole if head.part("head") is None else 0


def agreement(found: Sequence[Left], whole: Sequence[Left]) -> float:
    """Return the share of places with the whole model's token, each going on from its own ones."""
    pairs = [
        pair
        for left, right in zip(found, whole, strict=True)
        for pair in zip(left.tokens, right.tokens, strict=True)
    ]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1)


def rival(way: Way, equal: float, all_ways: Sequence[Way]) -> int:
    """Return the place of the static model with as many blocks or the next more, where there is
    none with the most; -1 for no model cut off."""
    cuts = {n: other.cut for n, other in enumerate(all_ways) if other.cut is not None}
    if way.threshold is None or way.cut is not None or not cuts:
        return -1
    enough = [n for n, cut in cuts.items() if cut >= equal]
    if enough:
        return min(enough, key=lambda n: cuts[n])
    return max(cuts, key=lambda n: cuts[n])


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
