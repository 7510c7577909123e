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
from adaconvert.errors import OptionError, OutputConflictError
from adaconvert.io.destination import Destination
from adaconvert.io.digest import DigestPool
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.methods.sources import Described, open_source
from adaconvert.recipe.load import load
from adaconvert.recipe.model import SOURCE, Recipe, Stage
from adaconvert.recipe.options import CHECKPOINT, FILE, TEXT_SOURCE, TEXT_SOURCES
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
            OutputConflictError: source, destination and work folder lie in each other.
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
        work = request.work or folder_of(destination)
        _check_apart(item.source.root, destination, work)
        return cls(
            request=request,
            recipe=recipe,
            where=where,
            item=item,
            destination=destination,
            work=work,
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
            # in bytes, because that is how the length of names is limited
            label = os.fsencode(self.item.source.label.rpartition("/")[2])[:100]
            return f"{label.decode('utf-8', 'ignore')}-{stage.name}"
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
            content |= {"recipe": self.recipe_text(), "hub": _hub()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _marked(self, role: str, value: Any, tokens: Mapping[str, str]) -> Any:
        if role == TEXT_SOURCES:
            return [texts.fingerprint(text) for text in texts.expand(value, self.recipe)]
        if role == TEXT_SOURCE:
            return [texts.fingerprint(text) for text in texts.expand((value,), self.recipe)]
        if role == CHECKPOINT and value[:1] == "$":
            return tokens[value[1:]]
        if role in (CHECKPOINT, FILE):
            return texts.fingerprint(value)
        return value


def _hub() -> str:
    """Return the URL of the hub that a push of this run goes to."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def process_count() -> int:
    """Return how many processes torchrun or accelerate started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_apart(source: Path, destination: Path, work: Path) -> None:
    """Return only when what is written lies apart from the source, and the stages from the result.

    Raises:
        OutputConflictError: they do not.
    """
    places = [Destination.resolve(path) for path in (destination, work)]
    for place in places:
        place.check_apart([source])
    result, stages = (place.path for place in places)
    if stages.is_relative_to(result) or result.is_relative_to(stages):
        raise OutputConflictError(
            "the work folder and the destination must lie apart",
            where=escape(str(work)),
            hint="Name another with --work.",
        )


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
