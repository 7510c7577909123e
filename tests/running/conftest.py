"""A tiny model, texts, a recipe, and an API whose verbs copy instead of compute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adaconvert import api
from adaconvert.running.job import Request
from adaconvert.running.result import RunResult
from adaconvert.running.room import PlannedMemory
from adaconvert.running.run import run
from adaconvert.testing import tiny_models

RECIPE = """\
schema: 1
title: T
method: upcycle
paper: p
exactness: approximate
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {train: [train.jsonl], valid: [valid.jsonl]}
stages:
  - upcycle: {experts: 2}
  - name: tune
    finetune: {data: $train, steps: 2, seq_len: 8, batch_size: 1, train: router}
  - evaluate: {data: $valid, reference: $source}
  - push:
"""
WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them "


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is not counted on a model, which test_plan.py looks at: that takes half a second."""
    counted = PlannedMemory(needed=1 << 20)
    monkeypatch.setattr(
        "adaconvert.running.arguments.planned_memory", lambda stage, item, config: counted
    )


@pytest.fixture(scope="session")
def dense_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense Llama."""
    return tiny_models.make("llama", tmp_path_factory.mktemp("running") / "dense")


@pytest.fixture(scope="session")
def moe_made(dense_made: Path) -> Path:
    """The same, upcycled."""
    folder = dense_made.parent / "moe"
    api.convert(dense_made, destination=folder, experts=2, verify=False)
    return folder


@dataclass(kw_only=True)
class Done:
    """The result of a verb that did nothing."""

    found: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Return what was given."""
        return self.found

    def lines(self) -> list[str]:
        """Return a line."""
        return ["a line"]


@dataclass(kw_only=True)
class Bench:
    """A folder with everything a run needs.

    Attributes:
        folder: where it all lies.
        made: checkpoint the verbs copy.
        called: verb, arguments and keywords of each call.
        act: called with a verb and its keywords before it is done.
        heard: reported lines.
    """

    folder: Path
    made: Path
    called: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    act: Callable[[str, dict[str, Any]], None] = lambda verb, given: None
    heard: list[str] = field(default_factory=list)

    @property
    def verbs(self) -> list[str]:
        """Return which verbs were called, and forget them."""
        found = [verb for verb, _, _ in self.called]
        self.called.clear()
        return found

    def run(self, **changed: Any) -> RunResult:
        """Run the recipe."""
        given: dict[str, Any] = {
            "recipe": str(self.folder / "r.yaml"),
            "source": str(self.folder / "dense"),
            "destination": self.folder / "out",
            "report": self.heard.append,
            **changed,
        }
        return run(Request(**given), self.calls())

    def calls(self) -> dict[str, Callable[..., Any]]:
        """Return the verbs."""
        verbs = ("convert", "unmoefy", "d2dmoe", "finetune", "calibrate", "evaluate", "push")
        return {"card": api.card, **{verb: self._call(verb) for verb in verbs}}

    def _call(self, verb: str) -> Callable[..., Done]:
        def call(*args: Any, **given: Any) -> Done:
            self.called.append((verb, args, given))
            self.act(verb, given)
            if verb == "push":
                return Done(found={"url": f"https://hub/{args[1]}"})
            if verb == "evaluate":
                loss = {"mean": 1.5, "standard_error": None}
                row = {"label": "as stored", "loss": loss, "documents": [1, 2]}
                return Done(found={"settings": [row], "reference": None})
            target = given.get("destination", args[1] if len(args) > 1 else None)
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(self.made, target)
            return Done(found={"plan": {"target": "mixtral"}, "tokens": 16})

        return call


@pytest.fixture
def bench(tmp_path: Path, dense_made: Path, moe_made: Path) -> Bench:
    """A folder with a model, texts and the recipe above."""
    shutil.copytree(dense_made, tmp_path / "dense")
    for name in ("train", "valid"):
        rows = [json.dumps({"text": (WORDS * 4)[n:]}) for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return Bench(folder=tmp_path, made=moe_made)
