"""A checkpoint that has config and headers but no weights, to plan on before the real one exists.

Its shards are sparse files: they have the size of the real ones and take no room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from adaconvert.io.fs import FileSystem, reporting
from adaconvert.io.layout import ShardLayout, Target, index_json, layout_shards
from adaconvert.io.names import escape

#: of one file; a reader maps it into memory as a whole.
SHARD: Final = 2 << 30


def write_stand_in(folder: Path, config: Mapping[str, object], targets: Sequence[Target]) -> Path:
    """Return a new folder with a config.json and shards whose weights are holes.

    Args:
        folder: to make; its parent exists.
        config: content of config.json.
        targets: name, dtype and shape of every tensor.

    Raises:
        ResourceError: it cannot be written.
    """
    fs = FileSystem()
    layouts = layout_shards(targets, SHARD)
    files = {"config.json": json.dumps(config, indent=2, sort_keys=True).encode()}
    index = index_json(layouts)
    if index is not None:
        files["model.safetensors.index.json"] = index
    with reporting(escape(folder.name), folder=folder.parent):
        fs.mkdir(folder)
        for name, content in files.items():
            _write(fs, folder / name, content, len(content))
        for layout in layouts:
            _shard(fs, folder, layout)
    return folder


def _shard(fs: FileSystem, folder: Path, layout: ShardLayout) -> None:
    _write(fs, folder / layout.file, layout.header, layout.nbytes)


def _write(fs: FileSystem, path: Path, content: bytes, nbytes: int) -> None:
    descriptor = fs.create(path)
    try:
        fs.truncate(descriptor, nbytes)
        fs.write_at(descriptor, content, 0)
    finally:
        fs.close(descriptor)
