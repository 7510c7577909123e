"""Which files of a folder are the checkpoint, and which are only lying beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adaconvert.errors import SourceError
from adaconvert.io.header import read_shard_header
from adaconvert.io.index import INDEX_FILE, Index, read_index
from adaconvert.io.names import escape, listing

SINGLE_FILE = "model.safetensors"
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<total>\d+)\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_FOREIGN = (".h5", ".msgpack", ".onnx", ".npz", ".tflite", ".mlmodel", ".nemo", ".ot")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The shards of a checkpoint, sorted; their index if it decides; remarks on what is ignored."""

    files: tuple[str, ...]
    index: Index | None
    notes: tuple[str, ...]


def find_weights(root: Path, names: Sequence[str]) -> WeightFiles:
    """Return the shards of the checkpoint in `root`, each of which exists.

    Args:
        root: the checkpoint folder.
        names: its top-level entries.

    Raises:
        SourceError: there are none, some are missing, or a single file and an index disagree.
        ResourceError: the index may not be read.
    """
    if INDEX_FILE not in names:
        if SINGLE_FILE not in names:
            raise _no_weights(names)
        return _found((SINGLE_FILE,), None, names)
    index = read_index(root / INDEX_FILE)
    if SINGLE_FILE in names and SINGLE_FILE not in index.files:
        note = _settle_double(root, index)
        found = _found((SINGLE_FILE,), None, names)
        return WeightFiles(files=found.files, index=None, notes=(note, *found.notes))
    _check_present(root, index)
    return _found(index.files, index, names)


def _found(files: tuple[str, ...], index: Index | None, names: Sequence[str]) -> WeightFiles:
    notes = []
    others = [name for name in names if name.endswith(".safetensors") and name not in files]
    if others:
        notes.append(f"ignored safetensors files that are no part of the model: {listing(others)}")
    pickles = _weights(names, _PICKLES)
    if pickles:
        notes.append(f"ignored pickled weights beside the safetensors: {listing(pickles)}")
    foreign = _weights(names, (*_FOREIGN, ".gguf"))
    if foreign:
        notes.append(f"ignored weights in other formats: {listing(foreign)}")
    return WeightFiles(files=files, index=index, notes=tuple(notes))


def _settle_double(root: Path, index: Index) -> str:
    """Return the note for a single file beside an index of the same names; refuse otherwise."""
    single = read_shard_header(root / SINGLE_FILE, SINGLE_FILE).tensors
    only_index = sorted(set(index.weight_map) - set(single))
    only_single = sorted(set(single) - set(index.weight_map))
    if only_index or only_single:
        example = (only_index or only_single)[0]
        owner = INDEX_FILE if only_index else SINGLE_FILE
        raise SourceError(
            f"disagrees with {INDEX_FILE} about the tensors",
            where=SINGLE_FILE,
            found=f"{len(only_index) + len(only_single)} tensors in one only, such as "
            f"'{escape(example)}' in {owner}",
            hint="Remove whichever of the two is left over from another save.",
        )
    return f"{SINGLE_FILE} is used; {INDEX_FILE} names the same tensors and is ignored"


def _check_present(root: Path, index: Index) -> None:
    # a dangling link is present: opening it tells where it leads
    missing = [file for file in index.files if not os.path.lexists(root / file)]
    if not missing:
        return
    for file in missing:
        twin = _case_twin(root, file)
        if twin:
            raise SourceError(
                "shard name differs in case only",
                where=INDEX_FILE,
                found=f"{escape(twin)}, index says {escape(file)}",
                hint="Rename the file as the index says.",
            )
    plural = "shard is" if len(missing) == 1 else "shards are"
    raise SourceError(
        f"{len(missing)} {plural} missing: {listing(missing)}",
        where=INDEX_FILE,
        hint=_resharded(root, index) or "Fetch the checkpoint again.",
    )


def _case_twin(root: Path, file: str) -> str | None:
    folder, _, name = file.rpartition("/")
    try:
        entries = sorted(os.listdir(root / folder))
    except OSError:
        return None
    twin = next((entry for entry in entries if entry.casefold() == name.casefold()), None)
    return f"{folder}/{twin}" if twin and folder else twin


