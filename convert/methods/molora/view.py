"""Adapter folders as checkpoints: a temporary folder with the base's files and the adapters.

The base is not copied: its weights and side files are links. config.json names the adapted linears
as that of a standalone checkpoint does, and one more shard has the adapters under its names. So
whatever reads checkpoints reads adapter folders; what writes must know, see `View`.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adaconvert.arch import adaptive
from adaconvert.arch.adapters import LORA as KIND
from adaconvert.arch.adapters import Linear, linears, shapes_of, sites_of
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.card_file import CARD
from adaconvert.io.fingerprint import of_source
from adaconvert.io.index import INDEX_FILE
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.io.names import escape
from adaconvert.io.reader import iter_chunks
from adaconvert.io.source_config import CONFIG_FILE
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.io.writer import ShardLayout, layout_shards
from adaconvert.methods.molora.adapter_source import (
    LORA,
    AdapterSource,
    is_adapter_folder,
    open_adapters,
)
from adaconvert.methods.molora.base_at_hand import fingerprint_at
from adaconvert.methods.sources import Described, open_source
from adaconvert.planning.estimate import reference

#: side files of a base that say what is no longer so of the view.
_NOT_LINKED = (CARD, MANIFEST_FILE)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """One tensor of the adapters, as it lies in the view."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """An adapter folder on its base, for as long as it is open.

    Attributes:
        root: a checkpoint.
        adapters: the folder.
        base: what it is for.
        named: what a folder that is made of it names as its base.
        names: name of a tensor in the checkpoint -> its tensor in the folder.
        parameters: name of a parameter in memory -> its tensor in the folder.
    """

    root: Path
    adapters: AdapterSource
    base: Described
    named: str
    names: Mapping[str, TensorRef]
    parameters: Mapping[str, TensorRef]


@contextmanager
def standing(
    where: str, *, base: str | None = None, revision: str | None = None
) -> Iterator[tuple[str, View | None]]:
    """Yield where a checkpoint lies: `where`, or the view of an adapter folder, and that view.

    Args:
        where: folder, hub-cache snapshot or hub id.
        base: of an adapter folder; what it names itself when None.
        revision: branch, tag or commit of a hub id.

    Raises:
        OptionError: `base` was given, and `where` is no adapter folder.
        SourceError: as for `viewed`.
    """
    if not is_adapter_folder(where, revision=revision):
        if base is not None:
            raise OptionError("is for adapter folders", where="--base", found=escape(where))
        yield where, None
        return
    with viewed(where, base=base, revision=revision) as view:
        yield str(view.root), view


@contextmanager
def viewed(
    where: str | Path, *, base: str | None = None, revision: str | None = None
) -> Iterator[View]:
    """Yield an adapter folder as a checkpoint; nothing of it is left afterwards.

    Args:
        where: folder, hub-cache snapshot or hub id of adapters.
        base: folder or hub id of the model they are for; what they name themselves when None.
        revision: branch, tag or commit of a hub id.

    Raises:
        SourceError: the folder is damaged, or its base is not there or another.
        OptionError: `where`, `base` or `revision` is not of the right form.
        ResourceError: a file may not be read, or the hub cannot be reached.
    """
    adapters = open_adapters(where, revision=revision)
    under = _base(adapters, base)
    with TemporaryDirectory(prefix="adaconvert-") as made:
        # whose name outputs carry
        root = Path(made) / (adapters.source.label.rpartition("/")[2] or "adapters")
        root.mkdir()
        yield _built(root, adapters, under, _named(adapters, base))


def _base(adapters: AdapterSource, given: str | None) -> Described:
    """Return the model adapters are for."""
    named, commit = adapters.config["base_model_name_or_path"], adapters.config.get("revision")
    where = given or named
    if not where:
        raise SourceError(
            "does not say which model it is for",
            where=adapters.where,
            hint="Name it with --base.",
        )
    pinned = given is None and isinstance(commit, str) and not Path(str(where)).is_dir()
    try:
        return open_source(str(where), revision=str(commit) if pinned else None)
    except SourceError as error:
        if given is not None:
            raise
        raise SourceError(
            f"its base cannot be opened: {error.message}",
            where=adapters.where,
            expected=error.expected,
            found=f"base_model_name_or_path {escape(named)!r}",
            hint="Name the folder of the base with --base.",
        ) from error


def _named(adapters: AdapterSource, given: str | None) -> str:
    """Return what a folder names as its base: what was given, but not a copy of a hub's model."""
    named = adapters.config["base_model_name_or_path"]
    if not isinstance(named, str) or not named:
        return str(given)
    is_hub_id = _HUB_ID.fullmatch(named) is not None and not Path(named).exists()
    return named if given is None or (is_hub_id and Path(given).is_dir()) else given


def _built(root: Path, adapters: AdapterSource, base: Described, named: str) -> View:
    """Return the view, once its files lie in `root`."""
    known = _adapted(adapters, base)
    sites = _sites(adapters, base, known)
    _check_base(adapters, base, known)
    names, parameters = {}, {}
    for path, slots in sites.items():
        for name in _checked_tensors(adapters, path, slots["linear"]):
            ref = adapters.tensors[path][name]
            names[f"{known[path].stored}.{name}"] = ref
            parameters[f"{path}.{name}"] = ref
    _write(root, adapters, base, sites, names)
    return View(
        root=root,
        adapters=adapters,
        base=base,
        named=named,
        names=names,
        parameters=parameters,
    )


