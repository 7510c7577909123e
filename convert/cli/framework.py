"""Two click classes: a group whose verbs are imported on demand, and a command with grouped help.

Help is laid out here and not by click, so that it reads the same under every version of click.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click


class Argument(click.Argument):
    """A positional argument with a line of help."""

    def __init__(self, *args: Any, describe: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.describe = describe


class Option(click.Option):
    """An option that names the section of the help it belongs to."""

    def __init__(self, *args: Any, section: str = "other", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class Command(click.Command):
    """A command whose help lists arguments, then options section by section."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Return what is left of `args`; a usage error always knows which command it is about."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the argument section and one section for each group of options."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, Argument):
                row = (param.make_metavar(ctx), param.describe)
                sections.setdefault("arguments", []).append(row)
                continue
            record = param.get_help_record(ctx)
            if record is not None:
                sections.setdefault(getattr(param, "section", "other"), []).append(record)
        # click appends --help at the end; "other" is always the last section
        other = sections.pop("other", [])
        for name, rows in [*sections.items(), ("other", other)]:
            if rows:
                with formatter.section(name.capitalize()):
                    formatter.write_dl(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verb:
    """Where a command lives, and what the list of commands says about it."""

    module: str
    attribute: str
    summary: str


class LazyGroup(click.Group):
    """A group that knows its commands by a closed table and imports one only to run it."""

    def __init__(self, *args: Any, verbs: Mapping[str, Verb], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, which is the order of use."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command after importing its module; None for a name not in the table."""
        verb = self.verbs.get(cmd_name)
        if verb is None:
            return None
        from importlib import import_module

        command = getattr(import_module(verb.module), verb.attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.summary) for name, verb in self.verbs.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command `args` starts with, or fail naming the nearest one."""
        unknown = args and not args[0].startswith("-") and args[0] not in self.verbs
        if unknown and not ctx.resilient_parsing:
            from difflib import get_close_matches

            near = get_close_matches(args[0], self.verbs, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" Commands: {', '.join(self.verbs)}."
            ctx.fail(f"no such command '{args[0]}'.{hint}")
        return super().resolve_command(ctx, args)
