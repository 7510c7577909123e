"""Tokens per second, measured in turns so that a busy machine slows all variants alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from statistics import median
from typing import TYPE_CHECKING, Any

from adaconvert.evaluate.perplexity import Variant
from adaconvert.progress import bar

if TYPE_CHECKING:
    from torch import Tensor

ROUNDS = 3
#: one measurement stops after the run in which this many seconds are over.
SECONDS = 2.0
PROMPT, DECODED = 64, 64
_LEAST_DECODED = 4
#: whole passes of one measurement.
_PASSES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """Tokens per second over the rounds.

    Attributes:
        median, low, high: of the rounds.
    """

    median: float
    low: float
    high: float

    @staticmethod
    def of(rates: Sequence[float]) -> Rate:
        """Return the summary of one rate a round."""
        return Rate(median=median(rates), low=min(rates), high=max(rates))

    def to_json(self) -> dict[str, float]:
        """Return the numbers by name."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Tokens per second of one variant.

    Attributes:
        prefill: one block of text in one pass.
        decode: token after token of one sequence with a cache; None where there is no cache.
        prefill_tokens, decode_tokens: tokens of one measurement; the latter at most.
    """

    prefill: Rate
    decode: Rate | None
    prefill_tokens: int
    decode_tokens: int

    def to_json(self) -> dict[str, object]:
        """Return the speed by name."""
        return {
            "prefill_tokens_per_second": self.prefill.to_json(),
            "decode_tokens_per_second": self.decode.to_json() if self.decode else None,
            "prefill_tokens": self.prefill_tokens,
            "decode_tokens": self.decode_tokens,
        }


def measure(
    variants: Sequence[Variant],
    ids: Sequence[int],
    *,
    pixels: Tensor | None = None,
    decode: bool = True,
    rounds: int = ROUNDS,
    progress: bool = False,
) -> list[Speed]:
    """Return the speed of every variant; a round of warm-up is not counted.

    Args:
        variants: measured in turn, in every second round the other way round.
        ids: tokens of one block; decoding is fed them too, so that all variants do the same.
        pixels: an image of as many positions as `ids` has, [1, C, H, W], to run on instead.
        decode: the models decode with a cache.
        rounds: measurements of each variant.
        progress: show a progress bar on a terminal.
    """
    import torch

    prompt = max(1, min(PROMPT, len(ids) // 2))
    steps = min(DECODED, len(ids) - prompt)
    can_decode = decode and steps >= _LEAST_DECODED
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in variants]
    with (
        torch.inference_mode(),
        bar((rounds + 1) * len(variants), "speed", "runs", enabled=progress) as shown,
    ):
        for turn in range(rounds + 1):
            for index in _turns(len(variants), turn):
                variant = variants[index]
                with variant.setting.applied(variant.model):
                    prefill = _prefill(variant.model, ids, pixels)
                    decoded = _decode(variant.model, ids, prompt, steps) if can_decode else 0.0
                shown.update()
                if turn:
                    found[index][0].append(prefill)
                    found[index][1].append(decoded)
    return [
        Speed(
            prefill=Rate.of(prefills),
            decode=Rate.of(decodes) if can_decode else None,
            prefill_tokens=len(ids),
            decode_tokens=steps if can_decode else 0,
        )
        for prefills, decodes in found
    ]


def _turns(count: int, turn: int) -> list[int]:
    return list(range(count))[:: -1 if turn % 2 else 1]


def _prefill(model: Any, ids: Sequence[int], pixels: Tensor | None) -> float:
    """Return the tokens per second of whole passes over `ids`, as the start of generating."""
    if pixels is not None:
        image = pixels.to(model.device)
        return _rate(model, lambda: model(pixel_values=image), len(ids), _PASSES)
    given = _tensor(model, ids)
    # generation needs the logits of the last token alone
    last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return _rate(model, lambda: model(input_ids=given, **last), len(ids), _PASSES)


def _decode(model: Any, ids: Sequence[int], prompt: int, steps: int) -> float:
    """Return the tokens per second after a prompt, one token a pass."""
    out = model(input_ids=_tensor(model, ids[:prompt]), use_cache=True)
    state = [out.past_key_values]
    following = iter(ids[prompt : prompt + steps])

    def step() -> None:
        given = _tensor(model, [next(following)])
        state[0] = model(input_ids=given, past_key_values=state[0], use_cache=True).past_key_values

    return _rate(model, step, 1, steps)


def _rate(model: Any, run: Callable[[], object], tokens: int, at_most: int) -> float:
    """Return tokens per second of up to `at_most` runs of `tokens` tokens each."""
    _settle(model)
    began = time.perf_counter()
    done, elapsed = 0, 0.0
    while not done or (done < at_most and elapsed < SECONDS):
        run()
        _settle(model)
        done += 1
        elapsed = time.perf_counter() - began
    return done * tokens / max(elapsed, 1e-9)


def _tensor(model: Any, ids: Sequence[int]) -> Tensor:
    import torch

    return torch.tensor([list(ids)], dtype=torch.int64, device=model.device)


def _settle(model: Any) -> None:
    """Return once an accelerator has done what it was given."""
    import torch

    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
