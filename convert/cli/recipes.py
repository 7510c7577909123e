"""`adaconvert recipes ls | show | cp | validate | schema`."""

from __future__ import annotations

import click

from adaconvert.cli import options, output, versions
from adaconvert.cli.framework import Argument, Command, LazyGroup, Verb
from adaconvert.cli.options import option
from adaconvert.cli.settings import begin, verbosity_options

_HERE = "adaconvert.cli.recipes"
VERBS = {
    "ls": Verb(module=_HERE, attribute="ls", summary="List the recipes that come along."),
    "show": Verb(module=_HERE, attribute="show", summary="Print one."),
    "cp": Verb(module=_HERE, attribute="cp", summary="Copy one to where it can be edited."),
    "validate": Verb(module=_HERE, attribute="validate", summary="Check recipe files."),
    "schema": Verb(module=_HERE, attribute="schema", summary="Say what a recipe may hold."),
}


@click.group("recipes", cls=LazyGroup, verbs=VERBS)
@verbosity_options
def recipes() -> None:
    """List, show, copy and check recipes; `adaconvert run` runs one."""


def _recipe_argument() -> options.Decorator[click.Command]:
    return click.argument(
        "recipe",
        cls=Argument,
        metavar="RECIPE",
        describe="Name such as upcycle/smollm2-135m, or a file.",
    )


@click.command("ls", cls=Command)
@options.json_option()
@verbosity_options
def ls(as_json: bool) -> None:
    """List the recipes that come with adaconvert."""
    begin(versions.RECIPES)
    from adaconvert.recipe import report

    output.show(report.listing(), as_json=as_json)


@click.command("show", cls=Command)
@_recipe_argument()
@options.json_option()
@verbosity_options
def show(recipe: str, as_json: bool) -> None:
    """Print a recipe; its first line is the command that runs it."""
    begin(versions.RECIPES)
    from adaconvert.recipe import report

    output.show(report.show(recipe), as_json=as_json)


@click.command("cp", cls=Command)
@_recipe_argument()
@click.argument(
    "destination",
    cls=Argument,
    metavar="[DEST]",
    required=False,
    describe="New file, or folder for it. Default: this folder.",
)
@options.json_option()
@verbosity_options
def cp(recipe: str, destination: str | None, as_json: bool) -> None:
    """Copy a recipe to where it can be edited; no file is replaced."""
    begin(versions.RECIPES)
    from adaconvert.recipe import report

    output.show(report.copy(recipe, destination), as_json=as_json)


@click.command("validate", cls=Command)
@click.argument(
    "files",
    cls=Argument,
    metavar="RECIPE...",
    nargs=-1,
    required=True,
    describe="Files or names.",
)
@option(
    "recipe",
    "--set",
    "settings",
    multiple=True,
    metavar="PATH=VALUE",
    help="Check with a value changed, as for run; may be repeated.",
)
@options.json_option()
@verbosity_options
def validate(files: tuple[str, ...], settings: tuple[str, ...], as_json: bool) -> None:
    """Check recipes: every key, every value and every reference, with line numbers.

    No checkpoint is opened; `adaconvert run --dry-run` also plans on one.
    """
    begin(versions.RECIPES)
    from adaconvert.recipe import report

    output.show(report.validate(files, settings), as_json=as_json)


@click.command("schema", cls=Command)
@click.argument(
    "verb",
    cls=Argument,
    metavar="[VERB]",
    required=False,
    describe="List the options of this verb instead.",
)
@options.json_option()
@verbosity_options
def schema(verb: str | None, as_json: bool) -> None:
    """Say what a recipe may hold; --json prints JSON Schema, which editors understand."""
    begin(versions.RECIPES)
    from adaconvert.recipe import report

    output.show(report.schema(verb), as_json=as_json)
