"""What a recipe may not ask for though every single value in it is fine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from adaconvert.cli.main import run
from adaconvert.errors import OptionError
from adaconvert.recipe.load import load
from adaconvert.recipe.options import TEXT_SOURCES

HEAD = """\
schema: 1
title: T
method: m
paper: p
exactness: approximate
cost: {basis: estimate, machine: m, disk: d, memory: m, time: t}
data: {text: [a.jsonl]}
stages:
"""
MADE = "  - upcycle: {experts: 2}\n"
TUNED = "  - name: tune\n    finetune: {data: $text, steps: 1}\n"


def written(folder: Path, text: str) -> Path:
    """Return a recipe file."""
    (folder / "r.yaml").write_text(text)
    return folder / "r.yaml"


def evaluation(extra: str = "", name: str = "look") -> str:
    """Return a stage that keeps what it measures."""
    return f"  - name: {name}\n{extra}    evaluate: {{data: $text, record: true}}\n"


def test_results_are_kept_in_the_last_checkpoint(tmp_path: Path) -> None:
    load(written(tmp_path, HEAD + MADE + TUNED + evaluation()))
    load(written(tmp_path, HEAD + MADE + evaluation() + "  - push:\n"))


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        (MADE + evaluation() + TUNED, "expected from: tune, found from: upcycle"),
        (
            MADE + TUNED + evaluation("    from: source\n"),
            "expected from: tune, found from: source",
        ),
        (evaluation(), "expected a stage that makes a checkpoint, found from: source"),
    ],
)
def test_results_are_kept_nowhere_else(tmp_path: Path, stages: str, found: str) -> None:
    """The folder of an earlier stage would change under those that go on from it, and the source
    is not ours to change."""
    with pytest.raises(OptionError) as caught:
        load(written(tmp_path, HEAD + stages))
    assert "stages.look.evaluate.record: keeps results in the last checkpoint" in str(caught.value)
    assert found in str(caught.value)
    load(written(tmp_path, HEAD + stages.replace("true", "false")))


@pytest.mark.parametrize(
    "stages", ["  - push:\n", MADE + "  - from: source\n    push: {repo: me/mine}\n"]
)
def test_a_source_is_not_pushed(tmp_path: Path, stages: str) -> None:
    with pytest.raises(OptionError, match=r"line \d+: stages.push: there is no result to push"):
        load(written(tmp_path, HEAD + stages))


def test_no_stage_is_called_like_the_record_of_a_run(tmp_path: Path) -> None:
    """Its report would be written over `run.json` of the work folder."""
    with pytest.raises(OptionError, match=r"line 10: stages.1: a stage cannot be called 'run'"):
        load(written(tmp_path, HEAD + MADE + evaluation(name="run")))


@pytest.mark.parametrize("key", ["source: ", "extends: ", "data: {text: "])
def test_names_longer_than_a_file_can_have(tmp_path: Path, key: str) -> None:
    name = "x" * 300
    text = (HEAD + MADE).replace("data: {text: [a.jsonl]}\n", "")
    end = "}" if "{" in key else ""
    path = written(tmp_path, f"{text}{key}{name}{end}\n")
    if key == "extends: ":
        with pytest.raises(OptionError, match="unknown recipe 'xxx"):
            load(path)
        written(tmp_path, f"schema: 1\nextends: {name}.yaml\n")
        with pytest.raises(OptionError, match="no such file"):
            load(path)
        return
    recipe = load(path)
    assert name in (recipe.source, *recipe.data.get("text", ()))


def test_a_link_to_itself(tmp_path: Path) -> None:
    os.symlink("r.yaml", tmp_path / "r.yaml")
    with pytest.raises(OptionError, match=r"^r\.yaml: "):
        load(tmp_path / "r.yaml")


CANARY = "hf_CANARYCANARYCANARYCANARYCANARYCANARY"


@pytest.mark.parametrize(
    "line",
    [
        f"source: https://x:{CANARY}@hub/org/name",
        "source: https://me:secret@hub/org/name",
        f"title: by {CANARY}",
        f"{CANARY}: 1",
        f"# {CANARY}",
    ],
)
@pytest.mark.parametrize("verb", ["validate", "show", "cp"])
def test_j2_a_token_in_a_recipe(
    tmp_path: Path, line: str, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would go along into the result and its card."""
    path = written(tmp_path, HEAD.replace("title: T", line) + MADE)
    end = [str(tmp_path / "copy.yaml")] if verb == "cp" else []
    assert run(["recipes", verb, str(path), *end]) == 2
    captured = capsys.readouterr()
    assert "r.yaml line 2: holds an access token or a password" in captured.err
    assert CANARY not in captured.out + captured.err
    assert "secret" not in captured.out + captured.err
    assert not (tmp_path / "copy.yaml").exists()


def test_j2_a_token_in_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, HEAD + MADE + "  - push:\n")
    words = ["recipes", "validate", str(path), "--set"]
    assert run([*words, f"push.commit_message={CANARY}"]) == 2
    captured = capsys.readouterr()
    assert "--set: holds an access token" in captured.err
    assert CANARY not in captured.out + captured.err


def test_held_out_data_is_named_like_any_other(tmp_path: Path) -> None:
    tuned = TUNED.replace("steps: 1", "steps: 1, valid: $text")
    (stage,) = load(written(tmp_path, HEAD + tuned)).stages
    assert stage.does.table()["valid"].role == TEXT_SOURCES
    with pytest.raises(OptionError, match="valid: unknown text in data 'other'"):
        load(written(tmp_path, HEAD + tuned.replace("valid: $text", "valid: $other")))
