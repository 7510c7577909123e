"""Options that several verbs share, so that `plan upcycle` and `upcycle` cannot drift apart.

Names are those of the keyword arguments of `adaconvert.api`; a test compares defaults and choices
with the method's config class. What a value may be is decided there, not here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from adaconvert.cli.framework import Argument, Option

F = TypeVar("F", bound=Callable[..., object])
Decorator = Callable[[F], F]


def option(section: str, *names: str, **kwargs: Any) -> Decorator[Any]:
    """Return an option that the help lists under `section`."""
    kwargs.setdefault("show_default", kwargs.get("default") is not None)
    return click.option(*names, cls=Option, section=section, **kwargs)


def apply(*decorators: Decorator[Any]) -> Decorator[Any]:
    """Return one decorator that adds all of `decorators`, in the order they are written."""

    def add(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return add


def numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Return numbers separated by commas, none when the option is not given."""
    if value is None:
        return ()
    try:
        return tuple(float(part) for part in value.split(","))
    except ValueError:
        message = f"{value!r} is no list of numbers such as 1,0.75,0.5."
        raise click.BadParameter(message, ctx, param) from None


def evolution_options(section: str) -> tuple[Decorator[Any], ...]:
    """Return the options of a search by evolution, listed under `section`."""
    return (
        option(
            section,
            "--generations",
            type=int,
            default=40,
            metavar="N",
            help="For --search evolve: how many.",
        ),
        option(
            section,
            "--offspring",
            type=int,
            default=16,
            metavar="N",
            help="For --search evolve: of each generation.",
        ),
    )


def sources_argument() -> Decorator[Any]:
    """Return the argument for one or more dense checkpoints."""
    return click.argument(
        "sources",
        cls=Argument,
        metavar="SRC...",
        nargs=-1,
        required=True,
        describe="Checkpoint folder, hub-cache snapshot, or hub id such as org/name. Several of "
        "the same architecture become one model (Branch-Train-MiX).",
    )


def destination_argument(describe: str) -> Decorator[Any]:
    """Return the argument for the folder of the converted checkpoint."""
    return click.argument("destination", cls=Argument, metavar="DST", describe=describe)


def json_option() -> Decorator[Any]:
    """Return the option for output that programs read."""
    return option(
        "other", "--json", "as_json", is_flag=True, help="Print one JSON document instead of text."
    )


def revision_option() -> Decorator[Any]:
    """Return the option that names a commit of a hub repository."""
    return option("output", "--revision", metavar="REV", help="Branch, tag or commit of a hub id.")


def base_option() -> Decorator[Any]:
    """Return the option that says where the base of an adapter folder is."""
    return option(
        "output",
        "--base",
        metavar="SRC",
        help="Of an adapter folder: the model it is for. Default: what it names itself.",
    )


def run_options(*, hidden: bool = False) -> Decorator[Any]:
    """Return what decides how a conversion runs and what is checked, but not what comes out.

    Args:
        hidden: leave them out of the help.
    """
    return apply(
        option(
            "output",
            "--overwrite",
            is_flag=True,
            hidden=hidden,
            help="Replace a DST that adaconvert wrote; it stays until the new one is complete.",
        ),
        option(
            "output",
            "--resume",
            is_flag=True,
            hidden=hidden,
            help="Go on from the last complete file of an interrupted run with the same arguments.",
        ),
        option(
            "checks",
            "--verify/--no-verify",
            default=True,
            hidden=hidden,
            help="Prove the result against the source before DST appears.",
        ),
        probe_options(hidden=hidden),
        option(
            "checks",
            "--allow-nonfinite",
            is_flag=True,
            hidden=hidden,
            help="Convert a source that holds NaN or infinity, and record it.",
        ),
    )


def probe_options(*, hidden: bool = False) -> Decorator[Any]:
    """Return the options for what is compared, and in how much memory."""
    return apply(
        option(
            "checks",
            "--memory",
            hidden=hidden,
            metavar="SIZE",
            help="Memory for the comparison, such as 8GB; a larger model is compared layer by "
            "layer. Default: what is free.",
        ),
        option(
            "checks",
            "--probe",
            hidden=hidden,
            metavar="FILE",
            type=click.Path(exists=True, dir_okay=False),
            help="UTF-8 text to compare on, instead of the text that ships with adaconvert.",
        ),
    )