def _resharded(root: Path, index: Index) -> str | None:
    """Return a hint when the folder holds a complete set of shards that the index does not name."""
    sets: dict[tuple[str, int], set[int]] = {}
    for name in os.listdir(root):
        match = _SHARD.fullmatch(name)
        if match and name not in index.files:
            key = (match["stem"], int(match["total"]))
            sets.setdefault(key, set()).add(int(match["number"]))
    for (stem, total), numbers in sorted(sets.items()):
        if total and numbers == set(range(1, total + 1)):
            return (
                f"The folder holds a complete set of {total} shards named "
                f"{escape(stem)}-...-of-{total:05d}: the names look re-sharded, "
                f"so fetch the index that belongs to them."
            )
    return None


def _no_weights(names: Sequence[str]) -> SourceError:
    """Return the refusal for a folder without safetensors, by what it holds instead."""
    if "adapter_config.json" in names:
        return SourceError(
            "the folder holds only adapters",
            where="adapter_config.json",
            hint="Merge a LoRA first (in peft: merge_and_unload, then save_pretrained); "
            "`adaconvert molora FOLDER DST --standalone` writes adapters with their model.",
        )
    other = [name for name in names if name.endswith(".safetensors")]
    if any(_SHARD.fullmatch(name) for name in other):
        return SourceError(
            f"{INDEX_FILE} is missing", where=listing(other, 3), hint="Fetch the checkpoint again."
        )
    if other:
        return SourceError(
            f"{SINGLE_FILE} is missing",
            found=listing(other),
            hint=f"Rename the right one to {SINGLE_FILE} if it is the model.",
        )
    return _other_format(names)


_RESAVE = (
    "Convert it to safetensors first (for example load it with transformers and save_pretrained)."
)


def _other_format(names: Sequence[str]) -> SourceError:
    gguf = _weights(names, (".gguf",))
    if gguf:
        hint = "Convert it to safetensors first (for example load it with transformers, "
        hint += "from_pretrained(folder, gguf_file=name), and save_pretrained)."
        return SourceError("GGUF files are not read", where=listing(gguf, 3), hint=hint)
    pickles = _weights(names, _PICKLES)
    if pickles:
        return SourceError(
            "pickled weights are never opened", where=listing(pickles, 3), hint=_RESAVE
        )
    foreign = _weights(names, _FOREIGN)
    if foreign:
        return SourceError(
            "weights in this format are not read", where=listing(foreign, 3), hint=_RESAVE
        )
    if "snapshots" in names:
        hint = "Give one of the folders in its snapshots/, or the hub id."
        return SourceError("this is a repository folder of the hub cache", hint=hint)
    return SourceError(
        "the folder holds no weights",
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        found=listing(list(names), 10),
    )


def _weights(names: Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in names if name.endswith(suffixes) and not _NOT_WEIGHTS.match(name)]


def check_against_index(
    index: Index, by_file: Mapping[str, Mapping[str, object]], ignore_unindexed: bool
) -> tuple[str, ...]:
    """Return the stored tensors the index does not name, which the caller leaves out.

    Args:
        index: the index.
        by_file: tensor names of every shard.
        ignore_unindexed: allow such tensors.

    Raises:
        SourceError: a shard lacks a tensor the index lists, or holds one it lacks and may not.
    """
    for name, file in index.weight_map.items():
        if name not in by_file[file]:
            holder = next((other for other in by_file if name in by_file[other]), None)
            raise SourceError(
                f"index lists tensor '{escape(name)}', which the shard does not hold",
                where=escape(file),
                found=f"it in {escape(holder)}" if holder else None,
                hint="Fetch the checkpoint again: index and shards are of different saves.",
            )
    extra = [(file, name) for file, stored in by_file.items() for name in stored]
    extra = [(file, name) for file, name in extra if name not in index.weight_map]
    if extra and not ignore_unindexed:
        file, name = extra[0]
        raise SourceError(
            f"holds {len(extra)} tensors the index lacks, such as '{escape(name)}'"
            if len(extra) > 1
            else f"holds tensor '{escape(name)}', which the index lacks",
            where=escape(file),
            hint="Pass --ignore-unindexed to leave them out.",
        )
    return tuple(name for _, name in extra)
