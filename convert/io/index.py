"""The index of a sharded checkpoint: which shard holds which tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adaconvert.errors import SourceError
from adaconvert.io.names import check_relative_file, check_tensor_name, escape
from adaconvert.io.strict_json import load_object, type_name

INDEX_FILE = "model.safetensors.index.json"
#: the largest published indexes hold some 100 000 tensors in 12 MB
MAX_INDEX_BYTES = 64_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """A checked index.

    Attributes:
        weight_map: tensor name to shard path inside the checkpoint folder.
        total_size: bytes of all tensors as stated, None when absent or no whole number.
    """

    weight_map: dict[str, str]
    total_size: int | None

    @property
    def files(self) -> tuple[str, ...]:
        """The shards named, each once, sorted."""
        return tuple(sorted(set(self.weight_map.values())))


def read_index(path: Path) -> Index:
    """Return the index in `path`, with every name in it checked.

    Raises:
        SourceError: it is no index, or a name in it is unsafe or no safetensors file.
        ResourceError: it may not be read.
    """
    where = escape(path.name)
    value = load_object(path, where, MAX_INDEX_BYTES)
    weight_map = value.get("weight_map")
    if not isinstance(weight_map, dict):
        found = type_name(weight_map) if "weight_map" in value else "none"
        raise SourceError("weight_map is no object", where=where, expected="an object", found=found)
    if not weight_map:
        raise SourceError("weight_map is empty", where=where)
    for name, file in weight_map.items():
        _check_entry(name, file, where)
    return Index(weight_map=weight_map, total_size=_total_size(value.get("metadata")))


def _check_entry(name: str, file: object, where: str) -> None:
    check_tensor_name(name, where)
    here = f"{where}: tensor '{escape(name)}'"
    if not isinstance(file, str):
        raise SourceError("shard is not a string", where=here, found=type_name(file))
    check_relative_file(file, here)
    if not file.endswith(".safetensors"):
        raise SourceError(
            f"shard '{escape(file)}' is no safetensors file",
            where=here,
            hint="Pickles are never opened; convert the checkpoint to safetensors first.",
        )


def _total_size(metadata: object) -> int | None:
    value = metadata.get("total_size") if isinstance(metadata, dict) else None
    # old writers divided, and left whole numbers as floats
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int else None
