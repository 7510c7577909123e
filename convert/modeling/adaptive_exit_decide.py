"""Which sequences of a decoding step leave at an exit.

Sources: CALM 2207.07061 (measures, thresholds that fall), PABEE 2006.04152 (patience).

Shapes: B sequences, R of them at an exit, V vocabulary, d hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive_exit_cache import ExitCache

#: measures that compare an exit with the one before it.
_COMPARING = ("state", "patience")


def leaving_of(runtime: Any) -> Mapping[str, Any] | None:
    """Return the rule by which tokens leave, None when none ever does.

    Args:
        runtime: of a model with exits.
    """
    asked = getattr(runtime, "leaving", None)
    if asked is not None:
        found: Mapping[str, Any] | None = asked()
        return found
    exits = runtime.exits
    rule = {**exits["decide"], "kv": exits["kv"]}
    patient = rule["measure"] == "patience" and rule["patience"] < len(exits["heads"])
    off = rule["measure"] != "patience" and all(t is None for t in rule["thresholds"])
    never = rule["measure"] == "patience" and not patient
    return None if off or never else rule


class Decision:
    """The decisions of one step.

    Args:
        model: adaptive, with exits.
        rule: {"measure", "thresholds", "decay", "patience"}.
        exits: where tokens are looked at.
        cache: says at which positions the tokens are.
    """

    def __init__(
        self, model: Any, rule: Mapping[str, Any], exits: tuple[int, ...], cache: ExitCache
    ) -> None:
        places = [head["at"] for head in model.adaptive_runtime.exits["heads"]]
        self._rule, self._heads = rule, model.adaptive_exits()
        self._orders = {at: places.index(at) for at in exits}
        self._cache = cache
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._agreed: dict[int, int] = {}

    @staticmethod
    def exits(model: Any, rule: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the exits a step has to look at."""
        places = [head["at"] for head in model.adaptive_runtime.exits["heads"]]
        if rule["measure"] == "patience":
            wanted = places
        else:
            taken = [i for i, t in enumerate(rule["thresholds"]) if t is not None]
            wanted = [places[i] for i in taken]
            if rule["measure"] in _COMPARING:
                wanted = places[: max(taken) + 1]
        return tuple(wanted)

    def leave(self, at: int, rows: list[int], logits: Tensor, state: Tensor) -> list[bool]:
        """Return which rows leave.

        Args:
            at: the exit.
            rows: their sequences.
            logits: [R, V].
            state: [R, d] what the exit's tail read.
        """
        order, rule = self._orders[at], self._rule
        before = [self._before.get(row) for row in rows]
        known = [i for i, found in enumerate(before) if found is not None]
        for i, row in enumerate(rows):
            self._before[row] = (logits[i], state[i])
        if rule["measure"] in _COMPARING and len(known) < len(rows):
            return [False] * len(rows)
        if rule["measure"] == "patience":
            last = torch.stack([found[0] for found in before if found is not None])
            return self._patient(order, rows, logits, last)
        if rule["thresholds"][order] is None:
            return [False] * len(rows)
        previous = None
        if rule["measure"] == "state":
            previous = torch.stack([found[1] for found in before if found is not None])
        sure = confidence(
            rule["measure"], logits, state=state, previous_state=previous, head=self._heads[at]
        )
        levels = [threshold_at(rule, order, self._position(row)) for row in rows]
        return [s > level for s, level in zip(sure.tolist(), levels, strict=True)]

    def _patient(self, order: int, rows: list[int], logits: Tensor, last: Tensor) -> list[bool]:
        level = self._rule["thresholds"][order]
        if level is None:
            agrees = logits.argmax(-1) == last.argmax(-1)
        else:
            agrees = similarity(logits, last) > level
        leaves = []
        for row, agreed in zip(rows, agrees.tolist(), strict=True):
            self._agreed[row] = self._agreed.get(row, 0) + 1 if agreed else 0
            leaves.append(self._agreed[row] >= self._rule["patience"])
        return leaves

    def _position(self, row: int) -> int:
        return self._cache.lengths[row] - self._cache.offsets[row]


def threshold_at(rule: Mapping[str, Any], order: int, position: int) -> float:
    """Return an exit's threshold at a position; it falls to nine tenths where a decay is given."""
    level, decay = float(rule["thresholds"][order]), rule["decay"]
    if decay is None:
        return level
    fall = math.exp(-float(decay["rate"]) * position / int(decay["length"]))
    return 0.9 * level + 0.1 * level * fall


def confidence(
    measure: str,
    logits: Tensor,
    *,
    state: Tensor,
    previous_state: Tensor | None,
    head: Any,
) -> Tensor:
    """Return how sure an exit is, [R].

    Args:
        measure: "difference", "max", "entropy", "state" or "classifier".
        logits: [R, V].
        state, previous_state: [R, d] of this exit and of the one before.
        head: the exit.
    """
    if measure == "state":
        assert previous_state is not None
        return functional.cosine_similarity(state.float(), previous_state.float(), dim=-1)
    if measure == "classifier":
        trust: Tensor = head.confidence(state)
        return trust.float().sigmoid()[..., 0]
    logs = logits.float().log_softmax(-1)
    if measure == "max":
        return logs.amax(-1).exp()
    if measure == "difference":
        best = logs.topk(2, dim=-1).values.exp()
        return best[..., 0] - best[..., 1]
    entropy: Tensor = torch.special.entr(logs.exp()).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def similarity(logits: Tensor, others: Tensor) -> Tensor:
    """Return 1 minus the Jensen-Shannon divergence of two choices, in bits, [R]."""
    first, second = logits.float().softmax(-1), others.float().softmax(-1)
    middle = torch.special.entr((first + second) / 2).sum(-1)
    apart: Tensor = middle - (torch.special.entr(first) + torch.special.entr(second)).sum(-1) / 2
    return 1 - apart / math.log(2)
