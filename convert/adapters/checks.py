"""What routed adapters may be called, and which modules can have them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaconvert.adapters.config import MoloraConfig
from adaconvert.adapters.layer import MoloraLinear
from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_linear import block_of, sizes_of

_ALL = "all-linear"


def check_name(name: str, model: nn.Module) -> None:
    """Refuse a name that PEFT cannot tell from part of a module's path.

    Saving one adapter set, PEFT leaves out every tensor that has the name of another between two
    dots: a set named "0" costs all others their first layer.

    Raises:
        OptionError: why, and what to do.
    """
    reason = None
    if not name or "." in name:
        reason = "is empty or has a dot"
    elif name.isdecimal():
        reason = "is a bare integer, and so are the names of layers"
    elif any(name in path.split(".") for path, _ in model.named_modules()):
        reason = "is also the name of a module of the model"
    if reason is not None:
        raise OptionError(
            f"{reason}: PEFT would lose tensors when it saves other adapters",
            where=f"adapter name {name!r}",
            hint=f"Use another name, such as 'adapter{name.replace('.', '_')}'.",
        )


def targets_of(config: MoloraConfig, model: nn.Module) -> dict[str, nn.Module]:
    """Return the linears that get adapters, by path, in the order of the model.

    "all-linear" in `config` becomes the paths of all linears in blocks: no head, no pooler, and no
    gate.

    Raises:
        OptionError: a target matches nothing, or something that can have no routed adapters.
    """
    if hasattr(model, "adaptive_runtime"):
        raise OptionError(
            "is adaptive, and what it computes by itself does not pass through its linears",
            where="the base model",
            hint="Attach adapters to the dense model.",
        )
    modules = _outside_of_adapters(model)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == _ALL:
        config.target_modules = [
            path
            for path, module in modules.items()
            # one output is a gate, as of Qwen2-MoE's shared expert
            if _is_linear(module) and block_of(path) and (sizes_of(module) or (0, 0))[1] > 1
        ]
    found = {
        path: module for path, module in modules.items() if check_target_module_exists(config, path)
    }
    _check_matched(config, found, modules, model)
    for path, module in found.items():
        _check_kind(path, module, model)
    return found


def is_named(targets: Iterable[str] | str, path: str) -> bool:
    """Return whether a path is meant by PEFT's ends of paths, or by its regular expression."""
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def inputs_of(module: nn.Module) -> int:
    """Return the inputs of a linear, wrapped or not."""
    sizes = sizes_of(module)
    assert sizes is not None
    return sizes[0]


def block_with(path: str) -> str:
    """Return the path of the block that a linear is in.

    Raises:
        OptionError: it is in none.
    """
    block = block_of(path)
    if block is None:
        raise OptionError(
            "lies in no block, and its router was to read the input of one",
            where=f"target_modules: '{path}'",
            hint='Leave it out, or use a router of every linear (reads "module").',
        )
    return block


def hidden_size(model: Any) -> int:
    """Return the width of what blocks read.

    Raises:
        OptionError: the model does not say.
    """
    config = getattr(model, "config", None)
    inner = (
        config
        if config is None or not hasattr(config, "get_text_config")
        else (config.get_text_config())
    )
    size = getattr(inner, "hidden_size", None)
    if not isinstance(size, int):
        raise OptionError(
            "has no hidden_size, which a router of blocks needs", where="config of the base model"
        )
    return size


def _outside_of_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by path, without what adapters consist of."""
    found: dict[str, nn.Module] = {}
    inner: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path and not path.startswith(inner):
            found[path] = module
            if isinstance(module, BaseTunerLayer):
                inner = (*inner, f"{path}.")
    return found


def _check_matched(
    config: MoloraConfig,
    found: dict[str, nn.Module],
    modules: dict[str, nn.Module],
    model: nn.Module,
) -> None:
    wanted = config.target_modules
    assert wanted is not None
    each = [wanted] if isinstance(wanted, str) else sorted(wanted)
    for target in each:
        if isinstance(wanted, str):
            is_met = bool(found)
        else:
            is_met = any(path == target or path.endswith(f".{target}") for path in modules)
        if is_met:
            continue
        stacked = [
            name
            for name, parameter in model.named_parameters()
            if name.endswith(f".{target}") and parameter.dim() == 3
        ]
        raise OptionError(
            f"is the parameter '{stacked[0]}' of stacked experts, which is no linear"
            if stacked
            else "is no module of the model",
            where=f"target_modules: '{target}'",
            expected=_near(target, modules),
        )


def _near(target: str, modules: dict[str, nn.Module]) -> str:
    """Return the names of linears, those like the target first and alone where there are some."""
    names = {path.rpartition(".")[2] for path, module in modules.items() if _is_linear(module)}
    last = target.rpartition(".")[2]
    near = difflib.get_close_matches(last, sorted(names), n=3, cutoff=0.5)
    return "one of " + ", ".join(near or sorted(names))


def _check_kind(path: str, module: nn.Module, model: nn.Module) -> None:
    kind = type(module).__name__
    reason = None
    if isinstance(module, nn.Embedding) or module in _heads_of(model):
        reason = "is an embedding, or the output layer, whose matrix may be the embedding's"
    elif isinstance(module, BaseTunerLayer) and not isinstance(module, MoloraLinear):
        reason = f"has adapters of another PEFT method ({kind})"
    elif not _is_linear(module):
        reason = f"is no linear ({kind})"
    elif len(_parents_of(module, model)) > 1:
        reason = "is one module at several places of the model, and would be adapted at one"
    if reason is not None:
        raise OptionError(
            f"{reason}; routed adapters go on linears", where=f"target_modules: '{path}'"
        )


def _is_linear(module: nn.Module) -> bool:
    inner = module.base_layer if isinstance(module, MoloraLinear) else module
    # its matrix is read by the attention around it
    unused = isinstance(inner, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return isinstance(inner, nn.Linear | Conv1D) and not unused


def _heads_of(model: Any) -> list[nn.Module]:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [] if head is None else [head]


def _parents_of(module: nn.Module, model: nn.Module) -> set[int]:
    """Return what holds a module directly."""
    return {
        id(parent)
        for parent in model.modules()
        if any(child is module for child in parent._modules.values())
    }
