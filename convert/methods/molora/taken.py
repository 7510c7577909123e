"""Sources as checkpoints: a folder of adapters stands for its base with the adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaconvert.methods.molora.adapter_source import is_adapter_folder
from adaconvert.methods.molora.view import viewed

#: what takes adapter folders for sources.
_READING = ("molora", "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a run reads.

    Attributes:
        sources: checkpoints.
        options: of the method; they name the base of adapters that are the source.
        revision: of hub ids among the sources.
        folders: what was given in place of the sources, where that is adapters; else empty.
        base: where the base of these adapters is, None where the source is no adapters.
    """

    sources: tuple[str, ...]
    options: Mapping[str, object]
    revision: str | None = None
    folders: tuple[Path, ...] = ()
    base: str | None = None

    @property
    def places(self) -> tuple[Path, ...]:
        """Return what is read and may not be replaced by the result, besides the sources: adapters,
        their base, adapters that become experts, and texts."""
        named: list[str] = [] if self.base is None else [self.base]
        for name in ("adapters", "data"):
            given: Any = self.options.get(name) or ()
            named += [given] if isinstance(given, str) else list(given)
        there = [path for path in (Path(one).expanduser() for one in named) if path.exists()]
        return (*self.folders, *there)


@contextmanager
def standing_sources(
    sources: Sequence[str], method: str, options: Mapping[str, object], revision: str | None
) -> Iterator[Taken]:
    """Yield what a run reads, for as long as it does.

    Args:
        sources: as given: folders, hub-cache snapshots or hub ids.
        method: registered name, or "finetune"; others than `_READING` take checkpoints alone.
        options: of the method.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: the folder of adapters is damaged, or its base is not there or another.
    """
    only = sources[0] if len(sources) == 1 and method in _READING else None
    given = options.get("base")
    if only is None or not is_adapter_folder(only, revision=revision):
        # what --base names as the base of a result that is adapters is also where it lies
        base = str(given) if given is not None and Path(str(given)).is_dir() else None
        yield Taken(sources=tuple(sources), options=options, revision=revision, base=base)
        return
    with viewed(only, base=None if given is None else str(given), revision=revision) as view:
        named = given or view.adapters.config["base_model_name_or_path"]
        yield Taken(
            sources=(str(view.root),),
            options={**options, "base": named},
            folders=(view.adapters.source.root,),
            base=str(view.base.source.root),
        )
