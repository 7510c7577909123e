"""Tokens of earlier runs, under a key of everything they depend on.

    <cache>/tokens/<key>/ids.npy     int32 [N, L]
    <cache>/tokens/<key>/kinds.npy   uint8 [N, L], only with conversations
    <cache>/tokens/<key>/entry.json  what was taken from each source, and digests of the files

An entry gets its name when it is complete. One whose files do not fit their digests is made again.
Whatever goes wrong with the cache costs time and nothing else.

Shapes: N sequences, L tokens each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adaconvert.data.fingerprint import fingerprint_of
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.sources import Opened

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]
    Entry = tuple[Array, Array | None, dict[str, Any]]

#: raised whenever the same data give other sequences.
VERSION: Final = 1
ENVIRONMENT: Final = "ADACONVERT_CACHE"
_ENTRY: Final = "entry.json"
_TOKENIZER: Final = ("*token*", "vocab*", "merges*", "chat_template*", "*.model", "*.tiktoken")
_LIBRARIES: Final = ("transformers", "tokenizers")

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return where caches lie: `ADACONVERT_CACHE`, below `HF_HOME`, or the user's cache folder."""
    own = os.environ.get(ENVIRONMENT)
    if own:
        return Path(own).expanduser()
    hub = os.environ.get("HF_HOME")
    if hub:
        return Path(hub).expanduser() / "adaconvert"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "adaconvert"


def key_of(config: FinetuneConfig, sources: Sequence[Opened], folder: Path) -> str | None:
    """Return the key of what `data.pack` would make, None when nobody can know.

    Args:
        config: weights, lengths, budget and seed.
        sources: with their formats.
        folder: checkpoint with the tokenizer.

    Raises:
        DataError: a source is missing.
        ResourceError: it may not be read.
    """
    data = []
    for source, given in zip(sources, config.data, strict=True):
        found = fingerprint_of(source.where, split=source.split, commit=source.commit)
        if found is None:
            return None
        data.append([found, source.label, source.format, source.field, given.weight])
    count = config.total_steps * config.step_sequences
    facts = [VERSION, data, tokenizer_facts(folder), config.seq_len, config.seed, count]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def tokenizer_facts(folder: Path) -> list[Any]:
    """Return what the tokens of a text depend on, besides the text."""
    files = sorted({path for name in _TOKENIZER for path in folder.glob(name) if path.is_file()})
    raws = [path.read_bytes() for path in files]
    hashes = [[path.name, _sha256(raw)] for path, raw in zip(files, raws, strict=True)]
    config = load_object(folder / CONFIG_FILE, CONFIG_FILE, MAX_CONFIG_BYTES)
    # such a chat template may write today's date
    today = str(date.today()) if any(b"strftime_now" in raw for raw in raws) else None
    versions = [metadata.version(name) for name in _LIBRARIES]
    return [hashes, _sha256(json.dumps(config, sort_keys=True).encode()), versions, today]


class TokenCache:
    """A folder of entries.

    Args:
        folder: it need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> TokenCache:
        """Return the cache of this user."""
        return cls(cache_folder() / "tokens")

    def load(self, key: str) -> Entry | None:
        """Return an entry, mapped from disk; None when there is none, or it is damaged."""
        path = self.folder / key
        if not (path / _ENTRY).exists():
            return None
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("cached tokens are damaged and made again: %s", error)
            shutil.rmtree(path, ignore_errors=True)
            return None

    def store(
        self, key: str, ids: Array, kinds: Array | None, facts: Mapping[str, Any]
    ) -> Entry | None:
        """Return the entry that holds this afterwards, None when it cannot be written.

        Args:
            key: its name.
            ids: [N, L].
            kinds: [N, L].
            facts: JSON data to keep beside them.
        """
        path = self.folder / key
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".making-", dir=self.folder) as made:
                content = Path(made) / "content"
                content.mkdir()
                _write(content, ids, kinds, facts)
                try:
                    content.rename(path)
                except OSError:
                    # another run was faster
                    if not path.is_dir():
                        raise
        except OSError as error:
            _log.warning("tokens are not cached: %s", error.strerror or "the disk fails")
            return None
        return self.load(key)


def _write(folder: Path, ids: Array, kinds: Array | None, facts: Mapping[str, Any]) -> None:
    import numpy

    arrays = {"ids": ids} if kinds is None else {"ids": ids, "kinds": kinds}
    hashes = {}
    for name, array in arrays.items():
        with (folder / f"{name}.npy").open("wb") as file:
            numpy.lib.format.write_array(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        hashes[name] = [list(array.shape), str(array.dtype), _sha256(array)]
    entry = {"facts": dict(facts), "arrays": hashes}
    sealed = {**entry, "seal": _seal(entry)}
    (folder / _ENTRY).write_text(json.dumps(sealed, indent=2, sort_keys=True), encoding="utf-8")


def _read(folder: Path) -> Entry:
    """Return an entry.

    Raises:
        ValueError, KeyError, TypeError: it is damaged.
        OSError: it cannot be read.
    """
    import numpy

    entry = json.loads((folder / _ENTRY).read_text(encoding="utf-8"))
    if entry.pop("seal") != _seal(entry):
        raise ValueError(f"{_ENTRY} was changed")
    found: dict[str, Array] = {}
    for name, (shape, kind, digest) in entry["arrays"].items():
        array = numpy.lib.format.open_memmap(folder / f"{name}.npy", mode="r")
        if [list(array.shape), str(array.dtype), _sha256(array)] != [shape, kind, digest]:
            raise ValueError(f"{name}.npy was changed")
        found[name] = array
    return found["ids"], found.get("kinds"), entry["facts"]


def _seal(entry: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(entry, sort_keys=True).encode())


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
