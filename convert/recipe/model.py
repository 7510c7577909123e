"""A recipe that has been read: what it is about, its texts, and its stages in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from adaconvert.recipe.verbs import VERBS, Verb

#: version of the format this adaconvert reads.
SCHEMA: Final = 1
#: name of what the first stage goes on from.
SOURCE: Final = "source"
#: key -> what it says.
COST_KEYS: Final = {
    "basis": "'measured', or 'estimate': computed from config alone.",
    "machine": "What the numbers are for.",
    "disk": "Bytes every stage's folder takes together.",
    "memory": "Peak memory of the largest stage.",
    "time": "Of the whole run.",
}
#: what numbers of a recipe's cost come from.
BASES: Final = ("measured", "estimate")
EXACTNESS: Final = ("exact", "exact-fp32", "approximate", "needs training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One call of a verb.

    Attributes:
        name: unique among the stages.
        verb: a name of `verbs.VERBS`.
        inputs: what it goes on from: names of earlier stages, or "source".
        options: as given, checked; "$name" stands for texts or checkpoints.
        places: where each option was written.
        place: where the stage was written.
    """

    name: str
    verb: str
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    places: Mapping[str, str] = field(repr=False, compare=False)
    place: str = field(repr=False, compare=False)

    @property
    def does(self) -> Verb:
        """Return what its verb is."""
        return VERBS[self.verb]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A recipe, extended and overridden.

    Attributes:
        name: name of a shipped recipe, else the name of the file.
        title, method, paper: what it makes, by which method, described where.
        exactness: what the result is, compared with the source.
        cost: what it takes, by the keys of `COST_KEYS`.
        source: hub id or folder, None when it must be given.
        revision: of a hub id.
        data: texts by name; empty ones must be given before it can run.
        stages: in the order they run.
    """

    name: str
    title: str
    method: str
    paper: str
    exactness: str
    cost: Mapping[str, str]
    source: str | None
    revision: str | None
    data: Mapping[str, tuple[str, ...]]
    stages: tuple[Stage, ...]

    def stage(self, name: str) -> Stage:
        """Return a stage by name."""
        return next(stage for stage in self.stages if stage.name == name)

    def to_json(self) -> dict[str, object]:
        """Return the recipe as JSON data, in the form a recipe file has."""
        return {
            "schema": SCHEMA,
            "title": self.title,
            "method": self.method,
            "paper": self.paper,
            "exactness": self.exactness,
            "cost": dict(self.cost),
            "source": self.source,
            "revision": self.revision,
            "data": {name: list(texts) for name, texts in self.data.items()},
            "stages": [_stage(stage) for stage in self.stages],
        }


def _stage(stage: Stage) -> dict[str, object]:
    inputs = list(stage.inputs) if len(stage.inputs) > 1 else stage.inputs[0]
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in stage.options.items()
    }
    return {"name": stage.name, "from": inputs, stage.verb: options}
