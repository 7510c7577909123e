"""The options of `depth`, checked before anything is opened.

Letters: L blocks, K of them kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, option

KINDS = ("layer-drop",)
SEARCHES = ("even", "greedy", "evolve")
FITNESS = ("kl", "loss")
#: options that only mean something where text is looked at.
_OF_SEARCH = ("fitness", "data_field", "data_split", "data_tokens", "data_length", "seed", "device")
_OF_EVOLUTION = ("generations", "offspring")
_DEFAULTS: dict[str, Any] = {
    "fitness": "kl",
    "data_field": "text",
    "data_split": None,
    "data_tokens": 8192,
    "data_length": 512,
    "seed": 0,
    "device": "auto",
    "generations": 40,
    "offspring": 16,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthOptions:
    """What `depth` does. One of `drop`, `keep` and `compute` says how many blocks go.

    Attributes:
        kind: "layer-drop": whole blocks go, and a stock checkpoint is left.
        drop: the blocks, numbered from 0, such as "3,11,17".
        keep: K instead.
        compute: instead, FLOPs per token as a share of the model's, head included; the number of
            blocks that comes nearest is kept.
        search: which blocks go where their number alone is said. "even": evenly spaced ones;
            "greedy": one after the other, each the one that changes the model least; "evolve":
            evolution at that number (EvoPress, 2410.14649). Never the first or the last block.
        fitness: what a search makes small: "kl", the divergence of next-token distributions from
            those of the whole model, or "loss".
        data: text of a search.
        data_field: field of a row that holds the text.
        data_split: split to read.
        data_tokens: tokens of it that are used.
        data_length: tokens of a sequence.
        generations: of an evolution; our choice, as are offspring.
        offspring: of each generation.
        seed: of mutations, and of the order of texts.
        device: torch device of a search, or "auto" for the accelerator if there is one.
        found: blocks a search found, such as "3,11,17"; written by the search, not by hand.
    """

    kind: str = "layer-drop"
    drop: str | None = None
    keep: int | None = None
    compute: float | None = None
    search: str = "even"
    fitness: str = "kl"
    data: str | None = None
    data_field: str = "text"
    data_split: str | None = None
    data_tokens: int = 8192
    data_length: int = 512
    generations: int = 40
    offspring: int = 16
    seed: int = 0
    device: str = "auto"
    found: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop", _text(self.drop))
        check_types(self)
        check_choice(self, "kind", KINDS)
        check_choice(self, "search", SEARCHES)
        check_choice(self, "fitness", FITNESS)
        for name, least, most in (
            ("keep", 1, 4096),
            ("compute", 0.0, 1.0),
            ("data_tokens", 16, 1 << 31),
            ("data_length", 2, 1 << 24),
            ("generations", 1, 1 << 20),
            ("offspring", 1, 1 << 16),
            ("seed", 0, (1 << 63) - 1),
        ):
            check_range(self, name, least, most)
        self._check_count()
        self._check_search()

    @property
    def searches(self) -> bool:
        """Return whether text decides which blocks go."""
        return self.search != "even"

    def named(self, blocks: int) -> tuple[int, ...] | None:
        """Return the blocks that go, ascending, as far as they are named; None where their number
        alone is.

        Args:
            blocks: L.

        Raises:
            OptionError: one does not exist or is named twice, or none would be left.
        """
        text = self.drop if self.found is None else self.found
        if text is None:
            return None
        numbers = [int(part) for part in text.split(",")]
        for number in numbers:
            if number >= blocks:
                raise OptionError(
                    f"the model has blocks 0 to {blocks - 1}", where="--drop", found=number
                )
            if numbers.count(number) > 1:
                raise OptionError("names a block twice", where="--drop", found=number)
        if len(numbers) == blocks:
            raise OptionError(
                "would leave no block", where="--drop", expected=f"at most {blocks - 1} of {blocks}"
            )
        return tuple(sorted(numbers))

    def _check_count(self) -> None:
        given = [name for name in ("drop", "keep", "compute") if getattr(self, name) is not None]
        if len(given) != 1:
            raise OptionError(
                "say what goes, in one way",
                where="--drop",
                expected="--drop 3,11, --keep 24 or --compute 0.75",
                found=" and ".join(map(option, given)) or "none of them",
            )
        for name in ("drop", "found"):
            text = getattr(self, name)
            if text is not None and not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII):
                raise OptionError(
                    "cannot be read",
                    where=option(name),
                    expected="numbers of blocks such as 3,11,17",
                    found=repr(text[:80]),
                )

    def _check_search(self) -> None:
        """Refuse options that another one leaves without meaning.

        Raises:
            OptionError: one means nothing, or the text is missing.
        """
        if self.searches and self.drop is not None:
            raise OptionError(
                "looks for blocks, and --drop names them",
                where="--search",
                found=self.search,
                hint="Give --keep or --compute with it.",
            )
        if self.searches and self.data is None:
            raise OptionError(
                "is missing: the search runs the model on text",
                where="--data",
                expected="a .txt, .jsonl, .json or .parquet file, a folder or a hub data set",
            )
        if not self.searches:
            self._refuse_idle(("data", "found", *_OF_SEARCH), f"--search {self.search}")
        if self.search != "evolve":
            self._refuse_idle(_OF_EVOLUTION, f"--search {self.search}")

    def _refuse_idle(self, names: tuple[str, ...], why: str) -> None:
        for name in names:
            if getattr(self, name) != _DEFAULTS.get(name):
                raise OptionError(f"does nothing with {why}", where=option(name))


def _text(given: Any) -> Any:
    """Return a list of blocks, or one block, as the command line has it."""
    if isinstance(given, list | tuple):
        return ",".join(map(str, given))
    return str(given) if type(given) is int else given
