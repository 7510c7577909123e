"""The models of the table of null experts, each made once in a work folder.

"source" is the dense model, "mixture" a Branch-Train-MiX of its branches (2403.07816), "base" that
mixture tuned briefly, "base-top-1" the same when it runs one expert. Tuned from these, all on the
same tokens in the same order on the same schedule: "top-2", "top-1", and "nulls-T" with a target
compute of T, which starts from "start-T", the base with null experts that change nothing yet;
"nulls" is such a start without a target; "nulls-T-TAG" was started or tuned with other options.
"free-T-D" is the base with null experts whose bias was set on text of the domain D, and nothing
trained. "dense" is the dense model tuned as long as base and what follows; "dense-all" was tuned
before on the branches' text, as long as all branches together.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from adaconvert import api

#: what the copy of a checkpoint with fewer experts per token does not say of itself.
OWN_FILES = ("adaconvert.json", "README.md")
#: between the seeds of the two tunings, so that the second reads other documents.
APART = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every model shares.

    Attributes:
        dense: checkpoint everything is made from.
        branches: checkpoints the experts come from, and the text each was tuned on.
        work: folder of everything made.
        train: domain -> text to tune on.
        tokens: of the base's tuning, and of every tuning from there.
        branch_tokens: that all branches together were tuned on; None to read their manifests.
        upcycle: options of the mixture.
        parts: of a mixture that are trained; of the dense model everything is.
        router_lr: learning rate of routers.
        tune: options of every tuning.
        null_tune: options of the tuning of models with null experts besides.
        null_start: options of their start.
        tag: what the names of those models end in.
        nulls: null experts of a layer.
        targets: shares of the experts' FLOPs.
        control_tokens: text the bias is set on without training.
        seed: of everything.
        device: of everything that takes one.
    """

    dense: Path
    branches: tuple[Path, ...]
    branch_text: tuple[str, ...]
    work: Path
    train: Mapping[str, str]
    tokens: tuple[int, int]
    branch_tokens: int | None
    upcycle: Mapping[str, Any]
    parts: tuple[str, ...]
    router_lr: float
    tune: Mapping[str, Any]
    null_tune: Mapping[str, Any]
    null_start: Mapping[str, Any]
    tag: str
    nulls: int
    targets: tuple[float, ...]
    control_tokens: int
    seed: int
    device: str

    @property
    def names(self) -> tuple[str, ...]:
        """Return the models that are measured."""
        return (
            *("source", "mixture", "base", "base-top-1", "top-2", "top-1", "nulls"),
            *(f"nulls-{target:g}{self.tag and f'-{self.tag}'}" for target in self.targets),
            *("dense", *(("dense-all",) if self.branch_text else ())),
            *(f"free-{target:g}-{domain}" for target in self.targets for domain in self.train),
        )


