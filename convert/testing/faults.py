"""Checkpoints made by hand, byte by byte, so that each can be wrong in exactly one way.

Needs neither torch nor safetensors: what writes the faults must not refuse them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

from adaconvert.errors import AdaconvertError, SourceError

#: dtype, shape and data of one tensor
Stored = tuple[str, tuple[int, ...], bytes]

#: config.json of a Llama with the sizes of `dense_tensors`
DENSE_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 8,
    "intermediate_size": 12,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": 16,
}


def craft(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file with this header, however wrong.

    Args:
        header: raw bytes, or a value to write as JSON.
        data: the data section.
        length: the stated length of the header, by default the true one.
    """
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(
    dtype: str, shape: tuple[int, ...] | list[int], start: int, end: int
) -> dict[str, object]:
    """Return one header entry, unchecked."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def floats(*shape: int, first: float = 0.0) -> Stored:
    """Return an F32 tensor whose elements are `first`, `first` + 1/16, ... in row-major order."""
    count = 1
    for size in shape:
        count *= size
    return "F32", shape, struct.pack(f"<{count}f", *(first + i / 16 for i in range(count)))


def shard_bytes(tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return a good safetensors file with `tensors` in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = entry(dtype, shape, offset, offset + len(data))
        offset += len(data)
    return craft(header, b"".join(data for _, _, data in tensors.values()))


def dense_tensors(layers: int = 2) -> dict[str, Stored]:
    """Return every tensor of the Llama that `DENSE_CONFIG` describes, all different."""
    hidden, inner, vocab = 8, 12, 16
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes[f"{block}.input_layernorm.weight"] = (hidden,)
        for part in ("q", "k", "v", "o"):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (hidden, hidden)
        shapes[f"{block}.post_attention_layernorm.weight"] = (hidden,)
        for part in ("gate", "up"):
            shapes[f"{block}.mlp.{part}_proj.weight"] = (inner, hidden)
        shapes[f"{block}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return {name: floats(*shape, first=i) for i, (name, shape) in enumerate(shapes.items())}


def write_index(
    folder: Path, weight_map: Mapping[str, object], total_size: object | None = None
) -> Path:
    """Write an index and return its path; without `total_size` it has no metadata."""
    value: dict[str, object] = {"weight_map": dict(weight_map)}
    if total_size is not None:
        value["metadata"] = {"total_size": total_size}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_config(folder: Path, **changes: object) -> Path:
    """Write `DENSE_CONFIG` with `changes` as config.json and return its path."""
    path = folder / "config.json"
    path.write_text(json.dumps(DENSE_CONFIG | changes, indent=2), encoding="utf-8")
    return path


def write_dense(folder: Path, **changes: object) -> Path:
    """Write a good single-file checkpoint into `folder`, made if need be, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **changes)
    (folder / "model.safetensors").write_bytes(shard_bytes(dense_tensors()))
    return folder


def write_sharded(folder: Path, shards: int = 3, **changes: object) -> Path:
    """Write the checkpoint of `write_dense` in `shards` files with an index; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, **changes)
    tensors = list(dense_tensors().items())
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = dict(
            tensors[number * len(tensors) // shards : (number + 1) * len(tensors) // shards]
        )
        file = shard_name(number + 1, shards)
        (folder / file).write_bytes(shard_bytes(part))
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map, sum(len(data) for _, (_, _, data) in tensors))
    return folder


def shard_name(number: int, total: int) -> str:
    """Return the usual name of shard `number`, counted from one."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"


def tree_state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return size, modification time and inode of everything below `folder`, links not followed."""
    state = {}
    for base, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(base) / name
            status = path.lstat()
            key = str(path.relative_to(folder))
            state[key] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return state


def refusal(
    where: str | Path,
    error: type[AdaconvertError] = SourceError,
    *,
    ignore_unindexed: bool = False,
    described: bool = False,
) -> str:
    """Return the message with which `Source.open` refuses `where`, after checking its manners.

    It is one short line of printable ASCII, and nothing on disk has changed. `described` also has
    the model described, as every command does.

    Raises:
        AssertionError: the source was opened, or the refusal broke one of these rules.
    """
    from adaconvert.io.source import Source
    from adaconvert.methods.sources import open_source

    folder = Path(where)
    before = tree_state(folder)
    try:
        if described:
            open_source(str(where))
        else:
            Source.open(where, ignore_unindexed=ignore_unindexed)
    except AdaconvertError as caught:
        message = str(caught)
        kind = type(caught)
    else:
        raise AssertionError(f"{folder.name} was opened")
    if kind is not error:
        raise AssertionError(f"{kind.__name__} instead of {error.__name__}: {message}")
    if not (message.isascii() and message.isprintable() and len(message) < 2000):
        raise AssertionError(f"not one short line of printable ASCII: {message!r}")
    if tree_state(folder) != before:
        raise AssertionError(f"the source has changed: {message}")
    return message


def refused(folder: Path) -> str:
    """Return the message with which every command refuses a folder, as for `refusal`."""
    return refusal(folder, described=True)