def _adapted(adapters: AdapterSource, base: Described) -> dict[str, Linear]:
    """Return the linears that have adapters, in the order of the modules.

    Raises:
        SourceError: the base has no such linear.
    """
    known = linears(base.spec)
    for path in adapters.tensors:
        if path not in known:
            raise SourceError(
                f"has adapters for {escape(path, 120)!r}, where a {base.spec.architecture} has no "
                "linear in its blocks",
                where=adapters.source.label,
                expected=f"paths such as {next(iter(known))!r}" if known else None,
                hint="Is it for another base?",
            )
    return {path: linear for path, linear in known.items() if path in adapters.tensors}


def _sites(
    adapters: AdapterSource, base: Described, known: Mapping[str, Linear]
) -> dict[str, dict[str, Any]]:
    """Return the slots of the adapted linears."""
    if adapters.kind == LORA:
        return {path: {"linear": _one(adapters, path, linear)} for path, linear in known.items()}
    sizes = {path: linear.sizes for path, linear in known.items()}
    try:
        return sites_of(adapters.config, sizes, hidden=base.spec.hidden)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise SourceError(
            f"does not describe routed adapters: {escape(error, 80)}", where=adapters.where
        ) from error


def _one(adapters: AdapterSource, path: str, linear: Linear) -> dict[str, Any]:
    """Return the slot of a stock LoRA: one adapter, which every token gets."""
    return {
        "adapters": {
            "kind": KIND,
            "count": 1,
            "input": linear.inputs,
            "output": linear.outputs,
            "rank": adapters.tensors[path]["adapters.a"].shape[0],
            "share": None,
            "scaling": adapters.scalings[path],
        },
        "router": {"kind": "none"},
        "select": {"rule": "uniform"},
    }


def _checked_tensors(
    adapters: AdapterSource, path: str, slot: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a linear as checkpoints name them, which the folder holds.

    Raises:
        SourceError: one is missing, of another shape, or too many.
    """
    shapes = shapes_of(path, slot)
    held = {name: ref.shape for name, ref in adapters.tensors[path].items()}
    if adapters.kind == LORA:
        held = {name: (1, *shape) for name, shape in held.items()}
    if held != shapes:
        wrong = sorted(name for name in {*held, *shapes} if held.get(name) != shapes.get(name))[0]
        raise SourceError(
            f"{wrong} of {escape(path, 120)!r} does not fit its configuration and base",
            where=adapters.source.label,
            expected=list(shapes[wrong]) if wrong in shapes else "none",
            found=list(held[wrong]) if wrong in held else "none",
            hint="Is it for another base?",
        )
    return shapes


def _check_base(adapters: AdapterSource, base: Described, known: Mapping[str, Linear]) -> None:
    """Return only when the base is the one that adapters were made for, as far as they say so; a
    stock LoRA, which has no fingerprint, is held to the model it names, where that is here.

    Raises:
        SourceError: its weights are others.
    """
    wanted = adapters.config.get("base_fingerprint")
    named = adapters.config["base_model_name_or_path"]
    if wanted is None and adapters.kind == LORA and not _is_at(base, named):
        wanted = fingerprint_at(named if isinstance(named, str) else None, list(known))
    if wanted is None:
        return
    found = of_source(base.source, {path: linear.weight for path, linear in known.items()})
    if found != wanted:
        raise SourceError(
            f"was made for another base than {escape(base.source.label)}: the weights differ",
            where=adapters.source.label,
            expected=f"base_fingerprint {escape(wanted)[:16]}",
            found=str(found)[:16],
            hint="Name the right base with --base.",
        )


def _is_at(base: Described, named: object) -> bool:
    """Tell whether a base is the folder of this name."""
    return isinstance(named, str) and Path(named).resolve() == base.source.root.resolve()


def _write(
    root: Path,
    adapters: AdapterSource,
    base: Described,
    sites: Mapping[str, Any],
    names: Mapping[str, TensorRef],
) -> None:
    """Write the links, the shard of the adapters, the index and config.json."""
    source = base.source
    for name in source.side_files:
        if name not in _NOT_LINKED and name.rpartition(".")[2] != "py":
            os.symlink(source.path(name).absolute(), root / name)
    total = len(source.files) + 1
    files = {
        file: f"model-{number:05d}-of-{total:05d}.safetensors"
        for number, file in enumerate(source.files, 1)
    }
    for file, link in files.items():
        os.symlink(source.path(file).absolute(), root / link)
    own = f"model-{total:05d}-of-{total:05d}.safetensors"
    held = {name: files[ref.file] for name, ref in source.tensors.items()}
    index = {"metadata": {}, "weight_map": {**held, **dict.fromkeys(names, own)}}
    (root / INDEX_FILE).write_text(json.dumps(index))
    (root / CONFIG_FILE).write_text(json.dumps(_config(base, sites)))
    _write_shard(root / own, adapters, names)


def _write_shard(path: Path, adapters: AdapterSource, names: Mapping[str, TensorRef]) -> None:
    extra = (1,) if adapters.kind == LORA else ()
    targets = [
        Placed(name=name, dtype=ref.dtype, shape=(*extra, *ref.shape))
        for name, ref in names.items()
    ]
    layout: ShardLayout = layout_shards(targets, None)[0]
    with path.open("wb") as file:
        file.write(layout.header)
        for tensor in layout.tensors:
            file.writelines(iter_chunks(adapters.source, names[tensor.name]))


def _config(base: Described, sites: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the view; that of an adaptive base keeps its sites.

    It names no code: the installed classes run it.
    """
    if base.spec.adaptive is None:
        found = adaptive.config_with(base.spec, sites, reference(base.spec, frozenset()))
        return {key: value for key, value in found.items() if key != "auto_map"}
    found = copy.deepcopy(base.source.config)
    assert isinstance(found["adaptive"], dict)
    found["adaptive"]["calibration"] = None
    for path, slots in sites.items():
        found["adaptive"]["sites"].setdefault(path, {}).update(slots)
    return found
