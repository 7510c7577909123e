"""The options of `depth`, checked before anything is opened.

Letters: L blocks, K of them kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, option

LAYER_DROP, MOD, SKIP, RECURSIVE = "layer-drop", "mod", "skip", "recursive"
KINDS = (LAYER_DROP, SKIP, MOD, RECURSIVE)
SHARINGS = ("cycle", "sequence", "middle-cycle", "middle-sequence")
STARTS = ("average", "stepwise", "lower", "upper")
#: rank of residuals that give back every matrix.
FULL = "full"
PREDICTORS = ("mlp", "router")
KV = ("keep", "skip")
#: options that only mean something for some kinds.
_OF_KINDS = {
    LAYER_DROP: ("drop", "keep", "compute", "search", "data"),
    MOD: ("capacity", "every", "layers", "predictor", "gate"),
    SKIP: ("drop", "every", "layers", "kv", "adapter_width", "router_width"),
    RECURSIVE: ("loops", "sharing", "start", "rank"),
}
SEARCHES = ("even", "greedy", "evolve")
FITNESS = ("kl", "loss")
#: options that only mean something where text is looked at.
_OF_SEARCH = ("fitness", "data_field", "data_split", "data_tokens", "data_length", "seed", "device")
_OF_EVOLUTION = ("generations", "offspring")
#: blocks at the start that stay as they are unless they are named.
_FIRST = 2
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
    "search": "even",
    "capacity": 0.125,
    "predictor": "router",
    "gate": 0.2,
    "kv": "keep",
    "adapter_width": 64,
    "router_width": 0,
    "sharing": "cycle",
    "start": "average",
    "rank": "64",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthOptions:
    """What `depth` does.

    Of kind "layer-drop" one of `drop`, `keep` and `compute` says how many blocks go; of the others
    `layers` or `every` says which blocks are routed.

    Attributes:
        kind: "layer-drop": whole blocks go, and a stock checkpoint is left; "skip": tokens may skip
            blocks, and everyone goes on seeing their keys and values (2503.23798); "mod": those
            that run a block see one another alone (mixture-of-depths, 2404.02258).
        drop: the blocks, numbered from 0, such as "3,11,17"; of "skip" those no token runs, which
            run their adapters instead.
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
        layers: blocks that are routed, such as "3,5,8-20"; all but the first two and the last when
            neither this nor `every` is given, of "mod" every second of these.
        every: every so many of those blocks.
        capacity: of "mod": share of a text's tokens that run a block in training.
        predictor: of "mod": what decides where nothing later is known: "mlp", a small network
            beside the router, or "router", the router itself.
        gate: of "mod": what a block changes is weighted by up to so much more or less, by how the
            router scores the token; 0 for not.
        kv: of "skip": whether skipped tokens write keys and values.
        adapter_width: of "skip": width of the network that skipped tokens run instead, 0 for none.
        router_width: of "skip": width of the router's inner layer, 0 for a linear router.
        loops: B of "recursive": how often each shared block runs; it divides the blocks that share.
        sharing: which depths share a block: "cycle", the shared ones run one after the other, B
            times; "sequence", each runs B times, then the next; "middle-" the same of all but the
            first and the last block (2410.20672, and Mixture-of-Recursions, 2507.10524).
        start: what shared matrices begin as: "average" of their depths, or one depth each:
            "stepwise" evenly spaced ones, "lower" the first, "upper" the last.
        rank: of the residual every depth has beside each shared matrix, "full" for all a matrix
            can have, 0 for none.
    """

    kind: str = LAYER_DROP
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
    layers: str | None = None
    every: int | None = None
    capacity: float = 0.125
    predictor: str = "router"
    gate: float = 0.2
    kv: str = "keep"
    adapter_width: int = 64
    router_width: int = 0
    loops: int | None = None
    sharing: str = "cycle"
    start: str = "average"
    rank: str = "64"

    def __post_init__(self) -> None:
        object.__setattr__(self, "drop", _text(self.drop))
        object.__setattr__(self, "layers", _text(self.layers))
        object.__setattr__(self, "rank", _text(self.rank))
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
            ("every", 1, 4096),
            ("capacity", 0.0, 1.0),
            ("gate", 0.0, 0.99),
            ("adapter_width", 0, 1 << 20),
            ("router_width", 0, 1 << 20),
            ("loops", 1, 4096),
        ):
            check_range(self, name, least, most)
        check_choice(self, "predictor", PREDICTORS)
        check_choice(self, "kv", KV)
        check_choice(self, "sharing", SHARINGS)
        check_choice(self, "start", STARTS)
        self._check_rank()
        self._check_kind()
        self._check_numbers()
        if self.kind == LAYER_DROP:
            self._check_count()
            self._check_search()

    @property
    def own_rank(self) -> int | str:
        """Return r of "recursive", or "full"."""
        return FULL if self.rank == FULL else int(self.rank)

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

    def _check_kind(self) -> None:
        """Refuse options of other kinds, and a capacity no token is within."""
        for kind, names in _OF_KINDS.items():
            others = [name for name in names if name not in _OF_KINDS[self.kind]]
            if kind != self.kind:
                self._refuse_idle(tuple(others), f"--kind {self.kind}")
        if self.kind != LAYER_DROP:
            # what is drawn has a seed too
            drawn = {"seed"} if self.kind != RECURSIVE else set()
            idle = [name for name in (*_OF_SEARCH, *_OF_EVOLUTION) if name not in drawn]
            self._refuse_idle(("found", *idle), f"--kind {self.kind}")
        if self.kind == MOD and not self.capacity:
            raise OptionError(
                "selects no token",
                where="--capacity",
                expected="a share above 0, such as 0.125",
                found=self.capacity,
            )
        if self.kind == RECURSIVE and self.loops is None:
            raise OptionError(
                "is missing: how often each shared block runs",
                where="--loops",
                expected="a number that divides the blocks, such as 2",
            )
        if self.layers is not None:
            parse_blocks(self.layers)
            if self.every is not None:
                raise OptionError("names the blocks already", where="--layers with --every")

    def routed(self, blocks: int) -> tuple[int, ...]:
        """Return the blocks that are routed, ascending, those no token runs included.

        Args:
            blocks: L.

        Raises:
            OptionError: one does not exist, or none is left.
        """
        gone = set(self.named(blocks) or ())
        if self.layers is not None:
            named = parse_blocks(self.layers)
            strange = next((number for number in named if number >= blocks), None)
            if strange is not None:
                raise OptionError(
                    f"the model has blocks 0 to {blocks - 1}", where="--layers", found=strange
                )
            return tuple(sorted({*named, *gone}))
        step = self.every or (2 if self.kind == MOD else 1)
        found = tuple(range(_FIRST, blocks - 1))[step - 1 :: step]
        if not found and not gone:
            raise OptionError(
                f"the model has {blocks} blocks, of which the first {_FIRST} and the last stay as "
                "they are",
                where="--every",
                expected=f"at most {max(blocks - 1 - _FIRST, 1)}",
                found=step,
                hint="--layers names any block.",
            )
        return tuple(sorted({*found, *gone}))

    def _check_rank(self) -> None:
        if self.rank != FULL and not re.fullmatch(r"\d{1,6}", self.rank, re.ASCII):
            raise OptionError(
                "is no rank",
                where="--rank",
                expected="a number such as 64, or full",
                found=repr(self.rank[:80]),
            )

    def _check_numbers(self) -> None:
        for name in ("drop", "found"):
            text = getattr(self, name)
            if text is not None and not re.fullmatch(r"\d{1,4}(,\d{1,4})*", text, re.ASCII):
                raise OptionError(
                    "cannot be read",
                    where=option(name),
                    expected="numbers of blocks such as 3,11,17",
                    found=repr(text[:80]),
                )

    def _check_count(self) -> None:
        given = [name for name in ("drop", "keep", "compute") if getattr(self, name) is not None]
        if len(given) != 1:
            raise OptionError(
                "say what goes, in one way",
                where="--drop",
                expected="--drop 3,11, --keep 24 or --compute 0.75",
                found=" and ".join(map(option, given)) or "none of them",
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


def parse_blocks(text: str) -> tuple[int, ...]:
    """Return the numbers in "3,5,8-20", ascending.

    Raises:
        OptionError: it cannot be read, or names a block twice.
    """
    if not re.fullmatch(r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", text, re.ASCII):
        raise OptionError(
            "cannot be read",
            where="--layers",
            expected="numbers of blocks such as 3,5,8-20",
            found=repr(text[:80]),
        )
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    twice = next((number for number in found if found.count(number) > 1), None)
    if twice is not None or not found:
        raise OptionError(
            "names a block twice" if found else "names no block",
            where="--layers",
            found=text[:80] if twice is None else twice,
        )
    return tuple(sorted(found))


def _text(given: Any) -> Any:
    """Return a list of blocks, or one block, as the command line has it."""
    if isinstance(given, list | tuple):
        return ",".join(map(str, given))
    return str(given) if type(given) is int else given
