"""What tests of splits share: raw tensors of a checkpoint, and some text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from adaconvert.io.reader import read_bytes
from adaconvert.io.source import Source

Raw = dict[str, tuple[str, tuple[int, ...], bytes]]


def raw_tensors(folder: Path) -> Raw:
    """Return dtype, shape and bytes of every stored tensor."""
    source = Source.open(folder)
    return {
        name: (ref.dtype, ref.shape, read_bytes(source, ref, 0, ref.nbytes))
        for name, ref in source.tensors.items()
    }


@pytest.fixture(scope="session")
def raw() -> Callable[[Path], Raw]:
    return raw_tensors


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of a few hundred tokens."""
    words = "a model reads words and says which one comes next; some say more than others. "
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [json.dumps({"text": f"{number}: " + words * (2 + number)}) for number in range(4)]
    file.write_text("\n".join(rows) + "\n")
    return file
