"""Fine-tunes of adapter folders: adapters and routers are trained, and a folder is written again.

The model that runs is the view of the folder on its base (`methods.molora.view`); the base is
never trained, kept or written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaconvert.arch.routed_layers import routed_of
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from adaconvert.io.commit import Staging
from adaconvert.io.names import escape
from adaconvert.io.reader import read_torch
from adaconvert.io.tensor_ref import TensorRef
from adaconvert.io.writer import ShardLayout, layout_shards
from adaconvert.methods.molora.adapter_source import LORA
from adaconvert.methods.molora.view import View
from adaconvert.methods.sources import Described
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.export import Target, own_source, targets_in, write_values
from adaconvert.train.parts import PARTS

#: what is trained of a folder, by the names users give to parts.
_OWN = ("adapters", "router")
_ROUTER = ".router.weight"
#: adapters that are none of a block that tokens may skip.
_APART = r"^(?!.*\.depth\.)(.*\.)?(adapters?|lora_[^.]*)\."


def read_folders(item: Described) -> list[Path]:
    """Return the folders that are read."""
    if item.view is None:
        return [item.source.root]
    return [item.view.adapters.source.root, item.view.base.source.root]


def assert_unchanged(item: Described) -> None:
    """Return only when every file that is read is still the one that was opened.

    Raises:
        SourceError: one was replaced, rewritten or removed.
    """
    item.source.assert_unchanged()
    own_source(item).assert_unchanged()


def check_options(item: Described, config: FinetuneConfig) -> None:
    """Return only when a fine-tune changes nothing but adapters and their routers.

    Raises:
        OptionError: an option would change the base, which is not written.
    """
    view = item.view
    if view is None:
        return
    why = "would change the base of the adapters, which is not written"
    asked = {
        "--lora": config.adapting.rank > 0,
        "--activation": config.sparsity.activation != "keep",
        "--balance-kind bias": config.routing.kind == "bias",
        config.routing.budgets or "": config.routing.budgets is not None,
    }
    for flag, given in asked.items():
        if given:
            raise OptionError(why, where=flag, hint="Leave it out, or give --standalone adapters.")
    for part in config.train:
        if part not in ("all", *_OWN):
            _check_expression(view, item, part)


def _check_expression(view: View, item: Described, part: str) -> None:
    """Return only when a part or expression names no tensor of the base."""
    if part in PARTS:
        example: str | None = part
    else:
        names = (name for name in item.source.tensors if re.search(part, name))
        example = next((name for name in names if name not in view.names), None)
    if example is not None:
        raise OptionError(
            f"names {escape(example, 120)!r}, which is of the base",
            where=f"--train {escape(part, 80)}",
            expected="adapters, router, or an expression that matches tensors of adapters only",
        )


def settled(config: FinetuneConfig, item: Described) -> FinetuneConfig:
    """Return the config with what it trains of an adapter folder spelled out.

    Routers of the base are not among "router", nor what its tokens run that skip blocks among
    "adapters".
    """
    view = item.view
    if view is None:
        return config
    owners = [name.removesuffix(_ROUTER) for name in view.parameters if name.endswith(_ROUTER)]
    wanted = [part for part in config.train if part != "all"]
    if "all" in config.train:
        wanted = ["adapters", *(["router"] if owners else []), *wanted]
    if "router" in wanted and owners and _routes(view):
        ends = "|".join(sorted({re.escape(path.rpartition(".")[2]) for path in owners}))
        wanted = [rf"\.({ends})\.router\.weight$" if p == "router" else p for p in wanted]
    if routed_of(view.base.spec.adaptive):
        wanted = [_APART if part == "adapters" else part for part in wanted]
    return replace(config, train=tuple(dict.fromkeys(wanted)))


def _routes(view: View) -> bool:
    """Return whether the base has routers of its own."""
    return view.base.spec.num_experts > 0 or view.base.spec.adaptive is not None


def settle(model: Any, view: View) -> None:
    """Give trained adapters the values of the folder, and drop what adapters read, in training, as
    its configuration says.

    Args:
        model: loaded from the view, in the dtype of the base, and prepared for training.
        view: the folder.

    Raises:
        SourceError: the share that is dropped is none.
    """
    from adaconvert.train.shards import restore

    source = view.adapters.source
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    shapes = {name: value.shape for name, value in model.named_parameters()}
    exact = {
        name: read_torch(source, ref).reshape(shapes[name])
        for name, ref in view.parameters.items()
        if name in trained
    }
    restore(model, exact)
    _drop_inputs(model, view)


def _drop_inputs(model: Any, view: View) -> None:
    name = "lora_dropout" if view.adapters.kind == LORA else "dropout"
    share = view.adapters.config.get(name) or 0.0
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
        raise SourceError(
            "is no share",
            where=f"{view.adapters.where}: {name}",
            expected="0 or more, below 1",
            found=escape(share, 40),
        )
    if share:
        for site in model.adaptive_adapters().values():
            _drop_input(site.adapters, float(share))


def _drop_input(adapters: Any, share: float) -> None:
    from torch.nn import functional

    after = adapters.after

    def dropped(x: Any, out: Any, gates: Any) -> Any:
        return after(functional.dropout(x, share, training=adapters.training), out, gates)

    adapters.after = dropped


def trained_of(view: View, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training made of the adapters, by parameter; the rest is as it was.

    Args:
        view: the folder.
        state: everything that changed, by name.
    """
    return {name: value for name, value in state.items() if name in view.parameters}


def write(
    staging: Staging,
    view: View,
    trained: Path,
    dtype: str,
    *,
    progress: bool = False,
) -> tuple[ShardLayout, ...]:
    """Return the file of weights, written with adapter_config.json beside it.

    Args:
        staging: takes them.
        view: the folder that was trained.
        trained: file of `trained_of`.
        dtype: config name for adapters, "keep" for the folder's; routers keep theirs.
        progress: show a progress bar.

    Raises:
        VerificationError: a tensor holds NaN or infinity.
        ResourceError: the disk is full or broken.
    """
    from safetensors import safe_open

    source = view.adapters.source
    places = {ref.name: name for name, ref in view.parameters.items()}
    targets = [
        Target(name=name, dtype=_dtype(ref, places[name], dtype), shape=ref.shape)
        for name, ref in source.tensors.items()
    ]
    layouts = tuple(replace(one, file=ADAPTER_WEIGHTS) for one in layout_shards(targets, None))
    with safe_open(trained, framework="pt") as opened:
        known = set(opened.keys())

        def value(name: str) -> Any:
            place, ref = places[name], source.tensors[name]
            found = opened.get_tensor(place) if place in known else read_torch(source, ref)
            return found.reshape(ref.shape)

        write_values(staging, layouts, value, progress=progress)
    config = {**source.config, "base_model_name_or_path": view.named}
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=True) + "\n"
    staging.write_file(ADAPTER_CONFIG, text.encode())
    return layouts


def _dtype(ref: TensorRef, place: str, wanted: str) -> str:
    return ref.dtype if place.endswith(_ROUTER) else targets_in(ref.dtype, wanted)
