"""What parts of decoding with drafts cost, and what they come to together.

A round that drafts W - 1 tokens runs W - 1 times the blocks below the exit and its head ("draft"),
once more these blocks alone ("fill"), and once the other blocks and the model's head over W
positions ("deep"). Where drafting ended early the last draft was run and thrown away: then there is
a draft more and no fill.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.exit_variants import PLAIN, Outcome, Shape, Variant, generated
from torch import Tensor

from adaconvert.modeling.adaptive_drafting import Costs, Draws
from adaconvert.modeling.adaptive_exit_cache import ExitCache
from adaconvert.modeling.adaptive_exit_passes import Passes, reduced_head
from adaconvert.modeling.adaptive_stages import Stage

#: positions of the deep pass that are measured.
WIDTHS = (1, 2, 3, 4, 6, 9)
#: most positions of a round in what is computed from costs.
WIDEST = 17
#: model -> blocks, weights of a block and of the head, in millions.
SIZES = {
    "SmolLM2-135M": (30, 3.54, 28.3),
    "SmolLM2-360M": (32, 9.83, 47.2),
    "SmolLM2-1.7B": (24, 67.1, 100.7),
    "Llama-3.2-1B": (16, 60.8, 262.7),
    "Llama-3.1-8B": (32, 218.1, 525.3),
}


@dataclass(frozen=True)
class Parts:
    """Seconds, or shares of a plain step.

    Attributes:
        first_plain, first: a generation of one token, plainly and with drafts.
        loop: each further token of plain generation.
        step: a round without drafts.
        draft, fill: see above.
        deep: positions -> the pass that checks them.
    """

    first_plain: float
    first: float
    loop: float
    step: float
    draft: float
    fill: float
    deep: Mapping[int, float]

    def checked(self, width: int) -> float:
        """Return the cost of the deep pass, between measured widths in a straight line."""
        known = sorted(self.deep)
        if width in self.deep or len(known) < 2:
            return self.deep[min(width, known[-1])]
        high = next((n for n in known if n > width), known[-1])
        low = known[known.index(high) - 1]
        slope = (self.deep[high] - self.deep[low]) / (high - low)
        return self.deep[low] + slope * (width - low)

    def round(self, shape: Shape) -> float:
        """Return the cost of a round of the shape."""
        width, checked = shape
        if width == 1:
            return self.step
        if checked < width:
            return checked * self.draft + self.checked(checked)
        return (width - 1) * self.draft + self.fill + self.checked(width)

    def ratio(self, outcome: Outcome) -> float:
        """Return how often as fast as plain generation one with drafts should be."""
        plain = self.first_plain + (len(outcome.tokens) - 1) * self.loop
        rounds = sum(times * self.round(shape) for shape, times in outcome.shapes.items())
        return plain / (self.first + rounds)

    def gain(self, chance: float) -> tuple[float, int]:
        """Return the best ratio in the long run where drafts are accepted with one probability, and
        the drafts per round that give it."""
        ratios = {
            width - 1: self.loop * expected(chance, width) / self.round((width, width))
            for width in range(2, WIDEST + 1)
        }
        best = max(ratios, key=lambda drafts: ratios[drafts])
        return ratios[best], best

    def break_even(self) -> float:
        """Return the least acceptance with which drafts pay, 1 where none does."""
        chances = (n / 1000 for n in range(1000))
        return next((chance for chance in chances if self.gain(chance)[0] > 1), 1.0)


def expected(chance: float, width: int) -> float:
    """Return the tokens of a round of W positions."""
    return sum(chance**n for n in range(width))


def of_weights(costs: Costs, per_position: float) -> Parts:
    """Return what weights alone say, in shares of a plain step."""
    deep = {n: costs.deep * (1 + per_position * (n - 1)) for n in (1, WIDEST)}
    whole, draft = costs.shallow + costs.deep, costs.shallow + costs.head
    return Parts(0.0, 0.0, whole, whole, draft, costs.shallow, deep)


def per_position(parts: Parts) -> float:
    """Return the share of a deep pass that each further position adds, by least squares."""
    found = [(width - 1, seconds / parts.deep[1] - 1) for width, seconds in parts.deep.items()]
    return sum(x * y for x, y in found) / max(sum(x * x for x, _ in found), 1)


def of_sizes(share: float, chance: float, added: float) -> list[tuple[str, float, float]]:
    """Return by weights (model, ratio at an acceptance, acceptance to break even), drafting after a
    share of the blocks with an output matrix of the exit's own, of the model's size."""
    found = []
    for name, (blocks, block, head) in SIZES.items():
        total = blocks * block + head
        shallow = round(share * blocks) * block
        costs = Costs(shallow / total, head / total, 1 - shallow / total)
        parts = of_weights(costs, added)
        found.append((name, parts.gain(chance)[0], parts.break_even()))
    return found


@torch.no_grad()
def measured(
    model: Any, variant: Variant, prompts: Sequence[Tensor], tokens: int, turns: int
) -> Parts:
    """Return the medians of CPU time over turns; the parts take turns.

    Args:
        model: adaptive, with exits.
        variant: of drafts.
        prompts: [1, P] each; passes run behind a prompt and half of what is generated from it.
        tokens: a generation has.
        turns: of each prompt.
    """
    times: dict[str, list[float]] = {}
    plain = Variant(PLAIN)
    more = min(tokens, 33)
    for ids in prompts:
        whole = generated(model, plain, ids, max(tokens // 2, 1))
        text = torch.cat([ids, torch.tensor([whole.tokens])], dim=1)
        calls = _calls(model, variant, text)
        for turn in range(turns + 1):
            spent = {name: _spent(call) for name, call in calls.items()}
            spent["first_plain"] = generated(model, plain, ids, 1).cpu
            spent["first"] = generated(model, variant, ids, 1).cpu
            if more > 1:
                several = generated(model, plain, ids, more).cpu
                spent["loop"] = (several - spent["first_plain"]) / (more - 1)
            # the first one warms up
            for name, seconds in spent.items() if turn else ():
                times.setdefault(name, []).append(seconds)
    middle = {name: statistics.median(found) for name, found in times.items()}
    deep = {int(name[4:]): middle.pop(name) for name in list(middle) if name.startswith("deep")}
    middle.setdefault("loop", middle["step"])
    return Parts(**middle, deep=deep)


def _spent(call: Callable[[], object]) -> float:
    used = time.process_time()
    # twice, as a short pass is near what the clock resolves
    call()
    call()
    return (time.process_time() - used) / 2


def _calls(model: Any, variant: Variant, text: Tensor) -> dict[str, Callable[[], object]]:
    """Return the passes behind a text, [1, n]."""
    at, cache = variant.at, ExitCache()
    passes = Passes(model, cache, (at,))
    passes.prompt(input_ids=text, use_cache=True, return_dict=True)
    passes.begin(None, None)
    start, vocab, token = cache.lengths[0], variant.vocab, text[:, -1:]
    reduced = None if vocab is None else reduced_head(model, at, vocab)
    states = torch.zeros(1, WIDTHS[-1], model.config.hidden_size, dtype=model.dtype)
    chosen = torch.zeros(1, WIDTHS[-1], dtype=torch.long)

    def draft() -> object:
        places, stage = cache.places([start], 1, None), Stage(0, at, exit=at)
        if reduced is None or vocab is None:
            logits = passes.run(stage, places, ids=token)
        else:
            few = reduced(passes.fill(stage, places, ids=token))
            size = model.config.get_text_config().vocab_size
            logits = few.new_full((*few.shape[:-1], size), torch.finfo(few.dtype).min)
            logits[..., vocab] = few
        states[:, :1] = stage.hidden
        return bool((Draws(logits, sampling=False).draft()[1] > 0).any())

    def fill() -> object:
        stage = Stage(0, at, wanted=passes.with_block)
        return passes.fill(stage, cache.places([start], 1, None), ids=token)

    def step() -> object:
        stage = Stage(0, passes.count, wanted=passes.with_block)
        logits = passes.run(stage, cache.places([start], 1, None), ids=token)
        return Draws(logits, sampling=False).settle(None, None)

    def deep(width: int) -> object:
        # a state that has occurred, at every position
        entering = states[:, :1].expand(-1, width, -1).contiguous()
        stage = Stage(at, passes.count, entering=entering)
        logits = passes.run(stage, cache.places([start], width, None))
        drafts = chosen[:, : width - 1] if width > 1 else None
        return Draws(logits, sampling=False).settle(drafts, None)

    calls: dict[str, Callable[[], object]] = {"step": step, "draft": draft, "fill": fill}
    for width in WIDTHS:
        calls[f"deep{width}"] = lambda width=width: deep(width)  # type: ignore[misc]
    return calls
