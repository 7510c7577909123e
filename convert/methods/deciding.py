"""What must be known of the weights before a run can be planned: which blocks can go, say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from adaconvert.io.destination import Destination
from adaconvert.methods.molora.taken import Taken
from adaconvert.methods.registry import make_config, method_of
from adaconvert.methods.sources import check_ties, open_source, refuse_exits


class Settings(Protocol):
    """What a run is told besides the options of its method; `conversion.RunSettings` is one."""

    @property
    def destination(self) -> Path: ...

    @property
    def overwrite(self) -> bool: ...

    @property
    def resume(self) -> bool: ...

    @property
    def ignore_unindexed(self) -> bool: ...

    @property
    def progress(self) -> bool: ...


def decided(taken: Taken, method: str, settings: Settings) -> Mapping[str, object]:
    """Return the options of a run with what its method must find with the weights first.

    The destination is looked at before anything long begins.

    Args:
        taken: the sources and the options as given.
        method: registered name.
        settings: of the run.

    Raises:
        OutputConflictError: the destination is taken; else as the method.
    """
    decide = method_of(method).decide
    if decide is None or len(taken.sources) != 1:
        return taken.options
    options = make_config(method, taken.options)
    if not options.searches:
        return taken.options
    destination = Destination.resolve(settings.destination)
    destination.check_free(overwrite=settings.overwrite or settings.resume)
    item = open_source(
        taken.sources[0],
        revision=taken.revision,
        ignore_unindexed=settings.ignore_unindexed,
    )
    refuse_exits(item)
    check_ties(item)
    return {**taken.options, **decide(options, item, settings.progress)}
