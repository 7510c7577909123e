"""Learning rates of parts of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.train.parts import PARTS, part_of

#: what wrappers put into the names of parameters.
_WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The learning rate of a part.

    Attributes:
        part: as `--train` takes it.
        rate: peak.
    """

    part: str
    rate: float

    @classmethod
    def parse(cls, text: str) -> Rate:
        """Return what `PART=RATE` means.

        Raises:
            OptionError: it is malformed, or the rate is not above 0.
        """
        where = f"--lr-of {escape(str(text))}"
        part, sign, tail = str(text).rpartition("=")
        try:
            rate = float(tail)
            re.compile(part)
        except (ValueError, re.error):
            rate = 0.0
        if not (sign and part and 0 < rate < float("inf")):
            raise OptionError(
                "is malformed",
                where=where,
                expected="PART=RATE with a rate above 0, such as experts=1e-5",
            )
        return cls(part=part, rate=rate)

    def fits(self, name: str, sites: Sequence[str]) -> bool:
        """Return whether a parameter belongs to the part.

        Args:
            name: in the model.
            sites: paths of adaptive feed-forward sites.
        """
        if self.part in PARTS:
            return self.part == "all" or part_of(name, sites) == self.part
        return re.search(self.part, name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """The learning rate of every parameter.

    Attributes:
        usual: of whatever nothing else is said about.
        router: of routers, None for the usual one.
        parts: the last that fits holds.
        routers: names of trained router parameters.
        sites: paths of adaptive feed-forward sites.
    """

    usual: float
    router: float | None
    parts: tuple[Rate, ...]
    routers: frozenset[str]
    sites: tuple[str, ...]

    def of(self, name: str) -> float:
        """Return the learning rate of a parameter by its name in the model or in a wrapped one."""
        bare = bare_name(name)
        for part in reversed(self.parts):
            if part.fits(bare, self.sites):
                return part.rate
        is_router = self.router is not None and bare in self.routers
        return self.router if is_router and self.router is not None else self.usual

    def check(self, names: Collection[str]) -> None:
        """Return only when every part holds for one of the trained parameters `names`.

        Raises:
            OptionError: one holds for none.
        """
        for part in self.parts:
            if not any(part.fits(bare_name(name), self.sites) for name in names):
                raise OptionError(
                    "matches nothing that is trained", where=f"--lr-of {escape(part.part)}"
                )


def bare_name(name: str) -> str:
    """Return a parameter's name without what wrappers put into it."""
    return _WRAPPERS.sub("", name).removeprefix("module.")
