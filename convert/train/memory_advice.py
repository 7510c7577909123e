"""Whether a fine-tune fits the memory there is, and which settings do where it does not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from adaconvert.dtypes import BY_NAME
from adaconvert.errors import AdaconvertError, ResourceError
from adaconvert.io.available import available_memory
from adaconvert.io.writer import parse_size
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.train.adapt_config import Adapting
from adaconvert.train.checks import is_usable
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.memory import Need, need_of
from adaconvert.train.prepare import set_selection
from adaconvert.units import human_bytes

#: rank of the adapters that are proposed.
_RANK = 8
_SPREAD = "Several devices share the need with torchrun and --fsdp."


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Memory a process may take, in bytes.

    Attributes:
        device: where it trains.
        free: there.
        host: in the machine's own memory, where the model is loaded and written from.
    """

    device: str
    free: int
    host: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a fine-tune needs, and what there is.

    Attributes:
        need: per process.
        room: per process.
    """

    need: Need
    room: Room

    def lines(self) -> list[str]:
        """Return the table, and what there is."""
        free = f"{'free':<11}  {human_bytes(self.room.free)} on {self.room.device}"
        return [*self.need.lines(), free]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON data."""
        return {**self.need.to_json(), "device": self.room.device, "free": self.room.free}


def room_of(device: str, *, memory: str | int | None, on_machine: int = 1) -> Room:
    """Return the memory one process may take.

    Args:
        device: "auto", "cpu" or an accelerator's name.
        memory: bytes or text with a unit that stands for what is free where it trains; None
            measures.
        on_machine: processes that share the machine.

    Raises:
        OptionError: `memory` is no size.
    """
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = device == "cpu" or found is None
    host = available_memory() // on_machine
    if memory is not None:
        free = parse_size(memory, "--memory") or host
        return Room(device="cpu" if on_cpu else str(found), free=free, host=host)
    if on_cpu:
        return Room(device="cpu", free=host, host=host)
    return Room(device=str(found), free=_free_on(found), host=host)


def _free_on(device: Any) -> int:
    """Return the free bytes of this process's accelerator."""
    import torch

    module: Any = getattr(torch, device.type)
    free: int = module.mem_get_info()[0]
    return free


def need_for(item: Described, config: FinetuneConfig, *, changed: Mapping[str, Any]) -> Need:
    """Return what the fine-tune needs in each process; no weight is read.

    Args:
        item: the checkpoint.
        config: the fine-tune.
        changed: config keys that differ from the checkpoint's.

    Raises:
        OptionError: an option does not fit the model.
    """
    with quiet():
        model = load_model(item.source.root, device_map="meta", **changed)
        with set_selection(model, config):
            # what cannot run is found before any text is read; which experts do changes no need
            pass
        return need_of(model, config, teacher=_teacher_bytes(item, config))


def budget_of(
    item: Described, config: FinetuneConfig, room: Room, *, changed: dict[str, Any]
) -> Budget:
    """Return what the fine-tune needs, which fits.

    Args:
        item: the checkpoint.
        config: the fine-tune.
        room: what there is.
        changed: config keys that differ from the checkpoint's.

    Raises:
        ResourceError: it does not fit; names settings that do.
        OptionError: an option does not fit the model.
    """
    need = need_for(item, config, changed=changed)
    if need.total > room.free:
        raise _refusal(item, config, need, room, changed)
    if not passes_through(item, room):
        raise ResourceError(
            "the model does not fit this machine's memory, through which it is loaded",
            where=item.source.label,
            expected=human_bytes(stored_bytes(item)),
            found=f"{human_bytes(room.host)} free",
            hint="Start fewer processes on it, or free some memory.",
        )
    return Budget(need=need, room=room)


def stored_bytes(item: Described) -> int:
    """Return the bytes of a checkpoint's weights."""
    return sum(ref.nbytes for ref in item.source.tensors.values())


