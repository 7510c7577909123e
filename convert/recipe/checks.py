"""What options of a stage must hold to besides their types: references, needs, the API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from adaconvert.errors import AdaconvertError, OptionError
from adaconvert.io.names import escape
from adaconvert.recipe.model import SOURCE, Stage
from adaconvert.recipe.options import CHECKPOINT, FILE, TEXT_SOURCE, TEXT_SOURCES, VALUE
from adaconvert.recipe.verbs import MAKES_CHECKPOINT, MAKES_REPOSITORY
from adaconvert.recipe.words import unknown

#: stands for a text that is still to be given.
MISSING_TEXT: Final = "data"


def check_options(stage: Stage, data: Mapping[str, tuple[str, ...]], before: list[Stage]) -> None:
    """Return only when the API will accept the options of a stage.

    Raises:
        OptionError: a reference leads nowhere, an option is missing, or a value is wrong.
    """
    table = stage.does.table()
    checkpoints = [SOURCE, *(s.name for s in before if s.does.makes == MAKES_CHECKPOINT)]
    given = {}
    for name, value in stage.options.items():
        where = _where(stage, name)
        given[name] = _resolved(value, table[name].role, data, checkpoints, where)
    for name in stage.does.needs:
        if not given.get(name):
            raise OptionError("is missing", where=_where(stage, name))
    try:
        stage.does.check(given)
    except AdaconvertError as error:
        raise _placed(error, stage) from error
    except TypeError as error:
        raise OptionError(
            f"cannot be used: {escape(str(error), 120)}", where=f"{stage.place}: {stage.name}"
        ) from error


def check_recorded(stages: Sequence[Stage]) -> None:
    """Return only when what evaluations keep is kept in the destination.

    The folders of earlier stages and the source are read by others and stay as they are.

    Raises:
        OptionError: an evaluation would keep its result elsewhere.
    """
    made = [stage.name for stage in stages if stage.does.makes == MAKES_CHECKPOINT]
    for stage in stages:
        if stage.options.get("record") is True and stage.inputs[0] not in made[-1:]:
            raise OptionError(
                "keeps results in the last checkpoint of a recipe",
                where=_where(stage, "record"),
                expected=f"from: {made[-1]}" if made else "a stage that makes a checkpoint",
                found=f"from: {stage.inputs[0]}",
                hint="Leave it out: the report of every evaluation is kept in the work folder.",
            )


def check_pushed(stages: Sequence[Stage]) -> None:
    """Return only when every push has a result to send.

    Raises:
        OptionError: one would send the source.
    """
    for stage in stages:
        if stage.does.makes == MAKES_REPOSITORY and stage.inputs[0] == SOURCE:
            raise OptionError(
                "there is no result to push",
                where=f"{stage.place}: stages.{stage.name}",
                expected="from: a stage that makes a checkpoint",
                found=f"from: {SOURCE}",
            )


def _where(stage: Stage, name: str) -> str:
    place = stage.places.get(name, stage.place)
    return f"{place}: stages.{stage.name}.{stage.verb}.{name}"


def _resolved(
    value: Any,
    role: str,
    data: Mapping[str, tuple[str, ...]],
    checkpoints: list[str],
    where: str,
) -> Any:
    """Return a value with something in the place of every reference, so that it can be checked."""
    if role == TEXT_SOURCES:
        return tuple(t for text in value for t in _texts_of(text, data, where))
    if role == TEXT_SOURCE and value is not None:
        texts = _texts_of(value, data, where)
        if len(texts) > 1:
            raise OptionError("takes one text", where=where, found=f"{len(texts)} in {value}")
        return texts[0]
    if role == CHECKPOINT and isinstance(value, str) and value.startswith("$"):
        if value[1:] not in checkpoints:
            raise unknown("earlier stage", value[1:], checkpoints, where)
        return value[1:]
    if role in (VALUE, FILE) and isinstance(value, str) and value.startswith("$"):
        raise OptionError("refers to nothing here", where=where, found=escape(value, 60))
    return value


def _texts_of(text: str, data: Mapping[str, tuple[str, ...]], where: str) -> tuple[str, ...]:
    if not text.startswith("$"):
        return (text,)
    if text[1:] not in data:
        raise unknown("text in data", text[1:], data, where)
    return data[text[1:]] or (MISSING_TEXT,)


def _placed(error: AdaconvertError, stage: Stage) -> OptionError:
    """Return an error of a config class with the line of the option it is about."""
    flag = (error.where or "").split(" ")[0]
    name = flag.removeprefix("--").replace("-", "_")
    known = name in stage.does.table()
    where = _where(stage, name) if known else f"{stage.place}: stages.{stage.name}.{stage.verb}"
    message = error.message if known or not error.where else f"{error.where}: {error.message}"
    return OptionError(
        message, where=where, expected=error.expected, found=error.found, hint=error.hint
    )
