"""io.manifest: what adaconvert.json says, and that nobody changed it (I6)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from adaconvert.errors import AdaconvertError, OptionError, VerificationError
from adaconvert.io import manifest
from adaconvert.io.writer import ShardRecord

SHARD = ShardRecord(file="model.safetensors", nbytes=80, digest="d" * 64, tensors={"t": "e" * 64})


def example() -> dict[str, object]:
    return manifest.build(
        method="upcycle",
        options={"top_k": 2, "experts": 8, "noise": 0.0},
        sources=[{"label": "org/name", "revision": None, "fingerprint": "f" * 64}],
        plan_digest="1" * 64,
        exactness={"kind": "exact", "why": "experts are copies"},
        shards={"model.safetensors": SHARD},
        files={"config.json": "c" * 64},
        dropped=[{"source": 0, "tensor": "inv_freq", "reason": "a buffer"}],
        notes=["caf\xe9"],
        versions={"numpy": "2.0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / manifest.MANIFEST_FILE).write_bytes(manifest.dump(example()))
    return tmp_path


def test_round_trip(folder: Path) -> None:
    found = manifest.read(folder)
    assert {key: found[key] for key in example()} == example()
    assert manifest.dump(found) == (folder / manifest.MANIFEST_FILE).read_bytes()
    assert manifest.records(found) == {"model.safetensors": SHARD}
    assert manifest.is_ours(folder)


def test_text_is_canonical() -> None:
    raw = manifest.dump(example())
    assert raw.isascii()
    assert raw.endswith(b"}\n")
    assert raw == manifest.dump(manifest.seal(manifest.seal(example())))
    assert raw == manifest.dump(dict(reversed(example().items())))
    keys = re.findall(r'^  "(\w+)":', raw.decode(), re.MULTILINE)
    assert keys == sorted(keys)
    assert json.loads(raw)["format"] == manifest.FORMAT


def test_no_time_no_place(folder: Path) -> None:
    raw = (folder / manifest.MANIFEST_FILE).read_text()
    assert str(folder) not in raw
    assert os.uname().nodename not in raw
    assert not re.search(r"20\d\d-\d\d", raw)


def test_values_json_cannot_hold() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        manifest.dump(example() | {"options": {"noise": float("nan")}})


def test_i6_missing(tmp_path: Path) -> None:
    message = r"adaconvert\.json: is missing or cannot be read\. Only folders written by adaconvert"
    with pytest.raises(VerificationError, match=message) as caught:
        manifest.read(tmp_path)
    assert caught.value.exit_code == 5
    assert not manifest.is_ours(tmp_path)


def edit_value(raw: str) -> str:
    return raw.replace('"top_k": 2', '"top_k": 4')


def edit_space(raw: str) -> str:
    return raw.replace('"top_k": 2', '"top_k":  2')


def edit_order(raw: str) -> str:
    return raw.replace('"experts": 8,\n    "noise": 0.0', '"noise": 0.0,\n    "experts": 8')


def edit_hash(raw: str) -> str:
    return re.sub(r'("self_sha256": ")\w', r"\g<1>_", raw)


def edit_twice(raw: str) -> str:
    return raw.replace('"method": "upcycle"', '"method": "other",\n  "method": "upcycle"')


def edit_end(raw: str) -> str:
    return raw.rstrip("\n")


def edit_extra(raw: str) -> str:
    return raw.replace('"method"', '"extra": 1,\n  "method"')


@pytest.mark.parametrize(
    "edit", [edit_value, edit_space, edit_order, edit_hash, edit_twice, edit_end, edit_extra]
)
def test_i6_edited(folder: Path, edit: object) -> None:
    path = folder / manifest.MANIFEST_FILE
    before = path.read_text()
    after = edit(before)  # type: ignore[operator]
    assert after != before
    path.write_text(after)
    with pytest.raises(VerificationError, match=r"adaconvert\.json: was edited after") as caught:
        manifest.read(folder)
    assert caught.value.exit_code == 5
    # still ours: --overwrite may replace it.
    assert manifest.is_ours(folder)


def test_i6_any_flipped_bit(folder: Path) -> None:
    path = folder / manifest.MANIFEST_FILE
    raw = path.read_bytes()
    for bit in range(0, len(raw) * 8, 37):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(AdaconvertError, match=r"adaconvert\.json: "):
            manifest.read(folder)


def test_i6_newer(folder: Path) -> None:
    newer = example() | {"format": manifest.FORMAT + 1, "adaconvert": "9.0\x1b", "new": True}
    del newer["shards"]
    (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump(newer))
    message = (
        r"adaconvert\.json: was written by a newer adaconvert; expected format 1 or older, "
        r"found format 2 of adaconvert 9\.0\\x1b\. Upgrade adaconvert\."
    )
    with pytest.raises(OptionError, match=message) as caught:
        manifest.read(folder)
    assert caught.value.exit_code == 2
    assert manifest.is_ours(folder)


@pytest.mark.parametrize(
    "raw", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000, b'{"a": NaN'], ids=range(7)
)
def test_i6_damaged(folder: Path, raw: bytes) -> None:
    (folder / manifest.MANIFEST_FILE).write_bytes(raw)
    with pytest.raises(VerificationError, match=r"adaconvert\.json: is damaged\. Convert again"):
        manifest.read(folder)
    assert not manifest.is_ours(folder)


@pytest.mark.parametrize("key", [key for key in example() if key != "verification"])
def test_wrong_kinds(folder: Path, key: str) -> None:
    for value in (None, 1.5):
        (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump(example() | {key: value}))
        with pytest.raises(VerificationError, match=f"entry '{key}' is missing or of the wrong"):
            manifest.read(folder)


@pytest.mark.parametrize("entry", [1, {}, {"bytes": "1", "digest": "", "tensors": {}}])
def test_damaged_shard_entry(folder: Path, entry: object) -> None:
    broken = example() | {"shards": {"m\n": entry}}
    (folder / manifest.MANIFEST_FILE).write_bytes(manifest.dump(broken))
    with pytest.raises(VerificationError, match=r"entry of shard 'm\\n' is damaged"):
        manifest.read(folder)


@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_not_a_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / manifest.MANIFEST_FILE
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(VerificationError, match="is no regular file of a sensible size"):
        manifest.read(tmp_path)
    assert not manifest.is_ours(tmp_path)
