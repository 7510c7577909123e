"""How many real experts tokens ran where null experts take slots, by class of token and by layer.

Shapes: T tokens, C classes, R the most real experts a token may run, and one for none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from adaconvert.evaluate.token_classes import CLASSES, TokenClasses

if TYPE_CHECKING:
    import numpy

#: words of a path, each with the number behind it.
_NUMBERED: Final = re.compile(r"(\D+)(\d*)")


def null_sites(model: Any) -> dict[str, int]:
    """Return for each block with null experts the experts a token of the source runs there, the
    first layer's first."""
    if not hasattr(model, "adaptive_sites"):
        return {}
    specs = {path: site.adaptive_spec for path, site in model.adaptive_sites().items()}
    # config.json sorts layer 10 before layer 2
    found = sorted((path for path in specs if "mixture" in specs[path]), key=_in_order)
    return {path: int(specs[path]["mixture"]["top_k"]) for path in found}


def _in_order(path: str) -> list[tuple[str, int]]:
    """Return what sorts paths by the numbers in them."""
    return [(word, int(number or 0)) for word, number in _NUMBERED.findall(path)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RealExperts:
    """Real experts per token by class, layer by layer.

    Attributes:
        classes: names of the classes that occur.
        tokens: [C] tokens of each class.
        rare: how often a rare word occurs at most.
        sites: paths of the blocks, in their order.
        of: experts a token of the source runs in each block.
        counts: for each block [C][R] tokens of a class by the number of real experts they ran.
    """

    classes: tuple[str, ...]
    tokens: tuple[int, ...]
    rare: int
    sites: tuple[str, ...]
    of: tuple[int, ...]
    counts: tuple[tuple[tuple[int, ...], ...], ...]

    def mean(self, site: int, kind: int) -> float:
        """Return the mean number of real experts that tokens of a class ran in a block."""
        return sum(n * count for n, count in enumerate(self.counts[site][kind])) / self.tokens[kind]

    def none(self, site: int, kind: int) -> float:
        """Return the share of a class's tokens that ran no real expert in a block."""
        return self.counts[site][kind][0] / self.tokens[kind]

    def overall(self, kind: int) -> tuple[float, float]:
        """Return mean and share with none of a class over all blocks."""
        every = range(len(self.sites))
        means, idle = ([f(at, kind) for at in every] for f in (self.mean, self.none))
        return sum(means) / len(means), sum(idle) / len(idle)

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by name, rounded to what this many tokens can tell."""
        kinds = range(len(self.classes))
        overall = [self.overall(kind) for kind in kinds]
        return {
            "classes": list(self.classes),
            "tokens": list(self.tokens),
            "rare_at_most": self.rare,
            "real": [round(mean, 4) for mean, _ in overall],
            "none": [round(idle, 4) for _, idle in overall],
            "layers": [
                {
                    "site": path,
                    "of": self.of[at],
                    "real": [round(self.mean(at, kind), 4) for kind in kinds],
                    "none": [round(self.none(at, kind), 4) for kind in kinds],
                    "tokens_by_real": self._distribution(at),
                }
                for at, path in enumerate(self.sites)
            ],
        }

    def _distribution(self, site: int) -> list[int]:
        """Return the tokens of a block by the number of real experts they ran."""
        return _without_tail([sum(column) for column in zip(*self.counts[site], strict=True)])


def _without_tail(counts: Sequence[int]) -> list[int]:
    """Return counts up to the last that is not zero."""
    last = max((at for at, count in enumerate(counts) if count), default=-1)
    return list(counts[: last + 1])


class ClassTally:
    """Adds up what the tokens of each class ran, over several passes of one model at one setting.

    Args:
        classes: of the tokens of all blocks.
        sites: see `null_sites`.
    """

    def __init__(self, classes: TokenClasses, sites: Mapping[str, int]) -> None:
        self._classes = classes
        self._sites = dict(sites)
        self._tokens: Any = 0
        self._counts: dict[str, Any] = {}

    @contextmanager
    def counting(self, model: Any, rows: Sequence[int]) -> Iterator[None]:
        """Add what the tokens of some blocks run in the body, which runs these blocks once.

        Args:
            model: an adaptive model.
            rows: the blocks, in the order of the batch.
        """
        import numpy

        routed = model.adaptive_depth()
        what = ("experts_run", "depth") if routed else ("experts_run",)
        with model.collect(*what) as got:
            yield
        codes = self._classes.codes[list(rows)]
        codes = codes[codes >= 0]
        self._tokens = self._tokens + numpy.bincount(codes, minlength=len(CLASSES))
        found, depth = (got["experts_run"], got["depth"]) if routed else (got, {})
        for path in self._sites:
            run = numpy.concatenate([part.cpu().numpy() for part in found.get(path, [])] or [[]])
            block = next((one for one in depth if path.startswith(f"{one}.")), None)
            if block is not None and len(run) != len(codes):
                # who skips the block runs no expert of its network
                ran = numpy.concatenate([one.run.cpu().numpy() for one in depth[block]])
                every = numpy.zeros(len(codes), dtype="int64")
                every[ran] = run
                run = every
            self._add(path, codes, run.astype("int64"))

    def _add(self, path: str, codes: numpy.ndarray[Any, Any], run: numpy.ndarray[Any, Any]) -> None:
        """Add the numbers of real experts [T] that tokens of the classes [T] ran in a block."""
        import numpy

        known = self._counts.get(path)
        width = max(int(run.max(initial=0)) + 1, 0 if known is None else known.shape[1])
        flat = numpy.bincount(codes.astype("int64") * width + run, minlength=len(CLASSES) * width)
        new = flat.reshape(len(CLASSES), width)
        if known is not None:
            new[:, : known.shape[1]] += known
        self._counts[path] = new

    def result(self) -> RealExperts | None:
        """Return what was added up, None when nothing was."""
        if not self._counts:
            return None
        kinds = [code for code, count in enumerate(self._tokens) if count]
        return RealExperts(
            classes=tuple(CLASSES[code] for code in kinds),
            tokens=tuple(int(self._tokens[code]) for code in kinds),
            rare=self._classes.rare,
            sites=tuple(self._sites),
            of=tuple(self._sites.values()),
            counts=tuple(
                tuple(tuple(int(n) for n in self._counts[path][code]) for code in kinds)
                for path in self._sites
            ),
        )
