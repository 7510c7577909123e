"""The header of one safetensors file, read and checked without torch, numpy or safetensors.

Stricter than the reference parser where its format text is: duplicate names are refused. The file
is read with `pread`, never mapped, so a file that shrinks is an error and not a SIGBUS.
Source: safetensors README, "Format", and `safetensors/src/tensor.rs`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from adaconvert.dtypes import BY_NAME, WEIGHT_DTYPES
from adaconvert.errors import SourceError
from adaconvert.io.names import check_tensor_name, escape
from adaconvert.io.regular import open_regular, pread_exact
from adaconvert.io.strict_json import load_json, type_name
from adaconvert.io.tensor_ref import TensorRef

#: the limit of the reference implementation
MAX_HEADER_BYTES = 100_000_000
MAX_RANK = 16
_MAX_SIZE = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}

#: dtypes that no dense float checkpoint holds: those `dtypes` lacks, and its floats that are no
#: weights
_UNSUPPORTED = frozenset(
    ["F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2", "F4", "C64", "C128"]
    + [name for name, dtype in BY_NAME.items() if dtype.is_float and name not in WEIGHT_DTYPES]
)
_SUPPORTED = tuple(name for name in BY_NAME if name not in _UNSUPPORTED)

_RETRY = "Fetch the file again."
_LOOKALIKES = (
    (
        b"version https://git-lfs",
        "is a git-lfs pointer, not the weights",
        "Run `git lfs pull` in the source.",
    ),
    (
        b"<",
        "is an HTML or XML page saved under this name",
        "Fetch the file again, logged in if need be.",
    ),
    (b"\x1f\x8b", "is gzip-compressed", "Decompress it first."),
    (
        b"PK\x03\x04",
        "is a zip archive, perhaps a pickle under a wrong name",
        "Convert it to safetensors first.",
    ),
    (b"GGUF", "is a GGUF file under a wrong name", "Convert it to safetensors first."),
    (b"\x80", "is a pickle under a wrong name", "Convert it to safetensors first."),
    (b"{", "is a JSON text saved under this name", _RETRY),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHeader:
    """What one shard says about itself, and which file said it.

    Attributes:
        file: path of the shard inside the checkpoint folder.
        tensors: every tensor, by offset.
        metadata: `__metadata__`, empty when absent.
        size, mtime_ns, inode, device: identity of the file when it was read.
        sha256: digest of the length field and the header text.
    """

    file: str
    tensors: dict[str, TensorRef]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    inode: int
    device: int
    sha256: str


def read_header(path: Path, relative_name: str) -> tuple[dict[str, TensorRef], dict[str, str]]:
    """Return the tensors (by offset) and the metadata of one safetensors file.

    Raises:
        SourceError: the file is damaged, or is no safetensors file of plain dtypes.
        ResourceError: the file may not be read.
    """
    header = read_shard_header(path, relative_name)
    return header.tensors, header.metadata


def read_shard_header(path: Path, relative_name: str) -> ShardHeader:
    """Return the checked header of one safetensors file; no byte of its data section is read.

    Args:
        path: the file.
        relative_name: its path inside the checkpoint folder, used in messages and in the refs.

    Raises:
        SourceError: the file is damaged, or is no safetensors file of plain dtypes.
        ResourceError: the file may not be read.
    """
    where = escape(relative_name)
    with open_regular(path, where) as (descriptor, status):
        raw = _read_raw(descriptor, status.st_size, where)
    value = load_json(raw[8:], f"{where} header", MAX_HEADER_BYTES, duplicate=_duplicate)
    if not isinstance(value, dict):
        raise _damaged("header is not a JSON object", where, found=type_name(value))
    metadata = _metadata(value.pop("__metadata__", {}), where)
    if not value:
        raise SourceError("no tensors", where=where, hint="The file is valid but holds nothing.")
    refs = [_entry(name, info, relative_name, where, len(raw)) for name, info in value.items()]
    refs.sort(key=lambda ref: (ref.start, ref.nbytes))
    _check_coverage(refs, len(raw), status.st_size, where)
    return ShardHeader(
        file=relative_name,
        tensors={ref.name: ref for ref in refs},
        metadata=metadata,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
        device=status.st_dev,
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def _duplicate(key: str) -> str:
    return f"duplicate {'field' if key in _FIELDS else 'tensor name'} '{key}'"


def _read_raw(descriptor: int, size: int, where: str) -> bytes:
    """Return the length field and the header text, after the length has been found plausible."""
    head = pread_exact(descriptor, min(size, 64), 0, where)
    if size < 8:
        raise _damaged(f"truncated: {_count(size)}", where, "at least 8")
    length = int.from_bytes(head[:8], "little")
    # the parser allows white space before the brace, for alignment
    if length > MAX_HEADER_BYTES or head[8:9] not in b"{ \t\r\n":
        _refuse_lookalike(head, where)
    if length > MAX_HEADER_BYTES:
        raise _damaged("header too large", where, f"at most {MAX_HEADER_BYTES} bytes", length)
    if length > size - 8:
        problem = "truncated: the header is longer than the file"
        raise _damaged(problem, where, _count(length + 8), _count(size))
    if length == 0:
        raise _damaged("header length is 0", where)
    return head[:8] + pread_exact(descriptor, length, 8, where)


def _refuse_lookalike(head: bytes, where: str) -> None:
    text = head.lstrip()
    for magic, problem, hint in _LOOKALIKES:
        if text.startswith(magic):
            raise SourceError(problem, where=where, hint=hint)


def _metadata(value: object, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _damaged("__metadata__ is not a JSON object", where, found=type_name(value))
    for key, item in value.items():
        if not isinstance(item, str):
            problem = f"__metadata__ value of '{escape(key)}' is not a string"
            raise _damaged(problem, where, found=type_name(item))
    made_for = value.get("format")
    if made_for in ("tf", "flax"):
        raise SourceError(
            f"weights are laid out for {made_for}",
            where=where,
            expected="format pt",
            hint="Save the model from PyTorch first: other frameworks transpose some weights.",
        )
    return value


def _entry(name: str, info: object, file: str, where: str, data_start: int) -> TensorRef:
    check_tensor_name(name, where)
    here = f"{where}: tensor '{escape(name)}'"
    if not isinstance(info, dict) or set(info) != _FIELDS:
        raise _damaged("entry is malformed", here, "dtype, shape and data_offsets")
    dtype = _dtype(info["dtype"], here)
    shape = _sizes(info["shape"], "shape", here)
    offsets = _sizes(info["data_offsets"], "data_offsets", here)
    if len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _damaged("data_offsets are not a range", here, found=escape(offsets))
    nbytes = offsets[1] - offsets[0]
    _check_nbytes(dtype, shape, nbytes, here)
    start = data_start + offsets[0]
    return TensorRef(name=name, dtype=dtype, shape=shape, file=file, start=start, nbytes=nbytes)


def _dtype(value: object, here: str) -> str:
    if isinstance(value, str) and value in _SUPPORTED:
        return value
    if isinstance(value, str) and value in _UNSUPPORTED:
        hint = "Dequantise the checkpoint to bfloat16 or float32 first."
        raise SourceError(f"quantised or unsupported dtype {value}", where=here, hint=hint)
    expected = f"one of {', '.join(_SUPPORTED)}"
    raise _damaged(f"unknown dtype '{escape(value)}'", here, expected)


def _sizes(value: object, field: str, here: str) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > MAX_RANK:
        problem = f"{field} is not an array of at most {MAX_RANK} numbers"
        raise _damaged(problem, here, found=escape(value))
    for item in value:
        # bool is an int in Python, and JSON's 2.0 is a float
        if type(item) is not int or not 0 <= item <= _MAX_SIZE:
            raise _damaged(f"{field} holds something that is no size", here, found=escape(item))
    return tuple(value)


def _check_nbytes(dtype: str, shape: Sequence[int], nbytes: int, here: str) -> None:
    size = BY_NAME[dtype].nbytes
    for length in shape:
        size *= length
        if size > _MAX_SIZE:
            raise _damaged("shape overflows 63 bits", here, found=escape(shape))
    if size != nbytes:
        problem = f"size does not match shape {escape(shape)} of {dtype}"
        raise _damaged(problem, here, _count(size), _count(nbytes))


def _check_coverage(refs: Sequence[TensorRef], data_start: int, size: int, where: str) -> None:
    """Return only when `refs`, by offset, cover the data section once and wholly."""
    end, before = data_start, "the start"
    for ref in refs:
        if ref.start != end:
            gap = _count(abs(ref.start - end))
            fault = f"overlaps that of {before} by {gap}"
            if ref.start > end:
                fault = f"leaves a hole of {gap} after {before}"
            raise _damaged(f"data {fault}", f"{where}: tensor '{escape(ref.name)}'")
        end, before = ref.start + ref.nbytes, f"'{escape(ref.name)}'"
    if end != size:
        problem = f"data section {_count(abs(end - size))} {'short' if end > size else 'long'}"
        raise _damaged(problem, where, f"a file of {_count(end)}", _count(size))


def _damaged(
    problem: str, where: str, expected: object | None = None, found: object | None = None
) -> SourceError:
    return SourceError(problem, where=where, expected=expected, found=found, hint=_RETRY)


def _count(nbytes: int) -> str:
    return f"{nbytes} byte" if nbytes == 1 else f"{nbytes} bytes"
