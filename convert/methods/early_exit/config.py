"""The options of `early-exit`, checked before anything is opened.

Letters: L blocks, k blocks in front of an exit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from adaconvert.arch.exits import KINDS
from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, nearest, option
from adaconvert.modeling.adaptive_exit_schema import KV, MEASURES

SHARED = "shared"
#: heads whose output matrix may stay the model's; the first two never have one of their own.
UNTIED = ("norm", "mlp", "layer", "full")
#: tokens a draft guesses where neither options nor data say: what LayerSkip's own examples use.
DRAFT_TOKENS = 6
#: probability at which a draft stops, the default of transformers.
DRAFT_THRESHOLD = 0.4
#: how fast thresholds fall with the position: CALM's own (t5x `calm`, tau).
DECAY_RATE = 4.0
#: options that only checkpoints the adaptive runtime loads can hold.
_OF_ADAPTIVE = (
    *("threshold", "patience", "decay_length", "draft_vocab", "confidence", "adaptive"),
)
_COUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmM]?)\s*", re.ASCII)
_UNITS = {"": 1, "k": 1000, "m": 1000_000}


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyExitOptions:
    """What `early-exit` does.

    Attributes:
        exits: where: how many blocks have run, such as "8,16"; 1 to L - 1.
        every: instead, "L/8" for exits after every eighth of the blocks, or "4" for every four;
            none after the last block.
        head: what each exit has of its own. "shared": nothing, it leaves through the model's own
            end (LayerSkip, 2404.16710); "affine": an affine map in front of that (tuned lens,
            2303.08112); "norm": a final norm and an output matrix, of classifiers all that follows
            the blocks; "mlp": these, and a branch of the feed-forward network of the block it lies
            behind; "layer": these, and a transformer block; "full": all of it (EE-Tuning,
            2402.00518, whose default is "mlp").
        tie_heads: no exit has an output matrix of its own.
        confidence: a linear classifier for each exit that says whether it can be trusted (CALM,
            2207.07061); it trusts nothing until it is trained.
        measure: what decides: "max", the largest probability (EE-LLM 2312.04916; CALM's code);
            "difference" of the two largest; "entropy"; "state", likeness to the exit before;
            "classifier"; "patience", exits in a row that agree (PABEE 2006.04152).
        threshold: an exit is taken above it; None: no exit is taken, the model computes what it
            did.
        patience: exits in a row that must agree, of "patience"; None for all, so that none is
            taken.
        decay_length: positions over which thresholds fall to nine tenths (CALM); None: they stay.
        kv: what later tokens see of blocks that a token skipped: "recompute", the exact keys and
            values; "propagate", those of the state it left with (CALM).
        draft_exit: exit that drafts when generating speculatively; None for the first one.
        draft_tokens: tokens a draft guesses at most; None for 6.
        draft_threshold: probability of its choice at which a draft stops; None for 0.4.
        draft_vocab: how many tokens a draft chooses among, such as 8000 or "8k"; None for all.
        draft_data: text whose most frequent tokens they are; None for the first of the vocabulary.
        draft_data_field: field of a row that holds the text.
        adaptive: write a shared head for the adaptive runtime too, instead of a stock checkpoint.
    """

    exits: str | None = None
    every: str | None = None
    head: str = "mlp"
    tie_heads: bool = False
    confidence: bool = False
    measure: str = "max"
    threshold: float | None = None
    patience: int | None = None
    decay_length: int | None = None
    kv: str = "recompute"
    draft_exit: int | None = None
    draft_tokens: int | None = None
    draft_threshold: float | None = None
    draft_vocab: int | str | None = None
    draft_data: str | None = None
    draft_data_field: str = "text"
    adaptive: bool = False

    def __post_init__(self) -> None:
        for name in ("exits", "every"):
            object.__setattr__(self, name, _text(getattr(self, name)))
        object.__setattr__(self, "draft_vocab", count_of(self.draft_vocab))
        check_types(self)
        check_choice(self, "head", tuple(KINDS))
        check_choice(self, "measure", tuple(MEASURES))
        check_choice(self, "kv", KV)
        low, high = MEASURES[self.measure]
        for name, least, most in (
            ("threshold", low, high),
            ("patience", 1, 4096),
            ("decay_length", 1, 1 << 31),
            ("draft_exit", 1, 1 << 20),
            ("draft_tokens", 1, 512),
            ("draft_threshold", 0, 1),
            ("draft_vocab", 1, 1 << 31),
        ):
            check_range(self, name, least, most)
        self._check_places()
        self._check_pairs()

    @property
    def drafts(self) -> bool:
        """Return whether how to draft is said."""
        given = (self.draft_exit, self.draft_tokens, self.draft_threshold, self.draft_vocab)
        return any(value is not None for value in given)

    @property
    def needs_runtime(self) -> bool:
        """Return whether a shared head is asked for what stock transformers cannot do."""
        given = (getattr(self, name) for name in _OF_ADAPTIVE)
        # a threshold of 0 equals False and is one
        if any(value is not None and value is not False for value in given):
            return True
        return self.kv != "recompute" or self.measure != "max"

    def places(self, blocks: int) -> tuple[int, ...]:
        """Return where the exits lie, ascending.

        Args:
            blocks: L.

        Raises:
            OptionError: one lies outside the model, or is named twice.
        """
        if self.every is not None:
            return _regular(self.every, blocks)
        assert self.exits is not None
        found = [int(part) for part in self.exits.split(",")]
        for place in found:
            if not 1 <= place < blocks:
                raise OptionError(
                    f"the model has {blocks} blocks, and an exit lies between two of them",
                    where="--exits",
                    expected=f"1 to {blocks - 1}" if blocks > 1 else "a model of several blocks",
                    found=place,
                )
            if found.count(place) > 1:
                raise OptionError("names an exit twice", where="--exits", found=place)
        return tuple(sorted(found))

    def draft(self, places: Sequence[int]) -> dict[str, object]:
        """Return how to draft, as configurations hold it.

        Raises:
            OptionError: what drafts is no exit.
        """
        at = self.draft_exit or places[0]
        if at not in places:
            raise OptionError(
                "is no exit",
                where="--draft-exit",
                expected=" or ".join(map(str, nearest(places, at))),
                found=at,
            )
        tokens, threshold = self.draft_tokens, self.draft_threshold
        return {
            "at": at,
            "tokens": DRAFT_TOKENS if tokens is None else tokens,
            "threshold": DRAFT_THRESHOLD if threshold is None else threshold,
            "vocab": self.draft_vocab,
        }

    def decide(self, count: int) -> dict[str, object]:
        """Return how it is decided whether to leave, as configurations hold it.

        Args:
            count: exits.

        Raises:
            OptionError: more exits shall agree than there are.
        """
        is_patient = self.measure == "patience"
        if self.patience is not None and self.patience > count:
            raise OptionError(
                "more exits must agree than there are",
                where="--patience",
                expected=f"1 to {count}",
                found=self.patience,
            )
        decay = None
        if self.decay_length is not None:
            decay = {"rate": DECAY_RATE, "length": self.decay_length}
        return {
            "measure": self.measure,
            "thresholds": [self.threshold] * count,
            "decay": decay,
            "patience": (self.patience or count) if is_patient else None,
        }

    def _check_places(self) -> None:
        if (self.exits is None) == (self.every is None):
            raise OptionError(
                "say where the exits lie, in one way",
                where="--exits",
                expected="--exits 8,16 or --every L/8",
            )
        if self.exits is not None and not re.fullmatch(r"\d{1,6}(,\d{1,6})*", self.exits, re.ASCII):
            raise OptionError(
                "cannot be read",
                where="--exits",
                expected="numbers of blocks such as 8,16",
                found=repr(self.exits[:80]),
            )
        if self.every is not None and not re.fullmatch(r"(L/)?0*[1-9]\d{0,5}", self.every):
            raise OptionError(
                "cannot be read",
                where="--every",
                expected="L/8, or a number of blocks such as 4",
                found=repr(self.every[:80]),
            )

    def _check_pairs(self) -> None:
        """Refuse options that another one leaves without meaning."""
        if self.tie_heads and self.head not in UNTIED:
            raise self._idle("tie_heads", f"--head {self.head}, which has no output matrix")
        if self.patience is not None and self.measure != "patience":
            raise self._idle("patience", f"--measure {self.measure}")
        if self.decay_length is not None and self.threshold is None:
            raise self._idle("decay_length", "no --threshold")
        if self.measure == "classifier" and not self.confidence:
            raise OptionError(
                "classifiers decide, and there are none",
                where="--measure",
                expected="--confidence with it",
            )
        if self.draft_data is not None and self.draft_vocab is None:
            raise self._idle("draft_data", "no --draft-vocab")
        if self.draft_data is None and self.draft_data_field != "text":
            raise self._idle("draft_data_field", "no --draft-data")
        if self.adaptive and self.head != SHARED:
            raise self._idle("adaptive", f"--head {self.head}, which stock classes cannot hold")

    def _idle(self, name: str, why: str) -> OptionError:
        return OptionError(f"does nothing with {why}", where=option(name))


def count_of(given: Any) -> Any:
    """Return the number in "8k", "1.5k" or "8000"; anything but text as it is.

    Raises:
        OptionError: it is no whole number.
    """
    if not isinstance(given, str):
        return given
    found = _COUNT.fullmatch(given)
    number = 0.0 if found is None else float(found[1]) * _UNITS[found[2].lower()]
    if not number or not number.is_integer():
        raise OptionError(
            "cannot be read", where="--draft-vocab", expected="8k or 8000", found=repr(given[:40])
        )
    return int(number)


def _text(given: Any) -> Any:
    """Return a list of places, or one place, as the command line has it."""
    if isinstance(given, list | tuple):
        return ",".join(map(str, given))
    return str(given) if type(given) is int else given


def _regular(every: str, blocks: int) -> tuple[int, ...]:
    """Return every place, none of them behind the last block.

    Raises:
        OptionError: there is none.
    """
    parts = int(every.removeprefix("L/"))
    if every.startswith("L/"):
        found = {round(number * blocks / parts) for number in range(1, min(parts, blocks + 1))}
        if parts > blocks:
            found = set(range(1, blocks))
    else:
        found = set(range(parts, blocks, parts))
    places = tuple(sorted(place for place in found if 0 < place < blocks))
    if not places:
        raise OptionError(
            f"leaves no exit in a model of {blocks} blocks", where="--every", found=every
        )
    return places
