"""A loaded model made ready for training: packed, adapted, parts chosen, dtypes set."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from adaconvert.errors import OptionError
from adaconvert.modeling import stock_experts
from adaconvert.train.adapt import attach, targets_of
from adaconvert.train.adapt_quantised import pack, packable
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.parts import Chosen, choose, is_adapter, matching, sites_of
from adaconvert.train.rates import Rate, Rates
from adaconvert.train.shards import is_sharded

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What became of a model.

    Attributes:
        chosen: what is trained.
        tuner: PEFT's hold on the adapters, None without.
        packed: names of the weights in 4 bits, by the names they had before.
    """

    chosen: Chosen
    tuner: Any
    packed: tuple[str, ...]


def prepare(model: Any, config: FinetuneConfig, *, device: Any = "cpu") -> Prepared:
    """Return what became of `model`, which is ready for training afterwards.

    Args:
        model: as loaded, changed in place; one without numbers (on the meta device) is not packed.
        config: the fine-tune.
        device: where packed weights go.

    Raises:
        OptionError: an option does not fit the model.
    """
    adapting = config.adapting
    counted = sum(parameter.numel() for parameter in model.parameters())
    targets = targets_of(model, adapting.targets) if adapting.rank else {}
    packed = packable(model, matching(model, config.train)) if adapting.four_bit else []
    tuner = attach(model, targets, adapting, seed=config.seed) if adapting.rank else None
    if packed and model.device.type != "meta":
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        pack(model, packed, device=device, dtype=dtype)
    chosen = choose(model, config.train)
    _check_rates(model, config)
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    set_precision(model, config.precision)
    stock_experts.use(model)
    return Prepared(
        chosen=replace(chosen, frozen=counted - chosen.trained + adapters),
        tuner=tuner,
        packed=tuple(packed),
    )


def _check_rates(model: Any, config: FinetuneConfig) -> None:
    """Return only when every rate of `--lr-of` is that of something that is trained."""
    parts = tuple(Rate.parse(text) for text in config.lr_of)
    rates = Rates(
        usual=config.lr,
        router=config.router_lr,
        parts=parts,
        routers=frozenset(),
        sites=sites_of(model),
    )
    rates.check([name for name, p in model.named_parameters() if p.requires_grad])


def set_selection(model: Any, config: FinetuneConfig) -> AbstractContextManager[Any]:
    """The experts run that `--select` or `--compute` asks for; as a context manager, for its body.

    Args:
        model: an adaptive one where either is given.
        config: the fine-tune.

    Raises:
        OptionError: the model cannot run them.
    """
    try:
        if config.select is not None:
            found: AbstractContextManager[Any] = model.set_select(**config.select)
            return found
        if config.compute is not None:
            found = model.set_compute(config.compute)
            return found
    except ValueError as error:
        raise OptionError(str(error), where="--select or --compute") from error
    return nullcontext()


def set_precision(model: Any, precision: str) -> None:
    """Make float32 what is trained, and with "fp32" everything; with "fp64" everything is float64.

    Nothing is rounded.
    """
    for parameter in list(model.parameters()):
        if precision == "fp64" and parameter.is_floating_point():
            _widen(parameter, torch.float64)
        elif parameter.dtype in _HALVES and (parameter.requires_grad or precision != "bf16"):
            _widen(parameter, torch.float32)


def _widen(parameter: nn.Parameter, dtype: torch.dtype) -> None:
    if is_sharded(parameter):
        # the only way parameters in parts can change their dtype
        wide = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
        swap: Any = torch.utils.swap_tensors
        swap(parameter, wide)
    else:
        parameter.data = parameter.data.to(dtype)
