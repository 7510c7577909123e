"""Adapter folders of PEFT, opened: configuration and tensors, checked as far as they go alone.

Routed adapters (peft_type "MOLORA") and stock LoRA. No weight is read and nothing is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaconvert.arch.adapters import PEFT_TYPE
from adaconvert.dtypes import BY_NAME
from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.io.adapter_files import ADAPTER_CONFIG as CONFIG
from adaconvert.io.adapter_files import ADAPTER_WEIGHTS as WEIGHTS
from adaconvert.io.header import read_shard_header
from adaconvert.io.hub import resolve
from adaconvert.io.names import escape, listing
from adaconvert.io.source import Source
from adaconvert.io.source_config import MAX_CONFIG_BYTES, sanitise
from adaconvert.io.strict_json import load_object
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.methods.molora.lora_folder import read_lora
from adaconvert.methods.molora.routed_settings import check_named, check_settings

LORA = "LORA"
#: what a checkpoint has and an adapter folder has not.
_MODEL = ("config.json", "model.safetensors", "model.safetensors.index.json")
_PICKLE = "adapter_model.bin"
#: what follows the path of a linear in the name of a tensor -> what it is called in a checkpoint.
_TENSORS = {
    "molora_A": "adapters.a",
    "molora_B": "adapters.b",
    "molora_vectors": "adapters.vectors",
    "molora_router": "router.weight",
}
_NAME = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<what>" + "|".join(map(re.escape, _TENSORS)) + ")"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSource:
    """An adapter folder.

    Attributes:
        source: its files; `config` is adapter_config.json, `tensors` are those it holds.
        kind: "MOLORA" or "LORA".
        tensors: path of a linear -> name as checkpoints have it, such as "adapters.a" -> tensor.
        scalings: of LoRA, path of a linear -> what B A is multiplied by.
    """

    source: Source
    kind: str
    tensors: Mapping[str, Mapping[str, TensorRef]]
    scalings: Mapping[str, float] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, object]:
        """Return adapter_config.json without what could load code or tell secrets."""
        return self.source.config

    @property
    def where(self) -> str:
        """Return how messages name its configuration."""
        return f"{self.source.label}/{CONFIG}"


def is_adapter_folder(where: str | Path, *, revision: str | None = None) -> bool:
    """Tell whether a folder or hub id holds adapters and no model; what cannot be reached does not.

    Args:
        where: folder, hub-cache snapshot or hub id.
        revision: branch, tag or commit of a hub id.
    """
    folder = Path(where).expanduser()
    try:
        if not folder.is_dir():
            folder = resolve(where, revision)[0]
        return (folder / CONFIG).is_file() and not any((folder / n).exists() for n in _MODEL)
    except (AdaconvertError, OSError, RuntimeError, ValueError):
        return False


def refuse_adapters(where: str | Path) -> None:
    """Return only when a folder is no adapter folder, where experts are to be chosen.

    Raises:
        OptionError: it is.
    """
    if is_adapter_folder(where):
        raise OptionError(
            "holds adapters, which choose no experts to run fewer of",
            where=escape(Path(where).name),
            hint="Calibrate the model they are for, where that is adaptive.",
        )


def open_adapters(where: str | Path, *, revision: str | None = None) -> AdapterSource:
    """Return an adapter folder.

    Raises:
        SourceError: it is damaged, or of another method of PEFT.
        OptionError: `where` or `revision` is not of the right form.
        ResourceError: a file may not be read, or the hub cannot be reached.
    """
    root, label, commit = resolve(where, revision)
    raw = load_object(root / CONFIG, CONFIG, MAX_CONFIG_BYTES)
    kind = raw.get("peft_type")
    if kind not in (PEFT_TYPE, LORA):
        raise SourceError(
            "holds adapters of a kind that is not run",
            where=f"{escape(label)}/{CONFIG}",
            expected=f"peft_type {PEFT_TYPE} or {LORA}",
            found=escape(kind, 40),
        )
    where = f"{escape(label)}/{CONFIG}"
    if kind == PEFT_TYPE:
        check_settings(raw, where)
    source = _source(root, label, commit, raw)
    if kind == PEFT_TYPE:
        tensors = _by_linear(source.tensors.values())
        check_named(raw, tensors, where)
        return AdapterSource(source=source, kind=PEFT_TYPE, tensors=tensors)
    # named after a folder, which may have a number for its name
    found = read_lora(root, f"adapter {label.rpartition('/')[2]}").modules
    return AdapterSource(
        source=source,
        kind=LORA,
        tensors={
            path: {
                "adapters.a": source.tensors[module.a.name],
                "adapters.b": source.tensors[module.b.name],
            }
            for path, module in found.items()
        },
        scalings={path: module.scaling for path, module in found.items()},
    )


def _source(root: Path, label: str, commit: str | None, raw: dict[str, object]) -> Source:
    if not (root / WEIGHTS).exists() and (root / _PICKLE).exists():
        raise SourceError(
            "pickled weights are never opened",
            where=_PICKLE,
            hint="Load it with PEFT and save it again: save_pretrained writes safetensors.",
        )
    shard = read_shard_header(root / WEIGHTS, WEIGHTS)
    clean, _, _ = sanitise(raw)
    # where its base lay is what it is for
    named = raw.get("base_model_name_or_path")
    clean["base_model_name_or_path"] = named if isinstance(named, str) else None
    text = json.dumps(raw, sort_keys=True) + json.dumps([shard.size, shard.sha256])
    names = sorted(name for name in os.listdir(root) if name not in (CONFIG, WEIGHTS))
    return Source(
        root=root,
        label=label,
        revision=commit,
        config=clean,
        raw_config=raw,
        tensors=dict(shard.tensors),
        files=(WEIGHTS,),
        shards=(shard,),
        unindexed=(),
        notes=(),
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        side_files=tuple(name for name in names if (root / name).is_file()),
    )


def _by_linear(refs: Iterable[TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Return the tensors by linear.

    Raises:
        SourceError: one is no part of adapters on linears, or holds no floats.
    """
    found: dict[str, dict[str, TensorRef]] = {}
    strange = []
    for ref in refs:
        parts = _NAME.fullmatch(ref.name)
        if parts is None or not BY_NAME[ref.dtype].is_float:
            strange.append(ref.name)
        else:
            found.setdefault(parts["path"], {})[_TENSORS[parts["what"]]] = ref
    if strange:
        raise SourceError(
            f"holds what is no part of adapters on linears: {listing(strange)}",
            where=WEIGHTS,
            hint="Whole modules saved beside adapters (modules_to_save) are not read.",
        )
    return found
