"""G15, G18, G19: modes, reproducibility, and the size of shards."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.io.writer import parse_size
from adaconvert.testing.writing import TinyConversion, tiny_source, tree_digest


@pytest.fixture
def conversion(tmp_path: Path) -> TinyConversion:
    return TinyConversion(source=tiny_source(tmp_path / "src"), destination=tmp_path / "p" / "out")


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_g15_modes(conversion: TinyConversion, umask: int) -> None:
    (conversion.source / "tokenizer.json").chmod(0o600)
    before = os.umask(umask)
    try:
        conversion.run()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in conversion.destination.iterdir()}
    assert set(modes.values()) == {0o666 & ~umask}, modes
    for folder in (conversion.destination, conversion.destination.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_g15_side_files_are_files_not_links(conversion: TinyConversion, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (conversion.source / "tokenizer.json").rename(blob)
    (conversion.source / "tokenizer.json").symlink_to(blob)
    conversion.run()
    copied = conversion.destination / "tokenizer.json"
    assert copied.is_file()
    assert not copied.is_symlink()
    assert copied.read_bytes() == blob.read_bytes()


def test_g18_same_bytes_again(conversion: TinyConversion) -> None:
    conversion.run()
    again = replace(conversion, destination=conversion.destination.with_name("again"))
    again.run()
    assert tree_digest(again.destination) == tree_digest(conversion.destination)


@pytest.mark.parametrize(
    ("cap", "shards"), [("1", 13), ("10MB", 1), ("10MiB", 1), ("2kB", 3), ("2KiB", 3)]
)
def test_g19_shard_sizes(conversion: TinyConversion, cap: str, shards: int) -> None:
    replace(conversion, cap=parse_size(cap)).run()
    files = [p.name for p in conversion.destination.glob("*.safetensors")]
    assert len(files) == shards
    index = conversion.destination / "model.safetensors.index.json"
    assert index.exists() is (shards > 1)
    assert (files == ["model.safetensors"]) is (shards == 1)
