"""Where every byte of a target checkpoint goes, known before the first one is written.

A shard is 8 bytes of header length, a JSON header padded with spaces, and the tensors, no holes.
Its digest is the sha256 of the header bytes followed by the 32-byte sha256 of each tensor in offset
order, so a tensor copied whole brings its digest along and is not hashed again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Final, Protocol, TypeVar

from adaconvert.dtypes import BY_NAME, nbytes_of
from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.units import human_bytes

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_HEADER: Final = 100_000_000
#: a page of the file cache.
PAGE: Final = 4096

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]?)(i?)(b?)\s*", re.IGNORECASE)


class Target(Protocol):
    """What a tensor needs to be placed; `planning.ops.TargetTensor` has it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def group(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedTensor:
    """One tensor of a shard: `start` is its absolute offset in the file, `nbytes` its size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLayout:
    """One shard before it exists.

    Attributes:
        file: its name.
        header: its first bytes: length, JSON, padding.
        tensors: what follows, in offset order.
        nbytes: size of the whole file.
    """

    file: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """One complete shard: its size, its digest and the sha256 of each of its tensors."""

    file: str
    nbytes: int
    digest: str
    tensors: Mapping[str, str]


def parse_size(size: str | int, where: str = "--max-shard-size") -> int:
    """Return the bytes in `5GB` (powers of 1000), `10MiB` (of 1024) or a plain number.

    Args:
        size: what the user gave.
        where: the option it was given for.

    Raises:
        OptionError: it is no size, or less than one byte.
    """
    match = _SIZE.fullmatch(str(size))
    value = 0
    if match and (match[2] or not match[3]):
        power = " kmgtp".index(match[2].lower() or " ")
        value = int(Fraction(match[1]) * (1024 if match[3] else 1000) ** power)
    if value < 1:
        raise OptionError(
            "is no size in bytes",
            where=where,
            expected="a number with a unit, such as 5GB, 500MB or 10MiB",
            found=escape(size),
        )
    return value


def layout_shards(targets: Sequence[Target], max_shard_size: int | None) -> tuple[ShardLayout, ...]:
    """Return every shard of a target checkpoint, offsets included; depends on the arguments alone.

    Neighbours of one group share a shard unless the group alone is larger than a shard may be. A
    tensor larger than that gets a shard of its own. Inside a shard, wider elements come first.

    Args:
        targets: tensors in the order to write.
        max_shard_size: largest sum of tensor sizes of a shard in bytes, None for one file.

    Raises:
        OptionError: a shard would hold more tensors than its header can list.
    """
    shards: list[list[Target]] = [[]]
    used = 0
    for unit in _units(targets, max_shard_size):
        nbytes = sum(_nbytes(target) for target in unit)
        if shards[-1] and max_shard_size is not None and used + nbytes > max_shard_size:
            shards.append([])
            used = 0
        shards[-1].extend(unit)
        used += nbytes
    names = _file_names(len(shards))
    return tuple(_layout(file, shard) for file, shard in zip(names, shards, strict=True))


def _units(targets: Sequence[Target], cap: int | None) -> list[list[Target]]:
    groups: list[list[Target]] = []
    for target in targets:
        if groups and target.group and groups[-1][-1].group == target.group:
            groups[-1].append(target)
        else:
            groups.append([target])
    units: list[list[Target]] = []
    for group in groups:
        fits = cap is None or sum(_nbytes(target) for target in group) <= cap
        units.extend([group] if fits else [[target] for target in group])
    return units


def _nbytes(target: Target) -> int:
    return nbytes_of(target.dtype, target.shape)


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]


def _layout(file: str, targets: Sequence[Target]) -> ShardLayout:
    ordered = sorted(targets, key=lambda target: -BY_NAME[target.dtype].nbytes)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for target in ordered:
        end = at + _nbytes(target)
        entries[target.name] = {
            "dtype": target.dtype,
            "shape": list(target.shape),
            "data_offsets": [at, end],
        }
        at = end
    if len(entries) != len(ordered) + 1:
        raise ValueError(f"{file}: two targets have the same name")
    header = _header(file, entries)
    return ShardLayout(
        file=file, header=header, tensors=_placed(ordered, len(header)), nbytes=len(header) + at
    )


def with_data_at(layout: ShardLayout, phase: int) -> ShardLayout:
    """Return the layout with its header padded so that the data begin at `phase` within a page.

    Bytes that keep their place within a page can be moved between files page by page.

    Args:
        layout: any layout.
        phase: offset within a page of `PAGE` bytes; rounded down to the format's 8 bytes.
    """
    pad = (phase - phase % 8 - len(layout.header)) % PAGE
    if not pad or len(layout.header) + pad > MAX_HEADER:
        return layout
    text = layout.header[8:] + b" " * pad
    return ShardLayout(
        file=layout.file,
        header=len(text).to_bytes(8, "little") + text,
        tensors=tuple(replace(tensor, start=tensor.start + pad) for tensor in layout.tensors),
        nbytes=layout.nbytes + pad,
    )


def _header(file: str, entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise OptionError(
            "the shard holds more tensors than a safetensors header can list",
            where=file,
            expected=f"at most {human_bytes(MAX_HEADER)} of header",
            found=human_bytes(len(text)),
            hint="Lower --max-shard-size.",
        )
    return len(text).to_bytes(8, "little") + text


def _placed(targets: Sequence[Target], at: int) -> tuple[PlacedTensor, ...]:
    placed = []
    for target in targets:
        nbytes = _nbytes(target)
        placed.append(
            PlacedTensor(
                name=target.name, dtype=target.dtype, shape=target.shape, start=at, nbytes=nbytes
            )
        )
        at += nbytes
    return tuple(placed)


def index_json(layouts: Sequence[ShardLayout]) -> bytes | None:
    """Return the contents of model.safetensors.index.json, None when one file holds everything."""
    if len(layouts) == 1:
        return None
    placed = [(tensor, layout.file) for layout in layouts for tensor in layout.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(t.nbytes // BY_NAME[t.dtype].nbytes for t, _ in placed),
            "total_size": sum(tensor.nbytes for tensor, _ in placed),
        },
        "weight_map": {tensor.name: file for tensor, file in placed},
    }
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode("ascii")


def shard_digest(header: bytes, tensor_digests: Iterable[str]) -> str:
    """Return the digest of a shard from its header and its tensors' sha256 in offset order."""
    whole = hashlib.sha256(header)
    for digest in tensor_digests:
        whole.update(bytes.fromhex(digest))
    return whole.hexdigest()


def shard_digest_of_file(path: Path, *, threads: int = 2) -> tuple[str, dict[str, str]]:
    """Return the digest of a shard on disk and the sha256 of each of its tensors.

    Raises:
        SourceError: the file is no valid safetensors file, or is cut while it is read.
        ResourceError: it cannot be read.
    """
    from adaconvert.io.digest import hash_tensors
    from adaconvert.io.header import read_header
    from adaconvert.io.regular import open_regular, pread_exact

    where = escape(path.name)
    refs = digest_order(read_header(path, path.name)[0].values())
    with open_regular(path, where) as (fd, _):
        length = int.from_bytes(pread_exact(fd, 8, 0, where), "little")
        header = pread_exact(fd, 8 + length, 0, where)
        digests = hash_tensors(fd, refs, threads=threads, where=where)
    return shard_digest(header, digests.values()), digests


class Extent(Protocol):
    """Where a tensor lies in its shard."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


AnyExtent = TypeVar("AnyExtent", bound=Extent)


def digest_order(tensors: Iterable[AnyExtent]) -> list[AnyExtent]:
    """Return tensors in the order their hashes enter the shard's digest.

    Empty tensors share their offset with a neighbour; the name settles their order.
    """
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes, tensor.name))