def passes_through(item: Described, room: Room) -> bool:
    """Return whether this machine's memory holds the whole model, which is loaded there before it
    goes to a device, and gathered there to be written."""
    return room.device == "cpu" or stored_bytes(item) <= room.host


def _teacher_bytes(item: Described, config: FinetuneConfig) -> int:
    if not config.distill and not config.distill_hidden:
        return 0
    teacher = item if config.teacher is None else open_source(config.teacher)
    width = {"bf16": 0, "fp64": 8}.get(config.precision, 4)
    kinds = [(ref, BY_NAME[ref.dtype]) for ref in teacher.source.tensors.values()]
    return sum(
        max(ref.nbytes, math.prod(ref.shape) * width) if kind.is_float else ref.nbytes
        for ref, kind in kinds
    )


def alternatives(
    item: Described, config: FinetuneConfig, *, changed: Mapping[str, Any]
) -> Iterator[tuple[str, int]]:
    """Yield settings that need less, as the command line says them, and the bytes they need; the
    nearest to what was asked for first.

    Args:
        item: the checkpoint.
        config: the fine-tune.
        changed: config keys that differ from the checkpoint's.
    """
    for words, options in _others(item, config):
        try:
            total = need_for(item, options, changed=changed).total
        except AdaconvertError:
            # not for this model
            continue
        yield words, total


def _refusal(
    item: Described,
    config: FinetuneConfig,
    need: Need,
    room: Room,
    changed: Mapping[str, Any],
) -> ResourceError:
    others = list(alternatives(item, config, changed=changed))
    fitting = [f"{words} ({human_bytes(total)})" for words, total in others if total <= room.free]
    if fitting:
        hint = f"What fits: {'; '.join(fitting)}."
    elif others:
        words, total = min(others, key=lambda other: other[1])
        hint = f"Nothing fits; the least is {words} with {human_bytes(total)}. {_SPREAD}"
    else:
        hint = _SPREAD
    return ResourceError(
        f"training {item.source.label} this way does not fit",
        where=f"memory of {room.device}",
        expected=f"{human_bytes(need.total)} ({_largest(need)})",
        found=f"{human_bytes(room.free)} free (--memory says otherwise)",
        hint=hint,
    )


def _largest(need: Need) -> str:
    sizes = {
        "weights": sum(need.weights.values()),
        "gradients": sum(need.gradients.values()),
        "optimizer": sum(need.optimizer.values()),
        "activations": need.activations,
    }
    return ", ".join(f"{name} {human_bytes(size)}" for name, size in sizes.items() if size)


def _others(item: Described, config: FinetuneConfig) -> Iterator[tuple[str, FinetuneConfig]]:
    """Yield settings that need less, the nearest to what was asked for first."""
    saving = replace(config, checkpointing=True)
    yield "--checkpointing", saving
    if config.batch_size > 1:
        small = replace(saving, batch_size=1, accumulate=config.accumulate * config.batch_size)
        yield f"--checkpointing --batch-size 1 --accumulate {small.accumulate}", small
        saving = small
    more = "" if config.batch_size == 1 else f" --batch-size 1 --accumulate {saving.accumulate}"
    more += " --checkpointing"
    if item.spec.num_experts:
        routers = replace(saving, train=("router",), adapting=Adapting())
        yield f"--train router{more}", routers
        yield f"--train router --precision bf16{more}", replace(routers, precision="bf16")
    is_split = item.spec.num_experts or item.spec.adaptive is not None
    target = "experts" if is_split else "all"
    lora = f"--lora {_RANK} --lora-targets {target}"
    adapted = Adapting(rank=_RANK, targets=(target,))
    yield f"{lora}{more}", replace(saving, train=("all",), adapting=adapted)
    halved = replace(saving, train=("all",), adapting=adapted, precision="bf16")
    yield f"{lora} --precision bf16{more}", halved
    if is_usable("bitsandbytes"):
        packed = replace(halved, adapting=replace(adapted, four_bit=True))
        yield f"{lora} --load-in-4bit --precision bf16{more}", packed
