"""What decides whether a stage is done again, and where a run may write."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import DataError, OutputConflictError
from adaconvert.io import manifest
from adaconvert.running import texts
from adaconvert.running.job import Job, Request

pytestmark = pytest.mark.usefixtures("uncounted")


def test_a_changed_file_of_an_option_redoes_its_stage(bench: Any) -> None:
    probe = bench.folder / "probe.txt"
    probe.write_text("one text")
    settings = (f"upcycle.probe={probe}",)
    bench.run(settings=settings)
    bench.verbs  # noqa: B018
    bench.run(settings=settings)
    assert bench.verbs == []
    probe.write_text("another text")
    bench.run(settings=settings)
    assert bench.verbs[0] == "convert"


def test_a_changed_checkpoint_of_an_option_redoes_its_stage(bench: Any) -> None:
    other = shutil.copytree(bench.folder / "dense", bench.folder / "other")
    settings = (f"evaluate.reference={other}",)
    bench.run(settings=settings)
    bench.verbs  # noqa: B018
    shutil.copytree(other, bench.folder / "again")
    bench.run(settings=settings)
    assert bench.verbs == []
    shard = next(other.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    bench.run(settings=settings)
    assert bench.verbs == ["evaluate"]


def test_another_hub_is_pushed_to_anew(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    settings = ("push.repo=me/mine",)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    bench.run(settings=settings)
    bench.verbs  # noqa: B018
    bench.run(settings=settings)
    assert bench.verbs == []
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:2")
    bench.run(settings=settings)
    assert bench.verbs == ["push"]


# texts


@pytest.mark.parametrize(
    "text", ["org/name", "org/name:config", "org/name@abc123", "org/name@refs/pr/1:config,0.5"]
)
def test_data_sets_of_the_hub_are_taken(bench: Any, text: str) -> None:
    job = Job.of(_request(bench, f"data.train=['{text}']"))
    assert job.recipe.data["train"] == (text,)


@pytest.mark.parametrize("text", ["data/trian.jsonl", "texts/a.txt,2", "a b.jsonl", "org/name:"])
def test_a_file_that_is_not_there_is_no_data_set(bench: Any, text: str) -> None:
    with pytest.raises(DataError, match=r"^stage 'tune': .*: no such file or folder"):
        bench.run(settings=(f"data.train=['{text}']",))
    assert bench.verbs == []


def test_a_text_in_the_home_folder(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(bench.folder))
    Job.of(_request(bench, "data.train=~/train.jsonl"))
    before = texts.fingerprint("~/train.jsonl")
    assert before == texts.fingerprint(str(bench.folder / "train.jsonl"))
    (bench.folder / "train.jsonl").write_text(json.dumps({"text": "x"}))
    assert texts.fingerprint("~/train.jsonl") != before


def test_a_folder_of_text_with_what_is_no_file(bench: Any) -> None:
    folder = bench.folder / "texts"
    folder.mkdir()
    shutil.copy(bench.folder / "train.jsonl", folder)
    before = texts.fingerprint(str(folder))
    os.symlink("gone", folder / ".#train.jsonl")
    os.mkfifo(folder / "pipe")
    assert texts.fingerprint(str(folder)) == before
    shutil.copy(bench.folder / "valid.jsonl", folder)
    assert texts.fingerprint(str(folder)) != before


def _request(bench: Any, setting: str) -> Request:
    return Request(
        recipe=str(bench.folder / "r.yaml"),
        source=str(bench.folder / "dense"),
        destination=bench.folder / "out",
        settings=(setting,),
    )


# where it writes


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("destination", "work", "message"),
    [
        ("dense", None, "dense: is the source itself"),
        ("dense/out", None, "dense/out: lies inside the source"),
        (".", None, "contains the source"),
        ("out", "dense", "dense: is the source itself"),
        ("out", "dense/work", "dense/work: lies inside the source"),
        ("out", "out", "the work folder and the destination must lie apart"),
        ("out", "out/work", "the work folder and the destination must lie apart"),
        ("work/out", "work", "the work folder and the destination must lie apart"),
    ],
)
def test_the_source_is_never_written_to(
    bench: Any, destination: str, work: str | None, message: str, dry_run: bool
) -> None:
    """Not even one that adaconvert made, and not with --overwrite."""
    dense = bench.folder / "dense"
    shutil.rmtree(dense)
    shutil.copytree(bench.made, dense)
    (bench.folder / "r.yaml").write_text(
        (bench.folder / "r.yaml").read_text().replace("  - upcycle: {experts: 2}\n", "")
    )
    before = _all(bench.folder)
    with pytest.raises(OutputConflictError, match=message):
        bench.run(
            destination=bench.folder / destination,
            work=None if work is None else bench.folder / work,
            overwrite=True,
            dry_run=dry_run,
        )
    assert bench.verbs == []
    assert _all(bench.folder) == before


def _all(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["x" * 255, "\N{SNOWMAN}" * 85, "a b 'c' #d: e"])
def test_names_as_long_and_as_odd_as_the_disk_takes(bench: Any, name: str) -> None:
    source = (bench.folder / "dense").rename(bench.folder / name)
    out = bench.folder / "to" / name
    result = bench.run(source=str(source), destination=out)
    assert manifest.read(out)
    assert bench.run(source=str(source), destination=out).stages[0].status == "unchanged"
    assert result.outline.work.parent == out.parent
    other = bench.folder / "to" / (name[:-1] + "y")
    assert bench.run(source=str(source), destination=other, dry_run=True).outline.work != (
        result.outline.work
    )
