"""Whatever a manifest, a card or a recipe says, it stays text on one line of ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from adaconvert.export.card import render
from adaconvert.export.card_facts import front_matter, license_of
from adaconvert.export.card_text import code, fenced, plain, yaml_text
from adaconvert.io.card_file import CARD
from adaconvert.io.manifest import MANIFEST_FILE

Stages = Callable[[str], Path]

HOSTILE = (
    "a\n---\nlicense: mit\n---\n# title",
    "x\r\n\r\n# heading\n<script>alert(1)</script>",
    "`code` <img src=x onerror=alert(1)> ``",
    "[text](javascript:alert(1)) ![image](http://evil/x.svg)",
    "| cell | cell |\n| --- | --- |",
    "*bold* _slanted_ ~~gone~~ $$x$$ \\(y\\) &lt;b&gt;",
    "\u202egnp.exe\u2028line \x1b[31m red \x00",
    "<!-- written by adaconvert -->",
    "```\nfence\n```",
)


def content(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    record = json.loads((folder / MANIFEST_FILE).read_text())
    return record, json.loads((folder / "config.json").read_text())


def poisoned(value: Any, text: str) -> Any:
    """Return JSON data whose every string is `text`, keys and what decides the layout kept."""
    if isinstance(value, dict):
        kept = {"method", "kind", "bound", "architectures", "model_type", "promise"}
        return {k: v if k in kept else poisoned(v, text) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item, text) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["upcycle", "moefy", "finetune", "two-sources"])
@pytest.mark.parametrize("said", HOSTILE)
def test_strings_of_a_manifest_change_no_structure(name: str, said: str, stages: Stages) -> None:
    record, config = content(stages(name))
    shards = record.pop("shards")
    harmless = render({**poisoned(record, "word"), "shards": shards}, config)
    found = render({**poisoned(record, said), "shards": shards}, config)
    # a licence or an id that is none is left out
    one, other = (_body(card) for card in (harmless, found))
    assert [_shape(line) for line in other] == [_shape(line) for line in one]
    front = yaml.safe_load(found.split("---\n")[1])
    assert front["tags"] == yaml.safe_load(harmless.split("---\n")[1])["tags"]
    assert set(front) <= {"library_name", "pipeline_tag", "tags"}
    assert ModelCard(found).data.license is None
    assert found.isascii()
    assert not {"<script", "<img", "<b>"} & set(re.findall("<[a-z]+>?", _without_code(found)))
    assert _without_code(found).count("<!--") == 1


def _body(card: str) -> list[str]:
    return card[card.index("<!-- written") :].splitlines()


def _shape(line: str) -> str:
    """Return what makes a line a block, and the number of its cells."""
    line = re.sub("`{3,}", "```", line)
    first = line.split(" ", 1)[0] if line[:1] in "#-|`!0123456789" else "text" if line else ""
    cells = line.replace("\\|", "").count("|") if first == "|" else 0
    return f"{len(line) - len(line.lstrip())} {first} {cells}"


def _without_code(text: str) -> str:
    """Return a card without code blocks and code spans."""
    outside = re.sub(r"^(`{3,})\w*$.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(outside.split("`")[::2])


@given(st.text(max_size=60))
def test_plain_text_holds_no_markup(text: str) -> None:
    shown = plain(text)
    assert shown.isascii()
    assert shown.isprintable()
    outside = "".join(shown.split("`")[::2])
    assert not set(outside) & set("<>")
    assert not set(outside.replace("\\", "  ")[:1]) & set("#=")
    # every bracket, star and bar is behind a backslash
    for at, character in enumerate(outside):
        if character in "[]*|~$!":
            assert outside[at - 1] == "\\"


@given(st.text(max_size=60))
def test_a_code_span_cannot_be_left(text: str) -> None:
    shown = code(text)
    assert shown.count("`") == 2
    assert shown[0] == shown[-1] == "`"
    assert "\n" not in shown
    assert shown.replace("\\|", "").count("|") == 0


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), max_size=30))
def test_yaml_reads_back_what_was_written(text: str) -> None:
    assert yaml.safe_load(yaml_text(text)) == text


@pytest.mark.parametrize("text", ["no", "1e-4", "null", "0x1", "~", "a: b", "2026-01-01", "- x"])
def test_yaml_takes_no_text_for_anything_else(text: str) -> None:
    assert yaml.safe_load(f"license: {yaml_text(text)}") == {"license": text}


@given(st.text(max_size=200))
def test_nothing_ends_a_fence_but_its_own_end(text: str) -> None:
    first, *inside, last = fenced([text, "second"], "yaml")
    assert len(inside) == 2
    assert first == f"{last}yaml"
    assert all(not line.strip().startswith(last) for line in inside)


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ('license: "mit"\nlicense_link: LICENSE', {"license": "mit", "license_link": "LICENSE"}),
        ("license:\n- mit", {"license": "mit"}),
        ("license:\n- mit\n- apache-2.0", {"license": ["mit", "apache-2.0"]}),
        ("license_name: alone", {}),
        ("license: 1.0", {}),
        ('license: "a\\n---\\nb"', {}),
        ("license: <b>x</b>", {}),
        ("license: !!python/object/apply:os.system [id]", {}),
        ("license: [" * 5000, {}),
        ("license: 2026-13-45", {}),
        ("license: &a [*a]", {}),
        ("[not, a, mapping]", {}),
    ],
)
def test_a_licence_is_plain_text_or_none(front: str, found: object, tmp_path: Path) -> None:
    (tmp_path / CARD).write_text(f"---\n{front}\n---\n# x\n")
    assert license_of(front_matter(tmp_path)) == found


def test_a_front_matter_that_never_ends_or_is_no_text_is_none(tmp_path: Path) -> None:
    assert front_matter(tmp_path) == {}
    (tmp_path / CARD).write_text("---\nlicense: mit\n")
    assert front_matter(tmp_path) == {}
    (tmp_path / CARD).write_bytes(b"---\nlicense: \xff\n---\n")
    assert front_matter(tmp_path) == {}


def test_a_recipe_is_shown_in_full_and_cannot_leave_its_block(stages: Stages) -> None:
    record, config = content(stages("upcycle"))
    recipe = "# run me\nstages:\n- upcycle: {}\n````\n# heading\n\x1b[31m"
    text = render(record, config, recipe)
    assert "`````yaml\n# run me\nstages:\n- upcycle: {}\n````\n# heading\n\\x1b[31m\n`````" in text
    assert "adaconvert run adaconvert_recipe.yaml" in text
