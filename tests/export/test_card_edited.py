"""A card its owner edited is kept by every command, and everything else about it is atomic."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import adaconvert
from adaconvert import api
from adaconvert.cli.main import run
from adaconvert.errors import (
    OptionError,
    OutputConflictError,
    ResourceError,
    SourceError,
    VerificationError,
)
from adaconvert.export.recard import renew_card
from adaconvert.io import manifest
from adaconvert.io.card_file import CARD, MARKER, PLOT, is_edited
from adaconvert.testing.writing import FailingFileSystem, RecordingFileSystem, tree_digest
from adaconvert.verification.integrity import check

Stages = Callable[[str], Path]
MINE = "\nWhat I know of it.\n"


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def edit(folder: Path) -> bytes:
    """Return the card after its owner has added to it."""
    card = folder / CARD
    card.write_text(card.read_text() + MINE)
    return card.read_bytes()


@pytest.fixture
def edited(stages: Stages, tmp_path: Path) -> Path:
    folder = copied(stages("moefy"), tmp_path / "edited")
    edit(folder)
    return folder


def test_a_card_is_edited_when_its_bytes_or_its_mark_are_gone(
    stages: Stages, tmp_path: Path
) -> None:
    folder = copied(stages("upcycle"), tmp_path / "out")
    assert not is_edited(folder)
    (folder / CARD).unlink()
    assert not is_edited(folder)
    (folder / CARD).write_text("mine")
    assert is_edited(folder)
    (folder / CARD).unlink()
    (folder / CARD).mkdir()
    assert is_edited(folder)


def test_card_keeps_it_unless_told(edited: Path) -> None:
    before = tree_digest(edited)
    result = api.card(edited)
    assert (result.written, result.edited) == (False, True)
    assert "was edited since adaconvert wrote it, and stays as it is" in result.lines()[0]
    assert tree_digest(edited) == before
    result = api.card(edited, overwrite=True)
    assert (result.written, result.edited) == (True, True)
    assert MINE not in (edited / CARD).read_text()
    assert api.card(edited).lines() == [f"{edited}/README.md is up to date"]


def test_an_edited_card_is_no_damage(edited: Path) -> None:
    found = check(edited, manifest.read(edited))
    assert found.problems == ()
    assert found.notes == ("README.md was edited since adaconvert wrote it",)
    (edited / "config.json").write_text("{}")
    problems = [problem.line() for problem in check(edited, manifest.read(edited)).problems]
    assert "config.json: differs from its hash in adaconvert.json" in problems
    (edited / CARD).unlink()
    problems = [problem.line() for problem in check(edited, manifest.read(edited)).problems]
    assert "README.md: is missing" in problems


def test_a_conversion_does_not_replace_it(stages: Stages, edited: Path) -> None:
    before = tree_digest(edited)
    source = stages("upcycle").parent / "other"
    options = {"destination": edited, "experts": 2, "verify": False, "overwrite": True}
    message = r"edited: holds a README\.md that was edited since adaconvert wrote it"
    with pytest.raises(OutputConflictError, match=message):
        adaconvert.convert(source, **options)
    assert tree_digest(edited) == before
    (edited / CARD).unlink()
    adaconvert.convert(source, **options)
    assert MARKER in (edited / CARD).read_text()


def test_calibrate_takes_it_along(edited: Path, text: Path, tmp_path: Path) -> None:
    mine = (edited / CARD).read_bytes()
    options = {"length": 32, "rules": ("top-k",), "values": (8, 4)}
    api.calibrate(edited, text, **options)
    assert (edited / CARD).read_bytes() == mine
    assert (edited / PLOT).exists()
    assert check(edited, manifest.read(edited)).problems == ()
    # it is still known to be edited
    assert not api.card(edited).written
    api.calibrate(edited, text, destination=tmp_path / "copy", **options)
    assert (tmp_path / "copy" / CARD).read_bytes() == mine
    api.card(edited, overwrite=True)
    assert "## Compute and loss" in (edited / CARD).read_text()


def test_what_evaluate_records_is_in_the_card(
    stages: Stages, text: Path, hub: Path, tmp_path: Path
) -> None:
    folder = copied(stages("calibrated"), tmp_path / "out")
    options = {"data": text, "length": 32, "max_documents": 4, "speed": False}
    found = api.evaluate(folder, reference=hub, record=True, set_compute=(1.0, 0.95), **options)
    said = (folder / CARD).read_text()
    assert "## Quality" in said
    assert f"on {found.data['tokens']} tokens of 4 documents of `docs.jsonl`." in said
    assert "| reference | " in said
    row = found.results[0]
    assert row.loss is not None
    assert f"| {row.loss.value:.4f} | {row.perplexity:.4f} | " in said
    assert not api.card(folder).written
    assert check(folder, manifest.read(folder)).problems == ()
    # another default is another model
    api.calibrate(folder, text, length=32, rules=("top-k",), values=(8, 4))
    assert "## Quality" not in (folder / CARD).read_text()


def test_what_was_measured_on_several_texts_is_all_told(
    stages: Stages, text: Path, tmp_path: Path
) -> None:
    folder = copied(stages("upcycle"), tmp_path / "out")
    other = Path(shutil.copy(text, tmp_path / "other.jsonl"))
    options = {"length": 32, "speed": False, "record": True}
    for where, count in ((text, 2), (other, 2), (text, 3)):
        api.evaluate(folder, data=where, max_documents=count, **options)
    kept = manifest.read(folder)["quality"]
    assert [(entry["data"], entry["documents"]) for entry in kept] == [
        ("other.jsonl", 2),
        ("docs.jsonl", 3),
    ]
    said = (folder / CARD).read_text()
    assert said.count("## Quality") == 1
    for entry in kept:
        assert f"tokens of {entry['documents']} documents of `{entry['data']}`." in said
    # as it was kept before there could be several
    old = manifest.read(folder) | {"quality": kept[0]}
    (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump(old))
    assert api.card(folder).written
    assert "documents of `other.jsonl`." in (folder / CARD).read_text()


def test_evaluate_records_beside_an_edited_card(edited: Path, text: Path) -> None:
    mine = (edited / CARD).read_bytes()
    options = {"data": text, "length": 32, "max_documents": 2, "speed": False, "record": True}
    found = api.evaluate(edited, **options)
    assert "README.md was edited and stays as it is; adaconvert.json has the results" in found.notes
    assert (edited / CARD).read_bytes() == mine
    assert "quality" in manifest.read(edited)
    assert not api.card(edited).written


def test_results_are_kept_of_whole_outputs_only(
    stages: Stages, text: Path, hub: Path, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="--record: keeps what text shows: give --data"):
        api.evaluate(hub, tasks=("x",), record=True)
    with pytest.raises(VerificationError, match=r"adaconvert\.json: is missing"):
        api.evaluate(hub, data=text, record=True)
    with pytest.raises(OptionError, match="--record: keeps results in a folder"):
        api.evaluate("org/name", data=text, record=True)
    folder = copied(stages("upcycle"), tmp_path / "out")
    shard = next(folder.glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(SourceError, match=r"is not the shard adaconvert\.json lists"):
        api.evaluate(folder, data=text, record=True)


def test_a_failing_disk_leaves_the_old_folder_or_the_new(stages: Stages, tmp_path: Path) -> None:
    folder = tmp_path / "parent" / "out"

    def fresh() -> None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        copied(stages("upcycle"), folder)
        edit(folder)

    fresh()
    old = tree_digest(folder)
    watch = RecordingFileSystem()
    renew_card(folder, overwrite=True, fs=watch)
    new = tree_digest(folder)
    assert new != old
    # weights get a second name, nothing of them is copied
    assert not [s for s in watch.steps if s.action == "create" and "safetensors" in s.subject]
    for step in watch.steps:
        fresh()
        with suppress(ResourceError):
            renew_card(folder, overwrite=True, fs=FailingFileSystem(step, errno.ENOSPC))
        assert tree_digest(folder) in (old, new), step


def test_a_folder_with_other_files_is_not_touched(stages: Stages, tmp_path: Path) -> None:
    folder = copied(stages("upcycle"), tmp_path / "out")
    edit(folder)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputConflictError, match=r"holds 'notes\.txt', which adaconvert did not"):
        api.card(folder, overwrite=True)


def test_the_command_says_what_it_did(edited: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["card", str(edited)]) == 0
    assert "note: --overwrite writes it anew" in capsys.readouterr().out
    assert run(["card", str(edited), "--overwrite", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"folder": "edited", "written": True, "edited": True}
    assert run(["card", str(edited)]) == 0
    assert capsys.readouterr().out == f"{edited}/README.md is up to date\n"


def test_the_command_fails_with_the_code_of_its_error(
    stages: Stages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["card", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert run(["card", str(stages("upcycle").parent / "other")]) == 5
    assert "adaconvert.json: is missing or cannot be read" in capsys.readouterr().err
    folder = copied(stages("upcycle"), tmp_path / "out")
    record = folder / manifest.MANIFEST_FILE
    record.write_text(record.read_text().replace("the dense", "another", 1))
    assert run(["card", str(folder)]) == 5
    assert "adaconvert.json: was edited after it was written" in capsys.readouterr().err
