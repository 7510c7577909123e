"""How much of what the device can do goes into the model: model FLOPs utilisation.

FLOPs a second that the model itself takes, by the account of `planning.estimate`, over the dense
peak of the devices: going forward and back through the parameters a token passes, experts that do
not run left out. What is computed again (checkpointing), a teacher and the optimiser are not
counted, so they show as a lower utilisation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adaconvert.arch.base import ModelSpec
from adaconvert.methods.sources import Described
from adaconvert.modeling.adaptive_knobs import knobs_for
from adaconvert.modeling.adaptive_schema import routed_specs
from adaconvert.planning.estimate import costs
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.device_peaks import peak


def flops_per_token(item: Described, config: FinetuneConfig, trained: float) -> float | None:
    """Return the FLOPs of training on one token, None where they depend on the token.

    Forward, the gradients of activations (as much again), and those of the trained part of the
    weights. Attention is counted at the mean length a token of a sequence sees.

    Args:
        item: the checkpoint.
        config: the fine-tune.
        trained: share of the parameters that is trained.
    """
    spec = _as_trained(item.spec, config)
    if spec is None:
        return None
    dtypes = {name: ref.dtype for name, ref in item.source.tensors.items()}
    forward = costs(spec, dtypes, max(config.seq_len // 2, 1)).flops
    attention = forward - costs(spec, dtypes, 0).flops
    return 2.0 * forward + attention + (forward - attention) * trained


def _as_trained(spec: ModelSpec, config: FinetuneConfig) -> ModelSpec | None:
    """Return the model with the experts that run while it is trained; None where the number of
    these depends on the token."""
    if spec.adaptive is None:
        return spec
    adaptive = _with_selection(spec.adaptive, config)
    for site in routed_specs(adaptive).values():
        if not _is_counted(site["select"], int(site["experts"]["count"])):
            return None
    return replace(spec, adaptive=adaptive)


def _with_selection(adaptive: Mapping[str, Any], config: FinetuneConfig) -> dict[str, Any]:
    """Return `config.adaptive` with what `--select` or `--compute` sets."""
    found = copy.deepcopy(dict(adaptive))
    knobs: Mapping[str, Any] = {}
    if config.select is not None:
        knobs = {"*": config.select}
    elif config.compute is not None:
        knobs = knobs_for(found, config.compute)
    for path, site in routed_specs(found).items():
        site["select"] = dict(knobs.get(path) or knobs.get("*") or site["select"])
    return found


def _is_counted(select: Mapping[str, Any], experts: int) -> bool:
    """Return whether a rule runs the same number of experts for every token."""
    from adaconvert.modeling.adaptive_select import runs_all

    return select["rule"] == "top-k" or runs_all(select, experts)


def utilisation(
    item: Described, config: FinetuneConfig, trained: float
) -> tuple[float, float] | None:
    """Return FLOPs per trained token and per second of the present accelerator.

    None where there is no accelerator, its peak is not known, or the FLOPs depend on the token.

    Args:
        item: the checkpoint.
        config: the fine-tune.
        trained: share of the parameters that is trained.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    able = peak(torch.cuda.get_device_name(), config.precision, tf32=tf32)
    needed = flops_per_token(item, config, trained)
    return None if able is None or needed is None else (needed, able)
