"""What training changes of a model, whole or sharded over processes, by names of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adaconvert.train.adapt import adapter_names
from adaconvert.train.rates import bare_name
from adaconvert.train.routing_config import CORRECTION, NULL_BIAS


def changing(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained parameters and what moves by itself, by name: biases that balance
    experts or hold a budget, and the buffers a checkpoint stores."""
    for name, place in _places(model):
        moves = name.endswith((CORRECTION, NULL_BIAS)) or not isinstance(place, nn.Parameter)
        if place.requires_grad or moves:
            yield name, place


def _places(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    adapters = adapter_names(model)
    for name, parameter in model.named_parameters():
        bare = bare_name(name)
        yield adapters.get(bare, bare), parameter
    yield from _buffers(model)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield bare_name(f"{path}.{name}".removeprefix(".")), buffer


def is_sharded(value: Any) -> bool:
    """Return whether a tensor lies in parts on several processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def gathered(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return everything `changing` on the CPU; every process of a sharded model must call.

    Args:
        model: whole or sharded.
        keep: whether this process wants the values; others get an empty mapping.
    """
    found = {}
    for name, value in changing(model):
        whole: Any = value.detach()
        if is_sharded(whole):
            whole = whole.full_tensor()
        if keep:
            found[name] = whole.cpu().contiguous()
    return found


@torch.no_grad()
def restore(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put `values` into the parameters and buffers of `model` that have these names."""
    places = dict(_places(model))
    for name, value in values.items():
        place = places[name]
        if is_sharded(place):
            _copy_part(place, value)
        else:
            place.copy_(value)


def _copy_part(place: Any, value: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    local = value.to(place.device_mesh.device_type, place.dtype)
    # every process has read the same file, so nobody need send its copy
    part = distribute_tensor(local, place.device_mesh, place.placements, src_data_rank=None)
    place.copy_(part)


def local_state(optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state with the part of every tensor that lies here."""
    state = optimizer.state_dict()
    kept = {
        key: {name: v.to_local() if is_sharded(v) else v for name, v in entry.items()}
        for key, entry in state["state"].items()
    }
    return {**state, "state": kept}


def load_local_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Put what `local_state` returned in this process back."""
    from torch.distributed.tensor import DTensor

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    whole = {}
    for key, entry in state["state"].items():
        place = parameters[key]
        whole[key] = {
            name: DTensor.from_local(
                value.to(place.to_local().device),
                place.device_mesh,
                place.placements,
                shape=place.shape,
                stride=place.stride(),
            )
            if is_sharded(place) and isinstance(value, Tensor) and value.dim()
            else value
            for name, value in entry.items()
        }
    optimizer.load_state_dict({**state, "state": whole})
