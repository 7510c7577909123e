"""What every method hands to a run: a plan, what is fitted for it, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from adaconvert.arch.base import RuntimeVerdict
from adaconvert.methods.sources import Described
from adaconvert.planning.ops import Plan

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

Fitted = Mapping[str, "Array"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """What a PEFT folder is, written where a checkpoint is not: adapters alone, for a base that
    stays where it is.

    Attributes:
        target: config.json of the base with these adapters, which says what both cost.
        dtypes: stored dtype of every tensor of both by name.
        complete: adds to adapter_config.json what only the base's weights say; reads a few bytes.
    """

    target: Mapping[str, object]
    dtypes: Mapping[str, str]
    complete: Callable[[Mapping[str, object]], dict[str, object]] = dict


class Planned(Protocol):
    """A plan with what reports want to know beside it."""

    @property
    def plan(self) -> Plan:
        """The plan."""

    @property
    def described(self) -> tuple[Described, ...]:
        """The sources, first one first."""

    @property
    def target(self) -> str:
        """The model_type of the result."""

    @property
    def runtimes(self) -> tuple[RuntimeVerdict, ...]:
        """What each runtime does with the result, when it is exact."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Further files by name; one called config.json stands for the plan's own."""

    @property
    def folder(self) -> AdapterFolder | None:
        """What is said of a PEFT folder; None where the result is a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainPlan:
    """A `Planned` that has everything at hand."""

    plan: Plan
    described: tuple[Described, ...]
    target: str
    runtimes: tuple[RuntimeVerdict, ...]
    files: Mapping[str, bytes]
    folder: AdapterFolder | None = None


def _nothing(progress: bool) -> Fitted:
    return {}


def _nothing_kept() -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A planned run.

    Attributes:
        planned: the plan.
        fit: computes the arrays of its `Fitted` leaves when it comes to executing it; the argument
            is whether to show progress.
        config_of: config.json once everything is fitted; None when the plan's is complete.
        notes_of: further notes, from the sha256 of every tensor written; None for none.
        kept: what an interrupted run has kept besides complete shards, None for nothing.
    """

    planned: Planned
    fit: Callable[[bool], Fitted] = _nothing
    config_of: Callable[[Fitted], dict[str, object]] | None = None
    notes_of: Callable[[Mapping[str, str]], list[str]] | None = None
    kept: Callable[[], str | None] = _nothing_kept
