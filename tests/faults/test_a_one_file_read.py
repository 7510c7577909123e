"""Group A of the fault catalogue, continued: one safetensors file that changes, cannot be read, or
would take too much to read. Each test names its row."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from adaconvert.errors import ResourceError, SourceError
from adaconvert.io.header import read_header
from adaconvert.io.reader import iter_chunks, read_bytes
from adaconvert.io.source import Source
from adaconvert.testing.faults import (
    craft,
    dense_tensors,
    entry,
    floats,
    refusal,
    shard_bytes,
    write_config,
    write_dense,
)

NAME = "model.safetensors"
ONE = {"x": entry("F32", [2], 0, 8)}


def test_a2_a_large_length_allocates_nothing(tmp_path: Path) -> None:
    write_config(tmp_path)
    with (tmp_path / NAME).open("wb") as file:
        file.write(struct.pack("<Q", 2**40) + b"{")
        file.truncate(2**41)
    code = """
        import resource, sys
        from adaconvert.io.source import Source
        from adaconvert.errors import SourceError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            Source.open(sys.argv[1])
        except SourceError as error:
            print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    out = _child(code, str(tmp_path)).splitlines()
    assert "header too large" in out[0]
    # KiB
    assert int(out[1]) < 20_000


def test_a16_truncated_while_open(tmp_path: Path) -> None:
    source = Source.open(write_dense(tmp_path))
    ref = source.tensors["lm_head.weight"]
    chunks = iter_chunks(source, ref, 64)
    next(chunks)
    os.truncate(tmp_path / NAME, ref.start + 100)
    with pytest.raises(SourceError, match=rf"{NAME}: source changed while reading; expected .*"):
        list(chunks)
    # and the next opening notices before it reads
    with pytest.raises(SourceError, match="source changed while reading; found another size"):
        read_bytes(source, ref)


def test_a16_truncated_between_status_and_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAME
    path.write_bytes(craft(ONE, bytes(8)))
    true_fstat = os.fstat

    def truncate_after(descriptor: int) -> os.stat_result:
        status = true_fstat(descriptor)
        os.truncate(path, 20)
        return status

    monkeypatch.setattr(os, "fstat", truncate_after)
    with pytest.raises(SourceError, match=f"{NAME}: source changed while reading"):
        read_header(path, NAME)


@pytest.mark.parametrize("kind", ["replaced", "rewritten"])
def test_a17_changed_during_the_run(tmp_path: Path, kind: str) -> None:
    source = Source.open(write_dense(tmp_path))
    raw = shard_bytes(dense_tensors() | {"lm_head.weight": floats(16, 8, first=99)})
    if kind == "replaced":
        (tmp_path / "new").write_bytes(raw)
        (tmp_path / "new").replace(tmp_path / NAME)
    else:
        (tmp_path / NAME).write_bytes(raw)
    message = f"{NAME}: source changed while reading; found another"
    with pytest.raises(SourceError, match=message):
        source.assert_unchanged()
    with pytest.raises(SourceError, match=message):
        read_bytes(source, source.tensors["lm_head.weight"])


@pytest.mark.timeout(5)
@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("device", "a character device"),
        ("folder", "a folder"),
    ],
)
def test_a18_no_regular_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, found: str
) -> None:
    write_config(tmp_path)
    # relative, because the path of a socket has at most 108 bytes
    monkeypatch.chdir(tmp_path)
    if kind == "fifo":
        os.mkfifo(NAME)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(NAME)
    elif kind == "device":
        Path(NAME).symlink_to("/dev/zero")
    else:
        Path(NAME).mkdir()
    assert refusal(tmp_path) == f"{NAME}: is not a regular file; found {found}"


@pytest.mark.timeout(5)
def test_a18_a_fifo_put_there_at_the_last_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / NAME
    path.write_bytes(craft(ONE, bytes(8)))
    true_open = os.open

    def swap(name: Path, flags: int) -> int:
        path.unlink()
        os.mkfifo(path)
        return true_open(name, flags)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(SourceError, match=f"{NAME}: is not a regular file; found a FIFO"):
        read_header(path, NAME)


def test_a20_no_permission() -> None:
    # mode bits do not stop root, so a child gives its rights up after the imports;
    # tmp_path will not do, because only its owner may enter it
    code = """
        import os, sys
        from adaconvert.errors import ResourceError
        from adaconvert.io.source import Source
        Source.open(sys.argv[1])
        if os.geteuid() == 0:
            os.chmod(sys.argv[2], 0o600)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        else:
            os.chmod(sys.argv[2], 0)
        try:
            Source.open(sys.argv[1])
        except ResourceError as error:
            print(error.exit_code, error)
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        write_dense(folder)
        out = _child(code, name, str(folder / NAME))
    assert re.search(rf"^6 {NAME}: no permission to read it; found mode 0[60]00 of uid \d+", out)


def test_a20_refused_by_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path)
    (tmp_path / NAME).chmod(0o640)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    message = refusal(tmp_path, ResourceError)
    assert message.startswith("config.json: no permission to read it; found mode 0644 of uid")


def test_a20_other_failures_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path)

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    message = refusal(tmp_path, ResourceError)
    assert message == "config.json: cannot be read: Input/output error"


def test_a20_too_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path)

    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", fail)
    assert refusal(tmp_path, ResourceError) == "config.json: cannot be opened: Too many open files"


@pytest.mark.timeout(10)
def test_a21_a_terabyte_is_not_read(tmp_path: Path) -> None:
    tera = 10**12
    raw = craft({"x": entry("F32", [tera // 4], 0, tera)})
    write_config(tmp_path)
    (tmp_path / NAME).write_bytes(raw)
    os.truncate(tmp_path / NAME, len(raw) + tera)
    source = Source.open(tmp_path)
    assert source.tensors["x"].nbytes == tera
    assert len(read_bytes(source, source.tensors["x"], tera - 10, 10)) == 10


def test_descriptors_are_closed(tmp_path: Path) -> None:
    source = Source.open(write_dense(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        Source.open(tmp_path)
        read_bytes(source, source.tensors["model.norm.weight"])
        next(iter_chunks(source, source.tensors["lm_head.weight"], 8))
    assert len(os.listdir("/proc/self/fd")) == before


def _child(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
