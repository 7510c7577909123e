"""G14, G15, G18, G19: side files, modes, reproducibility, and the size of shards."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from adaconvert.testing.writing import TinyRun, tree_digest


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_g15_modes(tiny: TinyRun, memory: Path, umask: int) -> None:
    tiny = replace(tiny, destination=memory / "parent" / "out")
    (tiny.source / "tokenizer.json").chmod(0o600)
    before = os.umask(umask)
    try:
        tiny.run()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tiny.destination.iterdir()}
    assert {"README.md", "adaconvert.json", "config.json", "tokenizer.json"} < modes.keys()
    assert set(modes.values()) == {0o666 & ~umask}, modes
    for folder in (tiny.destination, tiny.destination.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def test_g15_side_files_are_files_not_links(tiny: TinyRun, memory: Path) -> None:
    blob = memory / "blob"
    (tiny.source / "tokenizer.json").rename(blob)
    (tiny.source / "tokenizer.json").symlink_to(blob)
    tiny.run()
    copied = tiny.destination / "tokenizer.json"
    assert copied.is_file()
    assert not copied.is_symlink()
    assert copied.read_bytes() == blob.read_bytes()


def test_g14_the_source_s_own_card_and_index_stay_there(tiny: TinyRun) -> None:
    tiny.run()
    for name in ("README.md", "model.safetensors.index.json"):
        ours, theirs = (folder / name for folder in (tiny.destination, tiny.source))
        assert ours.read_bytes() != theirs.read_bytes()


def test_g18_same_bytes_again(tiny: TinyRun) -> None:
    tiny.run()
    again = replace(tiny, destination=tiny.destination.with_name("again"))
    again.run()
    assert tree_digest(again.destination) == tree_digest(tiny.destination)


@pytest.mark.parametrize(
    ("cap", "shards"), [("1", 16), ("10MB", 1), ("10MiB", 1), ("60kB", 3), ("60KiB", 3)]
)
def test_g19_shard_sizes(tiny: TinyRun, cap: str, shards: int) -> None:
    replace(tiny, max_shard_size=cap).run()
    files = [p.name for p in tiny.destination.glob("*.safetensors")]
    assert len(files) == shards
    index = tiny.destination / "model.safetensors.index.json"
    assert index.exists() is (shards > 1)
    assert (files == ["model.safetensors"]) is (shards == 1)
