"""The JSON Schema of `recipes schema --json` takes what `validate` takes, and refuses with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from adaconvert.errors import OptionError
from adaconvert.recipe import report, shipped
from adaconvert.recipe.load import load
from adaconvert.recipe.render import resolved

TYPES: Final[dict[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
    "null": (type(None),),
}


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Return whether a value is what a schema of the keywords used here describes."""
    found = [RULES[word](value, rule, schema) for word, rule in schema.items() if word in RULES]
    unknown = set(schema) - set(RULES) - {"$schema", "title", "description", "default"}
    assert not unknown
    return all(found)


def _type(value: Any, rule: str | list[str], schema: dict[str, Any]) -> bool:
    names = [rule] if isinstance(rule, str) else rule
    if isinstance(value, bool):
        return "boolean" in names
    return any(isinstance(value, TYPES[name]) for name in names)


def _inner(value: Any, rule: dict[str, Any], schema: dict[str, Any]) -> bool:
    if not isinstance(value, dict):
        return True
    return all(fits(value[key], rule[key]) for key in value if key in rule)


def _others(value: Any, rule: Any, schema: dict[str, Any]) -> bool:
    others = set(value) - set(schema.get("properties", {})) if isinstance(value, dict) else set()
    return not others if rule is False else all(fits(value[key], rule) for key in others)


def _items(value: Any, rule: dict[str, Any], schema: dict[str, Any]) -> bool:
    # a list of schemas is none since 2020-12
    assert isinstance(rule, dict)
    return not isinstance(value, list) or all(fits(item, rule) for item in value)


RULES: Final[dict[str, Callable[[Any, Any, dict[str, Any]], bool]]] = {
    "type": _type,
    "properties": _inner,
    "additionalProperties": _others,
    "items": _items,
    "const": lambda value, rule, _: value == rule,
    "enum": lambda value, rule, _: value in rule,
    "required": lambda value, rule, _: not isinstance(value, dict) or set(rule) <= set(value),
    "anyOf": lambda value, rule, _: any(fits(value, one) for one in rule),
    "oneOf": lambda value, rule, _: [fits(value, one) for one in rule].count(True) == 1,
    "minItems": lambda value, rule, _: not isinstance(value, list) or len(value) >= rule,
    "pattern": lambda value, rule, _: (
        not isinstance(value, str) or re.search(rule, value) is not None
    ),
    "propertyNames": lambda value, rule, _: (
        not isinstance(value, dict) or all(fits(key, rule) for key in value)
    ),
}


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema as it is printed."""
    found: dict[str, Any] = json.loads(json.dumps(report.schema(None).to_json()))
    return found


@pytest.mark.parametrize("name", shipped.names())
def test_it_takes_every_shipped_recipe(name: str, schema: dict[str, Any]) -> None:
    assert fits(yaml.safe_load(report.show(name).content), schema)


def test_it_takes_what_a_run_leaves_beside_its_result(
    schema: dict[str, Any], tmp_path: Path
) -> None:
    text = resolved(load("upcycle/smollm2-135m"), "dense", None)
    assert fits(yaml.safe_load(text), schema)
    (tmp_path / "r.yaml").write_text(text)
    assert load(tmp_path / "r.yaml").revision is None


def _good() -> dict[str, Any]:
    return {
        "schema": 1,
        "title": "T",
        "method": "m",
        "paper": "p",
        "exactness": "exact",
        "cost": dict.fromkeys(("machine", "disk", "memory", "time"), "x") | {"basis": "estimate"},
        "data": {"text": ["a.jsonl"]},
        "stages": [
            {"upcycle": None},
            {"name": "tune", "finetune": {"data": "$text", "steps": 1, "lr": 1}},
            {"evaluate": {"data": "$text", "set_compute": [1, 0.5]}},
        ],
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: None, ""),
        (lambda r: r.update(source=None, revision=None), ""),
        (lambda r: r["stages"][2]["evaluate"].update(set_compute=0.5), ""),
        (lambda r: r.update(extra=1), "unknown key"),
        (lambda r: r.pop("paper"), "is missing"),
        (lambda r: r.update(schema=2), "newer schema"),
        (lambda r: r.update(exactness="sure"), "unknown class"),
        (lambda r: r["cost"].update(basis="guess"), "is unknown"),
        (lambda r: r["cost"].pop("disk"), "is missing"),
        (lambda r: r["data"].update({"1st": "a"}), "is no name"),
        (lambda r: r.update(stages=[]), "is empty"),
        (lambda r: r["stages"][0].update(moefy=None), "exactly one verb"),
        (lambda r: r["stages"].append({"name": "x"}), "exactly one verb"),
        (lambda r: r["stages"].append({"name": "x", "finetune": None}), "is missing"),
        (lambda r: r["stages"][1].update(name="a b"), "is no name"),
        (lambda r: r["stages"][1]["finetune"].update(lr="fast"), "has the wrong type"),
        (lambda r: r["stages"][1]["finetune"].update(lrr=1), "unknown option"),
        (lambda r: r["stages"][2]["evaluate"].update(set_compute=["x"]), "has the wrong type"),
        (lambda r: r["stages"][2].update({"from": []}), "goes on from one"),
    ],
)
def test_it_and_validate_agree(
    change: Callable[[dict[str, Any]], object],
    message: str,
    schema: dict[str, Any],
    tmp_path: Path,
) -> None:
    recipe = _good()
    change(recipe)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert fits(recipe, schema) is not bool(message)
    if not message:
        load(tmp_path / "r.yaml")
        return
    with pytest.raises(OptionError, match=message):
        load(tmp_path / "r.yaml")
