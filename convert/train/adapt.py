"""Low-rank adapters (PEFT's LoRA) on a model's matrices, and their way back into the matrices.

Experts of stock mixtures are parameters of three dimensions, [E, out, in], which PEFT adapts by
`target_parameters`; everything else is a matrix of a module. Routers, embeddings and output heads
get none.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import nn

from adaconvert.errors import OptionError
from adaconvert.io.names import escape
from adaconvert.layerwise.names import block_of
from adaconvert.modeling.adaptive_linear import AdaptiveLinear
from adaconvert.train.adapt_config import Adapting
from adaconvert.train.parts import is_adapter, part_of, plain_name, sites_of

ADAPTER = "default"
_ATTENTION = re.compile(r"(?:self_)?att(?:entio)?n(?:ention)?|self_attention")


def candidates(model: Any) -> dict[str, str]:
    """Return name -> part of every weight inside the blocks that can be adapted; part is
    "attention", "experts" or "rest"."""
    sites = sites_of(model)
    found = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}"
            if name.startswith("exits.") or block_of(name) is None:
                continue
            if not _is_adaptable(module, own, parameter):
                continue
            part = part_of(name, sites)
            if part in {"experts", "rest"}:
                is_attention = any(_ATTENTION.fullmatch(c) for c in path.split("."))
                found[name] = "attention" if is_attention and part == "rest" else part
    return found


def _is_adaptable(module: nn.Module, own: str, parameter: nn.Parameter) -> bool:
    from transformers.pytorch_utils import Conv1D

    if parameter.dim() == 3:
        return parameter.is_floating_point()
    return own == "weight" and isinstance(module, nn.Linear | Conv1D)


def targets_of(model: Any, wanted: Sequence[str]) -> dict[str, int]:
    """Return name -> number of dimensions of the weights that get adapters; nothing is packed yet.

    Raises:
        OptionError: a target matches nothing that can be adapted.
    """
    known = candidates(model)
    found: set[str] = set()
    for item in wanted:
        own = {name for name, part in known.items() if _fits(item, name, part)}
        if not own:
            raise _unmatched(item, known, (name for name, _ in model.named_parameters()))
        found |= own
    _check_unrouted(model, found)
    dims = {name: parameter.dim() for name, parameter in model.named_parameters()}
    return {name: dims[name] for name in sorted(found)}


def _check_unrouted(model: Any, names: Iterable[str]) -> None:
    """Return only when no weight is of a linear that has routed adapters already."""
    for name in sorted(names):
        path, _, own = name.rpartition(".")
        if own == "weight" and isinstance(model.get_submodule(path), AdaptiveLinear):
            raise OptionError(
                f"matches '{name}', which has routed adapters",
                where="--lora-targets",
                hint="Train those: --train adapters --train router; or name other matrices.",
            )


def _fits(item: str, name: str, part: str) -> bool:
    if item in {"experts", "attention"}:
        return part == item
    return item == "all" or re.search(item, name) is not None


def _unmatched(item: str, known: Mapping[str, str], names: Iterable[str]) -> OptionError:
    other = None
    if item not in {"experts", "attention", "all"}:
        other = next((name for name in names if re.search(item, name)), None)
    parts = sorted(set(known.values()) - {"rest"})
    return OptionError(
        "matches no matrix that can be adapted"
        if other is None
        else f"matches '{other}', which is no matrix of a block or belongs to a router",
        where=f"--lora-targets {escape(item)}",
        expected=", ".join([*parts, "all or a regular expression"]),
        hint=f"A matrix is called '{next(iter(known), 'none')}', for example.",
    )


def attach(model: Any, targets: Mapping[str, int], options: Adapting, *, seed: int) -> Any:
    """Return PEFT's tuner after `model` got adapters, which alone ask for gradients then.

    Args:
        model: changed in place.
        targets: as `targets_of` returns them.
        options: rank above 0.
        seed: of the random factor; the other one is zero, so the model computes what it did.

    Raises:
        OptionError: a target cannot be adapted.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    def held(dims: int) -> list[str]:
        return [f"{_Holder.NAME}.{name}" for name, found in targets.items() if found == dims]

    config = LoraConfig(
        r=options.rank,
        # PEFT says int and computes alpha / rank
        lora_alpha=options.scaled_by,  # type: ignore[arg-type]
        target_modules=[name.removesuffix(".weight") for name in held(2)],
        target_parameters=held(3) or None,
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # it notes that Conv1D keeps its matrix the other way round
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        torch.manual_seed(seed)
        tuner = LoraModel(_Holder(model), {ADAPTER: config}, ADAPTER)
    _check_attached(model, targets)
    for name, parameter in model.named_parameters():
        if is_adapter(name) and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
    model._hf_peft_config_loaded = True
    return tuner


class _Holder(nn.Module):
    """A model without its config: by `model_type` PEFT would take the names of some dense matrices
    for those experts had before transformers stacked them."""

    NAME = "held"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.held = model


def _check_attached(model: Any, names: Iterable[str]) -> None:
    adapted = {plain_name(path) for path, _ in _adapted(model)}
    missing = [name for name in names if name not in adapted]
    if missing:
        raise OptionError(
            f"the installed PEFT ({metadata.version('peft')}) cannot adapt it",
            where=f"--lora-targets: '{missing[0]}'",
        )


def _adapted(model: Any) -> list[tuple[str, Any]]:
    """Return (name of the weight, layer that wraps it) for every adapter."""
    from peft.tuners.lora.layer import LoraLayer

    found = []
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            own = getattr(module, "parameter_name", "weight")
            found.append((f"{path}.{own}", module))
    return found


def adapter_names(model: Any) -> dict[str, str]:
    """Return the name of each factor -> its name by the weight it belongs to.

    PEFT puts adapters of several parameters of one module inside each other, in an order that is
    not always the same, and names them by depth.
    """
    found = {}
    wrapped = {id(layer): name for name, layer in _adapted(model)} if is_adapted(model) else {}
    for path, module in model.named_modules():
        if id(module) in wrapped:
            for factor in ("lora_A", "lora_B"):
                plain = f"{plain_name(wrapped[id(module)])}.{factor}"
                found[f"{path}.{factor}.{ADAPTER}.weight"] = plain
    return found


def is_adapted(model: Any) -> bool:
    """Return whether a model has adapters put on for training."""
    return any(is_adapter(name) for name, _ in model.named_parameters())


def without_stacked(model: Any) -> list[tuple[str, int]]:
    """Return (name, values) of stacked experts with adapters, which do nothing from now on.

    The experts ask for gradients instead. PEFT adds the adapters to such a weight before it is
    used, so the sum, as large as the weight, is what the forward pass keeps of it.
    """
    found = []
    for name, layer in _adapted(model):
        if hasattr(layer, "parameter_name"):
            weight = getattr(layer.get_base_layer(), layer.parameter_name)
            weight.requires_grad_()
            layer._disable_adapters = True
            found.append((plain_name(name), weight.numel()))
    return found


@torch.no_grad()
def merge(model: Any, tuner: Any, *, keep_wide: bool = False) -> None:
    """Add every adapter to its weight and take the adapters off.

    Args:
        model: changed in place.
        tuner: as `attach` returned it.
        keep_wide: leave the sums in float32 (float64 for such weights), in which they are formed,
            instead of rounding them to the weight's dtype once.
    """
    for _, layer in _adapted(model):
        base = layer.get_base_layer()
        weight = getattr(base, getattr(layer, "parameter_name", "weight"))
        stored = weight.dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        # PEFT rounds what is added to the dtype of the weight
        weight.data = weight.data.to(wide)
        total = weight.data + layer.get_delta_weight(ADAPTER).to(wide)
        weight.data = total if keep_wide else total.to(stored)
    tuner.unload()
    model._hf_peft_config_loaded = False
