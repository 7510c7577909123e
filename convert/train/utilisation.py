"""What a trained token costs, and what the device could do: model FLOPs utilisation.

A table of published dense peaks, without sparsity; a device that is not in it has none, nor has
the CPU.
"""

from __future__ import annotations

from typing import Final

from adaconvert.methods.sources import Described
from adaconvert.planning.estimate import costs

#: part of a device's name -> FLOP/s in bfloat16 and in float32 without tensor cores, from data
#: sheets; longer names first where one is part of another.
PEAKS: Final[tuple[tuple[str, float, float], ...]] = (
    ("B200", 2250e12, 75e12),
    ("H200", 989e12, 67e12),
    ("H100 PCIe", 756e12, 51e12),
    ("H100", 989e12, 67e12),
    ("A100", 312e12, 19.5e12),
    ("L40S", 362e12, 91.6e12),
    ("A10G", 70e12, 35e12),
    ("L4", 121e12, 30.3e12),
    ("RTX 4090", 165.2e12, 82.6e12),
    ("RTX 3090", 71e12, 35.6e12),
    ("MI300X", 1307e12, 163.4e12),
)


def peak(name: str, precision: str) -> float | None:
    """Return the FLOP/s of one device, None where it is not known.

    Args:
        name: as the driver gives it.
        precision: "bf16" or "fp32".
    """
    for part, bf16, fp32 in PEAKS:
        if part in name:
            return bf16 if precision == "bf16" else fp32
    return None


def flops_per_token(item: Described, length: int, trained: float) -> float:
    """Return the FLOPs of training on one token, recomputation not counted.

    Forward, the gradients of activations (as much again), and those of the trained part of the
    weights. Attention is counted at the mean length a token of a text of `length` tokens sees.

    Args:
        item: the checkpoint.
        length: tokens of a sequence.
        trained: share of the parameters that is trained.
    """
    dtypes = {name: ref.dtype for name, ref in item.source.tensors.items()}
    forward = costs(item.spec, dtypes, max(length // 2, 1)).flops
    attention = forward - costs(item.spec, dtypes, 0).flops
    return 2.0 * forward + attention + (forward - attention) * trained


def utilisation(
    item: Described, length: int, trained: float, precision: str
) -> tuple[float, float] | None:
    """Return FLOPs per trained token and per second of the present accelerator.

    None where there is no accelerator or its peak is not known.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    found = peak(torch.cuda.get_device_name(), precision)
    return None if found is None else (flops_per_token(item, length, trained), found)