def upcycle_options() -> Decorator[Any]:
    """Return what decides the result of `upcycle`: routing, experts, and how it is stored."""
    return apply(*_ROUTING, *_EXPERTS, *_STORED)


def source_argument() -> Decorator[Any]:
    """Return the argument for the one checkpoint a command converts."""
    return click.argument(
        "source",
        cls=Argument,
        metavar="SRC",
        describe="Checkpoint folder, hub-cache snapshot, or hub id such as org/name.",
    )


def plain_storage() -> tuple[Decorator[Any], ...]:
    """Return the options for how a result is stored whose tensors keep their dtypes."""
    return tuple(_STORED[i] for i in (1, 2, 4))


def storage_but_dtype() -> tuple[Decorator[Any], ...]:
    """Return every option for how a result is stored but its dtype."""
    return _STORED[1:]


_ROUTING = (
    option(
        "routing", "--experts", type=int, default=8, metavar="N", help="Routed experts per layer."
    ),
    option(
        "routing", "--top-k", type=int, default=2, metavar="K", help="Routed experts per token."
    ),
    option(
        "routing",
        "--router-init",
        type=click.Choice(["small", "zeros", "orthogonal", "hidden"]),
        default="small",
        help="'small': random, neither tied nor saturated; 'hidden': mean hidden states of "
        "--router-prompts.",
    ),
    option(
        "routing",
        "--router-prompts",
        metavar="FILE",
        type=click.Path(exists=True, dir_okay=False),
        help="For --router-init hidden: one prompt a line, a blank line between experts.",
    ),
    option(
        "routing",
        "--aux-loss-coef",
        type=float,
        default=0.01,
        metavar="C",
        help="Balance-loss coefficient written to config.json, for later training.",
    ),
)
_EXPERTS = (
    option(
        "experts",
        "--target",
        default="auto",
        metavar="HOST",
        help="Architecture of the result, such as mixtral or qwen3_moe. 'auto': one that holds the "
        "source exactly and that most runtimes load.",
    ),
    option(
        "experts",
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="Each expert is 1/G of the dense FFN; a power of two.",
    ),
    option(
        "experts",
        "--shared-experts",
        type=click.Choice(["none", "neutral", "split"]),
        default="none",
        help="An always-on expert: 'neutral' adds nothing at first, 'split' takes over part of "
        "the FFN.",
    ),
    option(
        "experts",
        "--shared-width",
        type=int,
        metavar="W",
        help="Neurons of the shared expert. Default: half of the FFN for split, at most 64 for "
        "neutral.",
    ),
    option(
        "experts",
        "--layers",
        metavar="LIST",
        help="Layers to convert, such as 4-20,22, where the host can express it. Default: all.",
    ),
    option(
        "experts",
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="Noise added to each expert, in standard deviations of each matrix.",
    ),
    option(
        "experts",
        "--drop",
        type=float,
        default=0.0,
        metavar="P",
        help="Share of each expert's neurons drawn anew (Drop-Upcycling; 0.5 is the paper's).",
    ),
    option(
        "experts",
        "--drop-index",
        type=click.Choice(["shared", "per-matrix"]),
        default="shared",
        help="One set of neurons for an expert's matrices, or one for each (the published script).",
    ),
    option(
        "experts",
        "--base",
        default="average",
        metavar="SRC|average",
        help="With several sources: where everything outside the FFNs comes from.",
    ),
    option(
        "experts", "--seed", type=int, default=0, metavar="N", help="Seed of every random choice."
    ),
)
_STORED = (
    option(
        "output",
        "--dtype",
        type=click.Choice(["keep", "bfloat16", "float16", "float32"]),
        default="keep",
        help="Stored dtype.",
    ),
    option(
        "output",
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="Largest file, such as 5GB or 500MiB.",
    ),
    revision_option(),
    option(
        "output",
        "--keep-config",
        multiple=True,
        metavar="KEY",
        help="Copy this key of the source's config.json too; may be repeated.",
    ),
    option(
        "checks",
        "--ignore-unindexed",
        is_flag=True,
        help="Leave out tensors the source's index does not list, and record it.",
    ),
)
