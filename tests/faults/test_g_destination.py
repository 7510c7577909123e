"""G1, G2, G3, G13, G14, G16, G17, G21: where an output may go, and what is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.errors import AdaconvertError, OutputConflictError, ResourceError
from adaconvert.io.destination import Destination
from adaconvert.testing.writing import (
    HookedFileSystem,
    RecordingFileSystem,
    TinyRun,
    in_child,
    is_new_shard,
    tiny_source,
    tree_digest,
)

NOBODY = 65534


def refused(tiny: TinyRun, message: str) -> None:
    """Check that nothing on the disk changes when the destination is refused."""
    fs = RecordingFileSystem()
    before = tree_digest(tiny.source.parent)
    with pytest.raises(OutputConflictError, match=message) as caught:
        tiny.run(fs)
    assert caught.value.exit_code == 4
    assert fs.steps == []
    assert tree_digest(tiny.source.parent) == before


def a_full_folder(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    path.symlink_to("elsewhere")


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_full_folder, "out: exists and is not empty. .*--overwrite"),
        (a_file, "out: exists and is not a folder"),
        (a_link, "out: exists and is a symbolic link"),
        (a_dangling_link, "out: exists and is a symbolic link"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_g1_taken(
    tiny: TinyRun, make: Callable[[Path], None], message: str, overwrite: bool
) -> None:
    make(tiny.destination)
    if make is a_full_folder and overwrite:
        message = "out: holds no adaconvert.json, so adaconvert did not write it"
    refused(replace(tiny, overwrite=overwrite), message)


def test_g1_empty_folder_is_used(tiny: TinyRun) -> None:
    tiny.destination.mkdir()
    tiny.run()
    assert (tiny.destination / "adaconvert.json").is_file()


def test_g1_below_a_file(tiny: TinyRun, memory: Path) -> None:
    (memory / "file").write_text("mine")
    refused(replace(tiny, destination=memory / "file" / "out"), "out: lies below a file")


@pytest.mark.parametrize(
    ("destination", "message"),
    [
        ("src", "src: is the source itself"),
        ("src/../src", "src: is the source itself"),
        ("src/out", "out: lies inside the source"),
        ("src/deep/er/out", "out: lies inside the source"),
        ("link/out", "out: lies inside the source"),
        (".", r": contains the source"),
        ("link", "link: is the source itself"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_g2_overlap(
    tiny: TinyRun, memory: Path, destination: str, message: str, overwrite: bool
) -> None:
    (memory / "link").symlink_to("src")
    refused(replace(tiny, destination=memory / destination, overwrite=overwrite), message)


def test_g2_source_given_through_a_link(tiny: TinyRun, memory: Path) -> None:
    (memory / "link").symlink_to("src")
    through = replace(tiny, source=memory / "link", destination=memory / "src" / "out")
    refused(through, "out: lies inside the source")


def test_g2_source_in_the_reserved_neighbour(tiny: TinyRun, memory: Path) -> None:
    inside = tiny_source(memory / ".out.adaconvert-partial" / "checkpoint")
    refused(replace(tiny, source=inside), "out: contains the source")


def test_g2_bind_mount(tiny: TinyRun, memory: Path) -> None:
    other = memory / "other"
    other.mkdir()
    script = 'mount --bind "$1" "$2" 2>/dev/null || exit 77; shift 2; exec "$@"'
    code = (
        "import sys; from pathlib import Path; from adaconvert.testing.writing import *\n"
        "TinyRun(source=Path(sys.argv[1]), destination=Path(sys.argv[2])).run()"
    )
    run = [sys.executable, "-c", code, str(tiny.source), str(other / "out")]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", str(tiny.source), str(other), *run],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting needs root")
    assert "out: lies inside the source" in done.stderr
    assert not (tiny.source / "out").exists()


def test_g1_a_mount_point_is_refused(tiny: TinyRun) -> None:
    at_proc = replace(tiny, destination=Path("/proc"))
    refused(at_proc, "proc: is a mount point. Name a new folder inside it instead")


def test_g3_missing_parents_are_made(tiny: TinyRun, memory: Path) -> None:
    deep = replace(tiny, destination=memory / "a" / "b" / "out")
    deep.run()
    assert (memory / "a" / "b" / "out" / "adaconvert.json").is_file()
    assert os.listdir(memory / "a" / "b") == ["out"]


@pytest.mark.parametrize("below", ["out", "new/out"])
def test_g3_parent_not_writable(tiny: TinyRun, memory: Path, below: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        source = tiny_source(home / "src")
        home.chmod(0o755)
        locked = home / "locked"
        locked.mkdir(mode=0o555)

        def as_nobody() -> None:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            try:
                replace(tiny, source=source, destination=locked / below).run()
            except AdaconvertError as error:
                message = f"{type(error).__name__}: {error}"
                assert "permission denied. Choose a destination you may write to" in message
                os._exit(error.exit_code)

        assert in_child(as_nobody) == ResourceError.exit_code
        assert os.listdir(locked) == []


@pytest.mark.parametrize(
    "name",
    [
        "with some spaces",
        "modèle-混合-🙂",
        "new\nline",
        "-leading-dash",
        "'quotes\" and $HOME",
        "n" * 255,
        "é" * 127,
        ".hidden",
        "trailing.",
    ],
)
def test_g16_names(tiny: TinyRun, memory: Path, name: str) -> None:
    target = replace(tiny, destination=memory / name)
    target.run()
    assert sorted(os.listdir(memory)) == sorted(["src", name])
    again = replace(target, overwrite=True, seed=1)
    again.run()
    assert sorted(os.listdir(memory)) == sorted(["src", name])
    with pytest.raises(OutputConflictError, match="exists and is not empty") as caught:
        target.run()
    assert "\n" not in str(caught.value)
    assert str(caught.value).isascii()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("n" * 256, "is longer than the 255 bytes a name may have"),
        ("é" * 128, "is longer than the 255 bytes a name may have"),
        ("/".join(["d" * 200] * 25), "the path is too long for this file system"),
        ("nul\0", "is no name for a folder"),
        ("\ud800", "is no name for a folder"),
    ],
)
def test_g16_impossible_names(tiny: TinyRun, memory: Path, name: str, message: str) -> None:
    with pytest.raises(OutputConflictError, match=message) as caught:
        replace(tiny, destination=memory / name).run()
    assert caught.value.exit_code == 4
    assert os.listdir(memory) == ["src"]


def test_g16_root_of_the_file_system(tiny: TinyRun) -> None:
    with pytest.raises(OutputConflictError, match="/: is the root of the file system"):
        replace(tiny, destination=Path("/")).run()


def test_g16_neighbours_stay_apart(memory: Path) -> None:
    long = [Destination.resolve(memory / ("n" * 254 + end)) for end in "ab"]
    assert long[0].staging != long[1].staging
    assert all(len(os.fsencode(d.staging.name)) <= 255 for d in long)
    assert all(d.staging.parent == d.path.parent == d.old.parent for d in long)


def test_g17_staging_is_beside_the_destination(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/none")
    fs = RecordingFileSystem()
    tiny.run(fs)
    folder = str(tiny.destination.parent)
    assert {step.subject[: len(folder)] for step in fs.steps} == {folder}


def test_g13_g14_replacing_leaves_nothing_of_the_old(tiny: TinyRun) -> None:
    tiny.run()
    target = tiny.destination
    assert (target / "model.safetensors.index.json").is_file()
    replace(tiny, overwrite=True, max_shard_size="5GB").run()
    # the source's own index would name files that are not there.
    assert sorted(os.listdir(target)) == [
        "README.md",
        "adaconvert.json",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-500", "pytorch_model.bin"])
def test_g12_what_we_did_not_write_is_not_replaced(tiny: TinyRun, name: str) -> None:
    tiny.run()
    strange = tiny.destination / name
    strange.mkdir() if name.startswith("checkpoint") else strange.write_text("mine")
    before = tree_digest(tiny.destination)
    with pytest.raises(OutputConflictError, match=f"holds '{name}', which adaconvert did not"):
        replace(tiny, overwrite=True).run()
    assert tree_digest(tiny.destination) == before


def test_g12_replacing_an_edited_output_of_ours(tiny: TinyRun) -> None:
    tiny.run()
    manifest = tiny.destination / "adaconvert.json"
    manifest.write_text(manifest.read_text().replace("exact", "edited"))
    replace(tiny, overwrite=True).run()
    assert "edited" not in manifest.read_text()


def test_g10_a_strange_folder_under_the_reserved_name(tiny: TinyRun) -> None:
    strange = tiny.destination.with_name(".out.adaconvert-partial")
    strange.mkdir()
    (strange / "thesis.tex").write_text("mine")
    message = "holds 'thesis.tex', which is not adaconvert's. Move it away"
    with pytest.raises(OutputConflictError, match=message):
        tiny.run()
    assert (strange / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", [".out.adaconvert-partial", ".out.adaconvert-old"])
def test_g10_a_file_under_a_reserved_name(tiny: TinyRun, name: str) -> None:
    taken = tiny.destination.with_name(name)
    taken.write_text("mine")
    with pytest.raises(OutputConflictError, match="is in the way and is not a folder"):
        tiny.run()
    assert taken.read_text() == "mine"
    assert sorted(os.listdir(taken.parent)) == sorted(["src", name])


def test_something_appears_while_writing(tiny: TinyRun) -> None:
    fs = HookedFileSystem(is_new_shard, lambda: a_full_folder(tiny.destination))
    with pytest.raises(OutputConflictError, match="exists and is not empty"):
        tiny.run(fs)
    assert os.listdir(tiny.destination) == ["notes.txt"]
    assert sorted(os.listdir(tiny.destination.parent)) == ["out", "src"]


def test_g21_links_are_not_needed(tiny: TinyRun) -> None:
    fs = RecordingFileSystem()
    tiny.run(fs)
    assert {step.action for step in fs.steps} <= {
        *("mkdir", "create", "allocate", "write", "copy", "truncate"),
        *("fsync", "fsync_dir", "rename", "unlink", "rmdir"),
    }
    names = [p.name.lower() for p in tiny.destination.iterdir()]
    assert len(names) == len(set(names))
