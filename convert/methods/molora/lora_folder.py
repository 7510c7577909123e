"""A folder with a stock LoRA adapter, opened: adapter_config.json and adapter_model.safetensors.

Neither peft nor torch is needed, and no weight is read before it is asked for.
Shapes: n inputs and m outputs of a linear, r rank.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.dtypes import WEIGHT_DTYPES, numpy_dtype
from adaconvert.errors import SourceError
from adaconvert.io.header import ShardHeader, read_shard_header
from adaconvert.io.hub import resolve
from adaconvert.io.names import escape, listing
from adaconvert.io.regular import open_regular, pread_exact
from adaconvert.io.source import check_identity
from adaconvert.io.strict_json import load_object
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.molora.lora_settings import (
    CONFIG_FILE,
    Settings,
    check_name,
    settings_of,
)
from adaconvert.planning.arrays import to_float32

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MAX_CONFIG = 4 << 20
_CHUNK = 8 << 20
#: a factor of a linear; adapters saved by hand keep the name they had in memory.
_FACTOR = re.compile(
    r"base_model\.model\.(?P<path>.+)\.lora_(?P<which>[AB])(?:\.(?!weight$)[^.]+)?\.weight"
)
#: PEFT writes the embedding itself beside its adapter.
_EMBEDDING = re.compile(
    r"\.(embed_tokens|wte|embed_in|word_embeddings)\.(base_layer|lora_embedding)"
)
#: it does so beside that of the output layer, whose matrix may be the embedding's.
_HEAD = re.compile(r"\.(lm_head|embed_out)\.base_layer")
#: part of a tensor's name -> what an adapter with such tensors is.
_OTHERS = {
    "lora_magnitude_vector": "the magnitudes of a DoRA",
    "lora_embedding_": "an adapter of the embedding",
    "base_layer.": "an adapter of a parameter that is no linear (target_parameters)",
    "modules_to_save": "a whole module",
    "trainable_tokens": "rows of the embedding",
    "token_adapter": "rows of the embedding",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """The factors of one linear.

    Attributes:
        a: [r, n].
        b: [m, r].
        scaling: what B A is multiplied by.
    """

    a: TensorRef
    b: TensorRef
    scaling: float

    @property
    def rank(self) -> int:
        """Return r."""
        return self.a.shape[0]

    @property
    def sizes(self) -> tuple[int, int]:
        """Return n and m."""
        return self.a.shape[1], self.b.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFolder:
    """A LoRA adapter that has been opened for reading.

    Attributes:
        name: what it is called in notes and cards.
        root: its folder.
        settings: what its adapter_config.json says of the factors.
        config: that file.
        modules: by the path of the linear in memory, in the order of the paths.
        header: of its weights.
        notes: what the user should know.
    """

    name: str
    root: Path
    settings: Settings
    config: Mapping[str, object] = field(repr=False)
    modules: Mapping[str, LoraModule] = field(repr=False)
    header: ShardHeader = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """Return the largest rank."""
        return max(module.rank for module in self.modules.values())

    @property
    def dtype(self) -> str:
        """Return the widest dtype of a factor, as in a safetensors header."""
        found = {ref.dtype for module in self.modules.values() for ref in (module.a, module.b)}
        return "BF16" if found == {"BF16"} else "F16" if found == {"F16"} else "F32"

    def read(self, path: str) -> tuple[Array, Array]:
        """Return the factors of a linear in float32, [r, n] and [m, r].

        Raises:
            SourceError: the file has changed, or a value is not finite.
            ResourceError: it may not be read.
        """
        module = self.modules[path]
        return self._read(module.a), self._read(module.b)

    def _read(self, ref: TensorRef) -> Array:
        import numpy

        where = f"{escape(self.name)}/{WEIGHTS_FILE}"
        with open_regular(self.root / WEIGHTS_FILE, where) as (descriptor, status):
            check_identity(self.header, status)
            data = pread_exact(descriptor, ref.nbytes, ref.start, where)
        raw = numpy.frombuffer(data, dtype=numpy_dtype(ref.dtype)).reshape(ref.shape)
        found = to_float32(raw, ref.dtype)
        if not numpy.isfinite(found).all():
            raise SourceError(f"tensor '{escape(ref.name)}' holds NaN or infinity", where=where)
        return found

    def digest(self) -> str:
        """Return the sha256 of everything the adapter computes: its settings and every byte of its
        weights.

        Raises:
            SourceError: the file has changed.
            ResourceError: it may not be read.
        """
        found = hashlib.sha256(repr(sorted(self._scalings().items())).encode())
        where = f"{escape(self.name)}/{WEIGHTS_FILE}"
        with open_regular(self.root / WEIGHTS_FILE, where) as (descriptor, status):
            check_identity(self.header, status)
            for start in range(0, self.header.size, _CHUNK):
                count = min(_CHUNK, self.header.size - start)
                found.update(pread_exact(descriptor, count, start, where))
        return found.hexdigest()

    def _scalings(self) -> dict[str, float]:
        return {path: module.scaling for path, module in self.modules.items()}


def read_lora(folder: Path | str, name: str | None = None) -> LoraFolder:
    """Return the adapter in a folder, after checking it as a whole.

    Args:
        folder: it, or a hub id.
        name: what to call it; the name of the folder when None.

    Raises:
        SourceError: it is damaged, is no LoRA, or one that cannot become an expert.
        OptionError: its name is a bare number.
        ResourceError: a file may not be read, or the hub cannot be reached.
    """
    root, label, _ = resolve(folder)
    name = label.rpartition("/")[2] if name is None else name
    check_name(name)
    shown = escape(name)
    _check_files(root, shown)
    config = load_object(root / CONFIG_FILE, f"{shown}/{CONFIG_FILE}", _MAX_CONFIG)
    settings = settings_of(config, shown)
    # PEFT never splits an adapter into several files
    where = f"{shown}/{WEIGHTS_FILE}"
    header = read_shard_header(root / WEIGHTS_FILE, where)
    modules = _modules(header, settings, where)
    return LoraFolder(
        name=name,
        root=root,
        settings=settings,
        config=config,
        modules=modules,
        header=header,
        notes=settings.notes,
    )


def names_of(folders: list[str]) -> list[str]:
    """Return a name for each of several folders or hub ids, the shortest end that tells them apart.

    The same folder given twice is told apart by a number.
    """
    parts = [[part for part in re.split(r"[/\\]+", folder) if part] for folder in folders]
    most = max((len(own) for own in parts), default=0)
    for count in range(1, most + 1):
        names = ["-".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    last = [own[-1] if own else "" for own in parts]
    return [f"{name}-{index}" for index, name in enumerate(last, start=1)]


def _check_files(root: Path, shown: str) -> None:
    """Return only when the folder holds what PEFT saves of one adapter."""
    names = sorted(os.listdir(root))
    if CONFIG_FILE not in names:
        inner = [name for name in names if (root / name / CONFIG_FILE).is_file()]
        hint = "Give the folder that PEFT's save_pretrained wrote."
        if inner:
            hint = f"Adapters are in the folders below it: {listing(inner, 8)}."
        found = "a whole model" if "config.json" in names else None
        raise SourceError(
            "is no adapter", where=shown, expected=CONFIG_FILE, found=found, hint=hint
        )
    if WEIGHTS_FILE in names:
        return
    if _PICKLE in names:
        raise SourceError(
            "the weights are a pickle, which can run code when it is read",
            where=f"{shown}/{_PICKLE}",
            expected=WEIGHTS_FILE,
            hint="Load it where you trust it, and save it again with PEFT's save_pretrained.",
        )
    raise SourceError("the weights are missing", where=shown, expected=WEIGHTS_FILE)


def _modules(header: ShardHeader, settings: Settings, where: str) -> dict[str, LoraModule]:
    """Return the factors by linear, each pair checked against the settings."""
    pairs: dict[str, dict[str, TensorRef]] = {}
    for name, ref in header.tensors.items():
        match = _FACTOR.fullmatch(name)
        _check_tensor(ref, match, where)
        assert match is not None
        pair = pairs.setdefault(match["path"], {})
        if match["which"] in pair:
            raise SourceError(
                f"holds two adapters for '{escape(match['path'])}'",
                where=where,
                hint="Save one adapter a folder.",
            )
        pair[match["which"]] = ref
    return {path: _module(path, pairs[path], settings, where) for path in sorted(pairs)}


def _check_tensor(ref: TensorRef, match: re.Match[str] | None, where: str) -> None:
    here = f"{where}: tensor '{escape(ref.name)}'"
    others = [what for part, what in _OTHERS.items() if part in ref.name]
    others += ["a bias"] if ref.name.endswith(".bias") else []
    if others:
        found = ((_EMBEDDING, "the embedding"), (_HEAD, "the output layer"))
        of = next((what for pattern, what in found if pattern.search(ref.name)), None)
        what = f"an adapter of {of}" if of else others[0]
        raise SourceError(
            f"is {what}, which cannot become part of an expert",
            where=here,
            hint=f"Train it again without {of}." if of else None,
        )
    if match is None:
        raise SourceError(
            "is no factor of a LoRA",
            where=here,
            expected="base_model.model.<module>.lora_A.weight or lora_B.weight",
        )
    if len(ref.shape) != 2 or 0 in ref.shape:
        raise SourceError(
            "is no matrix: only adapters of linears can be composed",
            where=here,
            found=escape(ref.shape),
        )
    if ref.dtype not in WEIGHT_DTYPES:
        raise SourceError(
            "is quantised", where=here, expected=", ".join(WEIGHT_DTYPES), found=ref.dtype
        )


def _module(path: str, pair: Mapping[str, TensorRef], settings: Settings, where: str) -> LoraModule:
    here = f"{where}: '{escape(path)}'"
    if len(pair) != 2:
        lacks = "lora_B" if "A" in pair else "lora_A"
        raise SourceError(f"has no {lacks}.weight", where=here, hint="Save the adapter again.")
    a, b, rank = pair["A"], pair["B"], settings.rank_of(path)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise SourceError(
            "the factors are not of the rank that adapter_config.json says",
            where=here,
            expected=f"A of {rank} rows and B of {rank} columns",
            found=f"A {list(a.shape)} and B {list(b.shape)}",
        )
    return LoraModule(a=a, b=b, scaling=settings.scaling_of(path))
