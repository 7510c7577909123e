"""How much to say: the two options every command shares, and what they set."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import click

from adaconvert.cli.framework import Option

F = TypeVar("F", bound=Callable[..., object])


@dataclass(slots=True, kw_only=True)
class Settings:
    """Options that may stand before or after the verb; the louder place wins."""

    verbosity: int = 0
    quiet: bool = False


def current(ctx: click.Context) -> Settings:
    """Return the settings of this run, made at the first call."""
    return ctx.ensure_object(Settings)


def _louder(ctx: click.Context, param: click.Parameter, value: int) -> None:
    settings = current(ctx)
    settings.verbosity = max(settings.verbosity, value)


def _quieter(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    settings = current(ctx)
    settings.quiet = settings.quiet or value


def verbosity_options(command: F) -> F:
    """Return the command with `-v` and `-q`."""
    quiet = click.option(
        "-q",
        "--quiet",
        cls=Option,
        is_flag=True,
        expose_value=False,
        callback=_quieter,
        help="No progress bars, no notes.",
    )
    verbose = click.option(
        "-v",
        "--verbose",
        cls=Option,
        count=True,
        expose_value=False,
        callback=_louder,
        help="Say what is being done; twice for details. Shows the traceback of a bug.",
    )
    return verbose(quiet(command))


class _Escaped(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        from adaconvert.cli.output import printable

        return printable(f"{record.levelname.lower()}: {super().format(record)}")


def start_logging(settings: Settings) -> None:
    """Log records of adaconvert go to stderr, as many as the settings ask for."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(settings.verbosity, 2)]
    if settings.quiet:
        level = logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Escaped())
    logger = logging.getLogger("adaconvert")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False
    # it tells where it found no faster code for the CPU as soon as transformers imports it
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # read by transformers and huggingface_hub when they are imported, which is later than this
    if settings.verbosity == 0:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")


def begin(packages: tuple[str, ...]) -> Settings:
    """Logging is set up and `packages` are new enough; returns what the user asked to hear.

    Raises:
        ResourceError: a package is missing or older than its floor.
    """
    from adaconvert.cli import versions

    settings = current(click.get_current_context())
    start_logging(settings)
    versions.require(packages)
    _hide_hub_kernels()
    return settings


def _hide_hub_kernels() -> None:
    # transformers imports the package `kernels` when it finds one: a broken one breaks it, and a
    # good one computes with code fetched from a hub. None makes it look absent.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
