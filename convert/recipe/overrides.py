"""`--set a.b=c`: one value of a recipe replaced, by a path that must lead somewhere.

source, revision          what is read
data.NAME                 all texts of that name; data.NAME.0 one of them
STAGE.OPTION              STAGE is a stage's name
stages.STAGE.OPTION       STAGE is a stage's name, or its place counted from 0
stages.STAGE.VERB.OPTION  the same in full; one more number is an entry of a list
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from adaconvert.errors import OptionError
from adaconvert.export.hub_secrets import check_argument
from adaconvert.io.names import escape
from adaconvert.recipe import text
from adaconvert.recipe.schema import verb_of
from adaconvert.recipe.text import Fields, Items, Node, Scalar
from adaconvert.recipe.verbs import VERBS
from adaconvert.recipe.words import unknown

_PLAIN: Final = ("source", "revision")
_SETTABLE: Final = (*_PLAIN, "data", "stages")


def apply(root: Fields, setting: str) -> Fields:
    """Return the recipe with one value replaced.

    Args:
        root: the recipe.
        setting: `path=value`; the value is YAML, an empty one stands for the default.

    Raises:
        OptionError: it is no such text, or the path leads nowhere.
    """
    check_argument("--set", setting)
    path, equals, value = setting.partition("=")
    where = f"--set {escape(path, 120)}"
    if not equals or not path.strip():
        raise OptionError(
            "is no setting", where=f"--set {escape(setting, 120)}", expected="path=value"
        )
    return put(root, path.strip(), parse_value(value, where), where)


def parse_value(value: str, where: str) -> Node:
    """Return the node a value given on the command line stands for.

    Raises:
        OptionError: it is no YAML.
    """
    found = text.parse(value, where, line_known=False) if value.strip() else None
    if found is None:
        return Scalar(text="", tag="null", plain=True, place=where)
    if isinstance(found, Fields):
        raise OptionError("takes one value at a time, not a mapping", where=where)
    return found


def put(root: Fields, path: str, value: Node, where: str) -> Fields:
    """Return the recipe with the value at a path replaced.

    Raises:
        OptionError: the path leads nowhere.
    """
    head, *rest = path.split(".")
    stages = root.fields.get("stages")
    names = _names(stages) if isinstance(stages, Items) else []
    if head in _PLAIN and not rest:
        return _with(root, head, value, where)
    if head == "data" and rest:
        return _with(root, "data", _data(root, rest, value, where), root.places.get("data", where))
    if head in names:
        head, rest = "stages", [head, *rest]
    if head == "stages" and isinstance(stages, Items):
        return _with(root, "stages", _stage(stages, names, rest, value, where), stages.place)
    if head in root.fields or head in _SETTABLE:
        raise OptionError(
            "cannot be set as a whole" if head in _SETTABLE else "cannot be set",
            where=where,
            expected="source, revision, data.NAME or STAGE.OPTION",
        )
    raise unknown("path", head, (*_SETTABLE, *names), where)


def _with(node: Fields, key: str, value: Node, where: str) -> Fields:
    return replace(
        node,
        fields={**node.fields, key: value},
        places={**node.places, key: value.place if key in node.fields else where},
    )


def _data(root: Fields, rest: Sequence[str], value: Node, where: str) -> Node:
    data = root.fields.get("data")
    known = data.fields if isinstance(data, Fields) else {}
    if rest[0] not in known or not isinstance(data, Fields):
        raise unknown("text in data", rest[0], known, where)
    new = value if len(rest) == 1 else _entry(known[rest[0]], rest[1:], value, where)
    return _with(data, rest[0], new, where)


def _entry(node: Node, rest: Sequence[str], value: Node, where: str) -> Node:
    """Return a list with one entry replaced."""
    if not isinstance(node, Items):
        raise OptionError("is no list with entries", where=where)
    place = _index(rest[0], len(node.items), where)
    if len(rest) > 1:
        raise OptionError("leads into a value", where=where)
    items = (*node.items[:place], value, *node.items[place + 1 :])
    return replace(node, items=items)


def _index(word: str, count: int, where: str) -> int:
    if not (word.isascii() and word.isdigit() and len(word) < 6 and int(word) < count):
        expected = f"0 to {count - 1}" if count else "nothing: the list is empty"
        raise OptionError(
            "leads to no entry of the list", where=where, expected=expected, found=escape(word, 40)
        )
    return int(word)


def _names(stages: Items) -> list[str]:
    """Return what the stages are called, as far as that can be seen."""
    found = []
    for item in stages.items:
        given = item.fields if isinstance(item, Fields) else {}
        name = given.get("name")
        verbs = [key for key in given if key in VERBS]
        shown = name.text if isinstance(name, Scalar) else (verbs or [""])[0]
        found.append(shown)
    return found


def _stage(
    stages: Items, names: Sequence[str], rest: Sequence[str], value: Node, where: str
) -> Items:
    if not rest:
        raise OptionError("cannot be set as a whole", where=where, expected="stages.STAGE.OPTION")
    if rest[0] in names:
        place = names.index(rest[0])
    elif rest[0].isdigit():
        place = _index(rest[0], len(names), where)
    else:
        raise unknown("stage", rest[0], names, where)
    stage = stages.items[place]
    if not isinstance(stage, Fields):
        raise OptionError("is no stage", where=where)
    changed = _option(stage, rest[1:], value, where)
    return replace(stages, items=(*stages.items[:place], changed, *stages.items[place + 1 :]))


def _option(stage: Fields, rest: Sequence[str], value: Node, where: str) -> Fields:
    verb = verb_of(stage, where)
    table = VERBS[verb].table()
    words = rest[1:] if rest and rest[0] == verb and verb not in table else rest
    if not words:
        raise OptionError("names no option", where=where, expected=", ".join(table))
    if words[0] not in table:
        raise unknown("option", words[0], table, where)
    own = stage.fields[verb]
    if isinstance(own, Scalar) and own.plain and own.tag == "null":
        own = Fields(fields={}, places={}, place=stage.places[verb])
    if not isinstance(own, Fields):
        raise OptionError("is no mapping of options", where=own.place)
    if len(words) > 1:
        if words[0] not in own.fields:
            raise OptionError("is no list with entries", where=where)
        value = _entry(own.fields[words[0]], words[1:], value, where)
    if isinstance(value, Scalar) and value.tag == "null" and not value.text:
        # nothing given: the default
        left = {name: node for name, node in own.fields.items() if name != words[0]}
        return _with(stage, verb, replace(own, fields=left), stage.places[verb])
    return _with(stage, verb, _with(own, words[0], value, where), stage.places[verb])
