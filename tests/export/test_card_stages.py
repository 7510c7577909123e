"""The card of every stage: its text, its front matter, and that it can be made again."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from huggingface_hub import ModelCard

import adaconvert
from adaconvert import api
from adaconvert.io import manifest
from adaconvert.io.card_file import CARD, PLOT
from adaconvert.testing.writing import tree_digest
from adaconvert.verification.integrity import check

Stages = Callable[[str], Path]

GOLDEN = Path(__file__).parents[1] / "golden" / "cards"
NAMES = ("upcycle", "moefy", "d2dmoe", "finetune", "calibrated", "two-sources")
#: numbers that were measured or fitted differ in their last digits between machines.
_MEASURED = re.compile(r"[-+]?\d+\.\d+(e[-+]?\d+)?|\b\d+(?= ?%)|\b1e-\d+\b|(?<=block )\d+")


def card_of(folder: Path) -> str:
    return (folder / CARD).read_text()


def comparable(text: str) -> str:
    """Return a card without measured digits and the options of fine-tunes."""
    lines = [line for line in text.splitlines() if not line.startswith("   - Options: `accumulate")]
    return _MEASURED.sub("#", "\n".join(lines)) + "\n"


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_the_golden_one(name: str, stages: Stages, update_golden: bool) -> None:
    found, golden = comparable(card_of(stages(name))), GOLDEN / f"{name}.md"
    if update_golden:
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text(), "run pytest --update-golden and read the difference"


@pytest.mark.parametrize("name", NAMES)
def test_the_front_matter_is_what_the_hub_reads(name: str, stages: Stages) -> None:
    text = card_of(stages(name))
    front = yaml.safe_load(text.split("---\n")[1])
    known = ModelCard(text).data
    assert known.to_dict() == front
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == ["org/tiny"]
    assert front["base_model_relation"] == ("merge" if name == "two-sources" else "finetune")
    assert {"adaconvert", "moe"} <= set(front["tags"])
    adaptive = name in {"moefy", "d2dmoe", "calibrated"}
    assert ("custom_code" in front["tags"]) == ("adaptive-compute" in front["tags"]) == adaptive


@pytest.mark.parametrize("name", NAMES)
def test_the_licence_goes_along_through_every_stage(name: str, stages: Stages) -> None:
    front = yaml.safe_load(card_of(stages(name)).split("---\n")[1])
    stated = {key: front.get(key) for key in ("license", "license_name", "license_link")}
    if name == "two-sources":
        # the other one says nothing, so nothing is said of both
        assert stated == dict.fromkeys(stated)
        text = card_of(stages(name))
        assert "- `org/tiny`: gemma, terms, https\\://example.com/t" in text
        assert "- `other`: not stated" in text
        return
    link = "https://example.com/t"
    assert stated == {"license": "gemma", "license_name": "terms", "license_link": link}


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_made_again_byte_for_byte(name: str, stages: Stages, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stages(name), tmp_path / name))
    before = tree_digest(folder)
    result = api.card(folder)
    assert (result.written, result.edited) == (False, False)
    assert result.lines() == [f"{folder}/README.md is up to date"]
    (folder / CARD).unlink()
    (folder / PLOT).unlink(missing_ok=True)
    assert api.card(folder).written
    assert tree_digest(folder) == before
    assert check(folder, manifest.read(folder)).problems == ()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_this_machine_is_in_it(name: str, stages: Stages) -> None:
    folder = stages(name)
    for file in (CARD, manifest.MANIFEST_FILE, PLOT):
        if not (folder / file).exists():
            continue
        said = (folder / file).read_text()
        for private in (str(folder.parent), socket.gethostname(), f"{getpass.getuser()}@"):
            assert private not in said
        assert not re.search(r"(?<![\w.:/])/(home|tmp|root|work|Users|var)/", said)


def test_history_is_every_stage_before_oldest_first(stages: Stages, tmp_path: Path) -> None:
    record = manifest.read(stages("finetune"))
    first, *more = manifest.history(record)
    assert (first["method"], first["into"], more) == ("upcycle", "upcycle", [])
    assert first["sources"][0]["label"] == "org/tiny"  # type: ignore[index]
    assert "shards" not in first
    merged = tmp_path / "merged"
    changed = Path(shutil.copytree(stages("calibrated"), tmp_path / "changed"))
    adaconvert.convert(changed, destination=merged, method="unmoefy")
    (stage,) = manifest.history(manifest.read(merged))
    assert stage["method"] == "moefy"
    assert stage["into"] == "changed"
    text = card_of(merged)
    assert "# tiny, dense again" in text
    assert "adaptive-compute" not in text
    assert "Compute and loss" not in text


def test_stages_that_two_sources_share_are_told_once(stages: Stages) -> None:
    folder = stages("upcycle")
    found = manifest.histories_of([(folder, "a"), (folder, "a"), (folder, "b")])
    assert [stage["into"] for stage in found] == ["a", "b"]


def test_the_history_of_other_weights_is_not_told(stages: Stages) -> None:
    folder = stages("upcycle")
    weights = manifest.weights_of(manifest.read(folder))
    assert len(manifest.history_of(folder, weights=weights)) == 1
    assert manifest.history_of(folder, weights="0" * 64) == []


def test_a_calibration_is_drawn_with_words_for_those_who_do_not_see_it(stages: Stages) -> None:
    folder = stages("calibrated")
    assert f"]({PLOT})" in card_of(folder)
    drawn = ElementTree.fromstring((folder / PLOT).read_text())
    name = "{http://www.w3.org/2000/svg}"
    assert drawn.get("role") == "img"
    ids = str(drawn.get("aria-labelledby")).split()
    said = {child.get("id"): child.text for child in drawn if child.get("id")}
    assert set(ids) == set(said)
    assert str(said["description"]).startswith("3 measured settings: compute 0.")
    texts = [child.text or "" for child in drawn.iter(f"{name}text")]
    assert "loss (nats per token)" in texts
    assert "compute (routed FLOPs per token over the reference's)" in texts
    assert any(text.startswith("default: 0.") for text in texts)
    assert len(list(drawn.iter(f"{name}circle"))) == 4


def test_a_stale_calibration_is_left_out_and_told(stages: Stages, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stages("calibrated"), tmp_path / "stale"))
    assert "note: calibrated at 3 settings" in api.inspect(folder).lines()
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.5}))
    reason = "config.json has changed since"
    assert f"note: the calibration table does not hold: {reason}" in api.inspect(folder).lines()
    assert api.card(folder).written
    text = card_of(folder)
    assert "## Compute and loss" not in text
    assert f"Its calibration table is left out: {reason}." in text
    assert not (folder / PLOT).exists()
    assert PLOT not in manifest.read(folder)["files"]  # type: ignore[operator]


def test_an_older_output_gets_a_card_of_what_is_known(stages: Stages, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(stages("upcycle"), tmp_path / "old"))
    record = {k: v for k, v in manifest.read(folder).items() if k not in {"card", "history"}}
    (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump(record))
    assert api.card(folder).written
    text = card_of(folder)
    assert "license: gemma" in text
    assert "- org/tiny\nbase_model_relation: finetune" in text
    assert "# tiny, upcycled to 4 experts" in text
    assert "| parameters, total | 76.19 K |" in text
    assert not api.card(folder).written
    assert check(folder, manifest.read(folder)).problems == ()


def test_sources_of_several_licences_are_told_one_by_one(stages: Stages, tmp_path: Path) -> None:
    sources = []
    for name, license in (("one", "mit"), ("two", "apache-2.0")):
        folder = Path(shutil.copytree(stages("upcycle").parent / "other", tmp_path / name))
        (folder / CARD).write_text(f"---\nlicense: {license}\n---\n")
        sources.append(folder)
    adaconvert.convert(*sources, destination=tmp_path / "out", experts=2, verify=False)
    text = card_of(tmp_path / "out")
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "those-of-the-base-models")
    assert "- `one`: mit\n- `two`: apache-2.0\n" in text
    assert "base_model" not in front
    assert "# one and two, upcycled to 2 experts" in text
