"""What one run is asked for, with everything found that can be found before it starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert import __version__
from adaconvert.errors import OptionError
from adaconvert.io.digest import DigestPool
from adaconvert.io.source import Source
from adaconvert.methods.sources import Described, open_source
from adaconvert.recipe.load import load
from adaconvert.recipe.model import SOURCE, Recipe, Stage
from adaconvert.recipe.options import CHECKPOINT, TEXT_SOURCE, TEXT_SOURCES
from adaconvert.recipe.render import resolved
from adaconvert.recipe.verbs import MAKES_CHECKPOINT, MAKES_REPORT, MAKES_REPOSITORY
from adaconvert.recipe.words import unknown
from adaconvert.running import texts
from adaconvert.running.state import State, folder_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What the user asked for; see `api.run`."""

    recipe: str
    source: str | None = None
    destination: Path | None = None
    settings: tuple[str, ...] = ()
    work: Path | None = None
    from_stage: str | None = None
    overwrite: bool = False
    dry_run: bool = False
    progress: bool = False
    report: Callable[[str], None] = lambda line: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A recipe with its source and folders.

    Attributes:
        request: what was asked for.
        recipe: extended, set and checked.
        where: the source as given.
        item: the source, opened.
        destination: folder the last checkpoint goes to.
        work: folder of everything before it.
    """

    request: Request
    recipe: Recipe
    where: str
    item: Described
    destination: Path
    work: Path

    @classmethod
    def of(cls, request: Request) -> Job:
        """Return the job a request asks for; the source is opened, nothing is written.

        Raises:
            OptionError: the recipe is wrong, or the source, a text or a stage is missing.
            SourceError: the source is damaged.
            DataError: a text is not there.
        """
        recipe = load(request.recipe, request.settings)
        where = request.source or recipe.source
        if where is None:
            raise OptionError(
                "no source given",
                where="SRC",
                hint="The recipe names none: give a checkpoint folder or hub id.",
            )
        names = [stage.name for stage in recipe.stages]
        if request.from_stage is not None and request.from_stage not in names:
            raise unknown("stage", request.from_stage, names, "--from")
        for stage in () if request.dry_run else recipe.stages:
            texts.check(stage, recipe)
        # a revision belongs to the recipe's own source
        revision = recipe.revision if request.source in (None, recipe.source) else None
        item = open_source(where, revision=revision)
        destination = request.destination or _default_destination(item.source, recipe)
        return cls(
            request=request,
            recipe=recipe,
            where=where,
            item=item,
            destination=destination,
            work=request.work or folder_of(destination),
        )

    @property
    def revision(self) -> str | None:
        """Return the revision to read the source at, None for a folder."""
        given = self.request.source in (None, self.recipe.source)
        return self.recipe.revision if given else None

    @property
    def final(self) -> Stage | None:
        """Return the last stage that makes a checkpoint."""
        made = [stage for stage in self.recipe.stages if stage.does.makes == MAKES_CHECKPOINT]
        return made[-1] if made else None

    def folder(self, stage: Stage) -> str:
        """Return what a stage's folder or report in the work folder is called, '' for none."""
        if stage.does.makes == MAKES_CHECKPOINT:
            return f"{self.item.source.label.rpartition('/')[2][:100]}-{stage.name}"
        return f"{stage.name}.json" if stage.does.makes == MAKES_REPORT else ""

    def recipe_text(self) -> str:
        """Return the resolved recipe, as it is kept with the result."""
        source = self.item.source
        revision = source.revision if "/" in source.label else None
        return resolved(self.recipe, source.label, revision)

    def key(self, stage: Stage, tokens: Mapping[str, str]) -> str:
        """Return what decides the result of a stage.

        Args:
            stage: the stage.
            tokens: what stands for the source and for each stage it may refer to.
        """
        table = stage.does.table()
        content: dict[str, Any] = {
            "adaconvert": __version__,
            "verb": stage.verb,
            "inputs": [tokens[name] for name in stage.inputs],
            "options": {
                name: self._marked(table[name].role, value, tokens)
                for name, value in stage.options.items()
            },
        }
        if stage.verb == "finetune":
            # each trains on a batch of its own
            content["processes"] = process_count()
        if stage.does.makes == MAKES_REPOSITORY:
            content["recipe"] = self.recipe_text()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _marked(self, role: str, value: Any, tokens: Mapping[str, str]) -> Any:
        if role == TEXT_SOURCES:
            return [texts.fingerprint(text) for text in texts.expand(value, self.recipe)]
        if role == TEXT_SOURCE:
            return [texts.fingerprint(text) for text in texts.expand((value,), self.recipe)]
        if role == CHECKPOINT and value[:1] == "$":
            return tokens[value[1:]]
        return value


def process_count() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _default_destination(source: Source, recipe: Recipe) -> Path:
    return Path(f"{source.label.rpartition('/')[2]}-{recipe.method}")


def source_identity(source: Source, state: State, digest: str | None = None) -> dict[str, Any]:
    """Return the identity of the source's files, and the token that stands for them in keys.

    The token stays while the bytes do: files that only look new are hashed and compared.

    Args:
        source: opened.
        state: what an earlier run knew.
        digest: sha256 over the tensors, where a finished stage has computed it.
    """
    files = [[s.file, s.size, s.mtime_ns, s.inode] for s in source.shards]
    before = state.source
    content = [source.label, source.fingerprint, [_side_file(source, n) for n in source.side_files]]
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    same = before.get("fingerprint") == fingerprint
    known = before.get("digest") if same else None
    if same and before.get("files") != files:
        same = known is not None and _weights(source) == known
        known = known if same else None
    text = json.dumps([fingerprint, files])
    token = before["token"] if same else hashlib.sha256(text.encode()).hexdigest()
    return {
        "fingerprint": fingerprint,
        "files": files,
        "digest": digest or known,
        "token": token,
    }


def _side_file(source: Source, name: str) -> list[object]:
    return [name, texts.fingerprint(str(source.path(name)))]


def _weights(source: Source) -> str:
    with DigestPool([source], allow_nonfinite=True) as pool:
        return pool.source_digest(0)


def tokens_of(state: State) -> dict[str, str]:
    """Return what stands for the source and for every finished stage whose result is intact."""
    found = {SOURCE: str(state.source["token"])}
    for name in state.stages:
        if state.is_intact(name):
            found[name] = state.token(name)
    return found
