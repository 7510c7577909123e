"""What can be refused before text is read or a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from typing import Any

from adaconvert.arch.recursion import recursion_of
from adaconvert.errors import OptionError, ResourceError, SourceError
from adaconvert.methods.sources import Described
from adaconvert.train import adapter_folder
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_checks import check_depth
from adaconvert.train.exit_checks import check_exits
from adaconvert.train.exit_classifier_checks import (
    check_classifier,
    check_language_model,
    is_exit_classifier,
)
from adaconvert.train.goals import goals_of
from adaconvert.train.routing_config import RAMP

#: stored dtypes of 16 bits.
_HALVES = ("BF16", "F16")
#: package -> (oldest version that works, as in pyproject.toml; what it is needed for).
_NEEDED = {
    "accelerate": ("1.10", "training needs it"),
    "peft": ("0.19", "--lora needs it"),
    "bitsandbytes": ("0.49", "--load-in-4bit needs it"),
}


def require(package: str) -> None:
    """Return only when a package is installed and new enough.

    Raises:
        ResourceError: it is not.
    """
    floor, why = _NEEDED[package]
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        found = "none"
    if found == "none" or _numbers(found) < _numbers(floor):
        raise ResourceError(
            why,
            where=f"package {package}",
            expected=f">= {floor}",
            found=found,
            hint=f"Run: pip install '{package}>={floor}'",
        )


def is_usable(package: str) -> bool:
    """Return whether `require` would find a package."""
    try:
        require(package)
    except ResourceError:
        return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def settled(config: FinetuneConfig, item: Described) -> FinetuneConfig:
    """Return the config with its precision decided.

    "auto" becomes bf16 where weights stored in 16 bits stay frozen, which float32 would double,
    and fp32 elsewhere.
    """
    config = adapter_folder.settled(config, item)
    if config.routing.ramp is None and goals_of(item.spec.adaptive, config):
        config = replace(config, routing=replace(config.routing, ramp=RAMP))
    if config.precision != "auto":
        return config
    everything = "all" in config.train and not config.adapting.rank
    halves = any(ref.dtype in _HALVES for ref in item.source.tensors.values())
    return replace(config, precision="bf16" if halves and not everything else "fp32")


def check_source(item: Described, config: FinetuneConfig) -> None:
    """Return only when a checkpoint can be fine-tuned in this way.

    Raises:
        SourceError: it is neither a causal language model nor a classifier with exits.
        OptionError: an option does not fit it.
    """
    if is_exit_classifier(item):
        check_classifier(item, config)
        return
    where = f"{item.source.label}/config.json"
    endings = ("ForCausalLM", "LMHeadModel")
    if item.spec.kind != "decoder" or not item.spec.architecture.endswith(endings):
        raise SourceError(
            f"a {item.spec.architecture} is no causal language model",
            where=where,
            hint="Classifiers can be trained here once `adaconvert early-exit` has given them "
            "exits; fine-tune other models with transformers directly.",
        )
    if item.spec.num_experts and config.sparsity.watches:
        raise OptionError(
            f"{item.spec.model_type} is a mixture of experts already",
            where="--sparsity",
            hint="Stage 1 works on dense feed-forward networks and their adaptive form.",
        )
    if item.spec.adaptive is None and (config.select is not None or config.compute is not None):
        flag = "--select" if config.select is not None else "--compute"
        raise OptionError(f"{item.source.label} is not adaptive", where=flag)
    check_language_model(config)
    _check_shared(item, config)
    adapter_folder.check_options(item, config)
    check_exits(item, config)
    check_depth(item, config)
    goals_of(item.spec.adaptive, config)


def _check_shared(item: Described, config: FinetuneConfig) -> None:
    """Refuse what needs matrices of its own for every block of a recursive checkpoint."""
    if recursion_of(item.spec.adaptive) is None:
        return
    asked = {"--lora": bool(config.adapting.rank), "--sparsity": config.sparsity.watches}
    flag = next((flag for flag, given in asked.items() if given), None)
    if flag is not None:
        raise OptionError(
            f"{item.source.label} has matrices that several blocks share",
            where=flag,
            hint="Train it whole, or its residuals and shared matrices by --train with a regular "
            "expression.",
        )


def check_layout(item: Described, config: FinetuneConfig) -> None:
    """Return only when adapters and layout fit each other and the kind of model.

    Raises:
        OptionError: they do not.
    """
    adapting, machine = config.adapting, config.machine
    if machine.sharded or machine.experts_over > 1:
        _check_split(item, config)
    if adapting.four_bit and not adapting.rank:
        _check_packed(item, config)
    if adapting.four_bit and machine.compiled:
        raise OptionError("cannot be combined with --load-in-4bit", where="--compile")
    if adapting.four_bit and config.precision == "fp64":
        raise OptionError("cannot be combined with --load-in-4bit", where="--precision fp64")


def _check_packed(item: Described, config: FinetuneConfig) -> None:
    """Return only when adapters that the checkpoint has are trained on frozen matrices."""
    adaptive: Mapping[str, Any] = item.spec.adaptive or {"sites": {}}
    sites = adaptive["sites"].values()
    has_adapters = any("adapters" in slots.get("linear", {}) for slots in sites)
    if "all" in config.train or not has_adapters:
        more = (
            " Or train the routed adapters: --train adapters --train router."
            if has_adapters
            else ""
        )
        raise OptionError(
            "matrices in 4 bits cannot be trained themselves",
            where="--load-in-4bit",
            hint=f"Give --lora R too: adapters of rank R are trained then.{more}",
        )


def can_split() -> bool:
    """Return whether the installed transformers splits models over processes as it loads them, and
    its Trainer leaves such models alone."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    # came in the same release
    return "ep_size" in DistributedConfig.__dataclass_fields__


def _check_split(item: Described, config: FinetuneConfig) -> None:
    where = "--fsdp" if config.machine.sharded else "--expert-parallel"
    if not can_split():
        raise OptionError(
            "is not offered by this version of transformers",
            where=where,
            expected="transformers >= 5.23",
            found=metadata.version("transformers"),
        )
    if config.routing.null_rate and goals_of(item.spec.adaptive, config):
        raise OptionError(
            f"cannot be combined with {where}, which splits the null biases",
            where=config.routing.budgets or "the budget in config.json",
            hint="Give --null-rate 0: the losses train them instead.",
        )
    if config.adapting.rank:
        raise OptionError(
            "cannot be combined with --lora",
            where=where,
            hint="Leave it out: every process holds the frozen model, small with --load-in-4bit.",
        )
    if config.machine.sharded:
        return
    if not item.spec.num_experts or item.spec.adaptive is not None:
        raise OptionError(
            "shares the experts of stock mixtures only",
            where=where,
            hint="Give --fsdp: it splits every other model over the processes.",
        )
    if config.precision == "fp64":
        raise OptionError("cannot be combined with --precision fp64", where=where)


def check_device(device: str) -> None:
    """Return only when a device is there.

    Raises:
        OptionError: it is not; names those that are.
    """
    import torch

    if device in {"auto", "cpu"}:
        return
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != device:
        kinds = "auto or cpu" if found is None else f"auto, cpu or {found.type}"
        raise OptionError("is not here", where="--device", expected=kinds, found=device)
