"""What about the training of a classifier's exits can be refused before anything is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adaconvert.arch.exits import CLASSIFIER, exits_of
from adaconvert.errors import OptionError, OutputConflictError
from adaconvert.methods.sources import Described
from adaconvert.train.adapt_config import ADAPT_OPTIONS, MACHINE_OPTIONS
from adaconvert.train.bounds import flag
from adaconvert.train.config import SPARSITY_OPTIONS, FinetuneConfig
from adaconvert.train.exit_config import EXIT_OPTIONS, OF_CLASSIFIERS, flag_of
from adaconvert.train.routing_config import ROUTING_OPTIONS
from adaconvert.train.sources import MESSAGES, READING_OPTIONS

if TYPE_CHECKING:
    from adaconvert.train.run import RunSettings

#: fields of a fine-tune that mean nothing here, by the names of their options.
_UNUSED = (
    *("lm", "distill", "distill_hidden", "teacher", "temperature", "select", "compute"),
    *("checkpointing", "report_to", "router_lr"),
)


def is_exit_classifier(item: Described) -> bool:
    """Return whether a checkpoint is a classifier with exits."""
    exits = exits_of(item.spec.adaptive)
    return exits is not None and exits["kind"] == CLASSIFIER


def check_classifier(item: Described, config: FinetuneConfig) -> None:
    """Return only when the exits of a classifier can be trained as asked.

    Raises:
        OptionError: they cannot.
    """
    if item.view is not None:
        raise OptionError(
            "is a folder of adapters, whose base is not written: exits cannot be trained there",
            where=item.source.label,
        )
    for found in _unfit(config):
        raise OptionError(
            "cannot be used to train the exits of a classifier",
            where=found,
            hint="Leave it out.",
        )
    weighed = next((source for source in config.data if source.weight != 1), None)
    if weighed is not None:
        raise OptionError(
            "shares of the data are for language models: a classifier reads every row once a pass",
            where=f"--data {weighed.label},{weighed.weight:g}",
        )
    kind = config.exits.objective
    heads = (exits_of(item.spec.adaptive) or {"heads": ()})["heads"]
    blind = [head["at"] for head in heads if not head["confidence"]]
    if kind not in (None, "weighted") and blind:
        raise OptionError(
            f"the exit after {blind[0]} blocks has no classifier of confidence, which it trains",
            where=f"--exit-objective {kind}",
            hint="`adaconvert early-exit --confidence` adds them.",
        )


def check_running(settings: RunSettings) -> None:
    """Return only when the exits of a classifier can be trained in this way.

    Raises:
        OptionError: they cannot.
        OutputConflictError: an earlier run is to be gone on from.
    """
    if settings.resume:
        raise OutputConflictError(
            "training of a classifier's exits keeps no checkpoints to go on from",
            where="--resume",
            hint="Leave it out to start again.",
        )
    reasons = {
        "--dry-run": settings.dry_run and "what a classifier needs in memory is not estimated",
        "--memory": settings.memory is not None and "what it needs in memory is not estimated",
        "--log-dir": settings.log_dir is not None and "nothing is told to experiment trackers",
    }
    for where, reason in reasons.items():
        if reason:
            raise OptionError(
                f"cannot be used to train the exits of a classifier: {reason}", where=where
            )


def check_language_model(config: FinetuneConfig) -> None:
    """Return only when nothing is asked for that only classifiers have.

    Raises:
        OptionError: something is.
    """
    asked = [flag_of(name) for name in OF_CLASSIFIERS if getattr(config.exits, name) is not None]
    asked += ["--label-field"] if config.label_field is not None else []
    if asked:
        raise OptionError("is for classifiers with exits", where=asked[0], hint="Leave it out.")


def _unfit(config: FinetuneConfig) -> Iterator[str]:
    """Yield the flags of what is asked for and cannot be."""
    usual = FinetuneConfig(data=config.data, steps=1)
    for name in _UNUSED:
        if getattr(config, name) != getattr(usual, name):
            yield flag(name)
    yield from _differing(config.sparsity, usual.sparsity, SPARSITY_OPTIONS)
    yield from _differing(config.routing, usual.routing, ROUTING_OPTIONS)
    yield from _differing(config.adapting, usual.adapting, ADAPT_OPTIONS)
    yield from _differing(config.machine, usual.machine, MACHINE_OPTIONS)
    reading = {n: f for n, f in READING_OPTIONS.items() if f in ("streaming", "messages_field")}
    yield from _differing(config.reading, usual.reading, reading)
    if MESSAGES in config.reading.formats:
        yield "--data-format messages"
    exits = {n: f for n, f in EXIT_OPTIONS.items() if f not in OF_CLASSIFIERS}
    yield from _differing(config.exits, usual.exits, exits)
    if config.save_every:
        yield "--save-every"
    if config.precision == "fp64":
        yield "--precision fp64"
    if config.processes > 1:
        yield "several processes"


def _differing(given: Any, usual: Any, options: dict[str, str]) -> Iterator[str]:
    for name, field in options.items():
        if getattr(given, field) != getattr(usual, field):
            yield flag(name)
