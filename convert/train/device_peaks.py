"""What accelerators can do at most, by the name their driver gives: dense FLOP/s, without sparsity.

Figures are those of the maker's document named beside them; where it prints the rate of sparse
matrices alone, half of it stands here. A device that is not listed, a part of one (MIG) and the
CPU have none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """One device.

    Attributes:
        name: regular expression for the whole name as torch has it, without the maker.
        bf16: FLOP/s of matrix units in bfloat16, summed in float32.
        tf32: the same for float32 that is rounded to TF32, None where there is none.
        fp32: FLOP/s in float32 without matrix units.
    """

    name: str
    bf16: float
    tf32: float | None
    fp32: float


_T: Final = 1e12
PEAKS: Final = (
    # NVIDIA HGX B200, summary of the product carbon footprint: 8 of them, sparse matrix units
    Peak(name="B200", bf16=36000 / 8 / 2 * _T, tf32=18000 / 8 / 2 * _T, fp32=600 / 8 * _T),
    # NVIDIA H200 Tensor Core GPU data sheet (3367400, 2024), column SXM, sparse matrix units
    Peak(name="H200", bf16=1979 / 2 * _T, tf32=989 / 2 * _T, fp32=67 * _T),
    # NVIDIA H100 Tensor Core GPU, nvidia.com/en-us/data-center/h100, sparse matrix units
    Peak(name="H100 80GB HBM3", bf16=1979 / 2 * _T, tf32=989 / 2 * _T, fp32=67 * _T),
    Peak(name="H100 NVL", bf16=1671 / 2 * _T, tf32=835 / 2 * _T, fp32=60 * _T),
    # NVIDIA H100 Tensor Core GPU data sheet (2022), column PCIe, sparse matrix units
    Peak(name="H100 PCIe", bf16=1513 / 2 * _T, tf32=756 / 2 * _T, fp32=51 * _T),
    # NVIDIA A100 Tensor Core GPU data sheet (2188504, 2022), both columns
    Peak(
        name="A100[- ](SXM4-[48]0GB|PCIE-[48]0GB|80GB PCIe)",
        bf16=312 * _T,
        tf32=156 * _T,
        fp32=19.5 * _T,
    ),
    # NVIDIA L40S data sheet (2841316, 2023)
    Peak(name="L40S", bf16=362.05 * _T, tf32=183 * _T, fp32=91.6 * _T),
    # NVIDIA L40 data sheet (2436245, 2022)
    Peak(name="L40", bf16=181.05 * _T, tf32=90.5 * _T, fp32=90.5 * _T),
    # NVIDIA L4 Tensor Core GPU, nvidia.com/en-us/data-center/l4, sparse matrix units
    Peak(name="L4", bf16=242 / 2 * _T, tf32=120 / 2 * _T, fp32=30.3 * _T),
    # NVIDIA A10 data sheet (2021)
    Peak(name="A10", bf16=125 * _T, tf32=62.5 * _T, fp32=31.2 * _T),
    # NVIDIA A10G for AWS, data sheet of 2022-02-17: another chip than the A10
    Peak(name="A10G", bf16=70 * _T, tf32=35 * _T, fp32=35 * _T),
    # NVIDIA A40 data sheet (2021)
    Peak(name="A40", bf16=149.7 * _T, tf32=74.8 * _T, fp32=37.4 * _T),
    # NVIDIA Ampere GA102 GPU architecture whitepaper v2, table 3
    Peak(name="RTX A6000", bf16=154.8 * _T, tf32=77.4 * _T, fp32=38.7 * _T),
    # NVIDIA Ada GPU architecture whitepaper v2.1, appendix A
    Peak(name="GeForce RTX 4090", bf16=165.2 * _T, tf32=82.6 * _T, fp32=82.6 * _T),
    # AMD Instinct MI300 series microarchitecture, rocm.docs.amd.com
    Peak(name="Instinct MI300X", bf16=1307.4 * _T, tf32=None, fp32=163.4 * _T),
)
_MAKER: Final = re.compile(r"(NVIDIA|AMD) ")


def peak(name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Return the FLOP/s of one device, None where it is not known.

    Args:
        name: as torch has it.
        precision: "bf16" or "fp32", as `FinetuneConfig.precision`; nothing is known of others.
        tf32: float32 matrices are multiplied in TF32.
    """
    plain = _MAKER.sub("", name, count=1)
    found = next((entry for entry in PEAKS if re.fullmatch(entry.name, plain)), None)
    if found is None:
        return None
    if precision == "fp32":
        return found.tf32 if tf32 else found.fp32
    return found.bf16 if precision == "bf16" else None