class Models:
    """Makes the models of a setup."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._makers: dict[str, Callable[[Path], None]] = {
            "mixture": self._mix,
            "base": lambda path: self._tune("mixture", path, 0, self._routed()),
            "base-top-1": lambda path: one_expert(self.folder("base"), path),
            "top-2": lambda path: self._tune("base", path, 1, self._routed()),
            "top-1": lambda path: self._tune("base-top-1", path, 1, self._routed()),
            "nulls": self._start,
            "dense-first": lambda path: self._tune("source", path, 0, {}),
            "dense": lambda path: self._tune("dense-first", path, 1, {}),
            "dense-branches": self._tune_as_branches,
            "dense-all-first": lambda path: self._tune("dense-branches", path, 0, {}),
            "dense-all": lambda path: self._tune("dense-all-first", path, 1, {}),
        }

    def path(self, name: str) -> Path:
        """Return where a model lies, made or not."""
        return self.setup.dense if name == "source" else self.setup.work / name

    def folder(self, name: str) -> Path:
        """Return the folder of a model, after it was made where it is not there."""
        path = self.path(name)
        if not path.exists():
            click.echo(f"making {name}", err=True)
            self._maker(name)(path)
        return path

    def _maker(self, name: str) -> Callable[[Path], None]:
        if name in self._makers:
            return self._makers[name]
        kind, _, rest = name.partition("-")
        target, _, domain = rest.partition("-")
        if kind == "free":
            return lambda path: self._set_free(path, float(target), self.setup.train[domain])
        if kind == "start":
            return lambda path: self._start(path, float(target), self.setup.null_start)
        if kind != "nulls":
            raise click.UsageError(f"no model is called {name}: {', '.join(self.setup.names)}")
        options = {**self._routed(), **self.setup.null_tune, "target_compute": float(target)}
        start = f"start-{rest}" if self.setup.null_start else f"start-{target}"
        return lambda path: self._tune(start, path, 1, options)

    def _routed(self) -> dict[str, Any]:
        return {"train": self.setup.parts, "router_lr": self.setup.router_lr}

    def _mix(self, path: Path) -> None:
        count = len(self.setup.branches)
        options = {"experts": count, "top_k": 2, "seed": self.setup.seed, **self.setup.upcycle}
        sources = self.setup.branches
        api.convert(*sources, destination=path, method="upcycle", verify=False, **options)

    def _start(
        self, path: Path, target: float | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        # verified: it computes what the base computes
        api.convert(
            self.folder("base"),
            destination=path,
            method="adamoe",
            null_experts=self.setup.nulls,
            target_compute=target,
            seed=self.setup.seed,
            verify=target is None,
            **(options or {}),
        )

    def _set_free(self, path: Path, target: float, text: str) -> None:
        self._start(path, target, {"data": text, "data_tokens": self.setup.control_tokens})

    def _tune(self, start: str, path: Path, stage: int, options: Mapping[str, Any]) -> None:
        """Tune a model in the first or second of the two stages."""
        tokens = self.setup.tokens[stage]
        self._finetune(start, path, tuple(self.setup.train.values()), tokens, stage, options)

    def _tune_as_branches(self, path: Path) -> None:
        tokens = self.setup.branch_tokens or sum(map(tokens_of, self.setup.branches))
        self._finetune("source", path, self.setup.branch_text, tokens, 2, {})

    def _finetune(
        self,
        start: str,
        path: Path,
        data: Sequence[str],
        tokens: int,
        stage: int,
        options: Mapping[str, Any],
    ) -> None:
        done = api.finetune(
            self.folder(start),
            path,
            data=data,
            tokens=tokens,
            seed=self.setup.seed + APART * stage,
            device=self.setup.device,
            resume=True,
            report=lambda line: click.echo(f"{path.name}: {line}", err=True),
            **{**self.setup.tune, **options},
        )
        speed = done.to_json().get("tokens_per_second")
        # nothing when all of it was done in a session before
        if speed:
            speed_log(path).write_text(json.dumps({"tokens_per_s": f"{speed:.1f}"}))


def speed_log(folder: Path) -> Path:
    """Return the file that keeps how fast a model was trained."""
    return folder.with_name(f"{folder.name}.speed.json")


def tokens_of(folder: Path) -> int:
    """Return the tokens a checkpoint was last tuned on."""
    return int(json.loads((folder / "adaconvert.json").read_text())["training"]["tokens"])


def one_expert(source: Path, path: Path) -> None:
    """Write a mixture that runs one expert for every token, its weights shared with the source's
    folder."""
    scratch = path.with_name(f".{path.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    ignore = shutil.ignore_patterns(*OWN_FILES, "config.json")
    shutil.copytree(source, scratch, copy_function=os.link, ignore=ignore)
    config = json.loads((source / "config.json").read_text())
    (scratch / "config.json").write_text(json.dumps({**config, "num_experts_per_tok": 1}, indent=2))
    scratch.rename(path)
