"""The kernels of `dynk_decode`, at sizes of Llama-3.2-1B and of small experts."""

from __future__ import annotations

from dataclasses import replace

import torch
from case import Case
from launches import cases
from torch.nn import functional

from adaconvert.kernels import decode, triton_decode
from adaconvert.kernels.decode_steps import Call

#: weights are read in pieces of 16 bytes.
_WANTS = {"hidden": ("LDG.E.128",), "output": ("LDG.E.128",)}
#: what an index is multiplied by to find a weight, apart from what is 1 here.
_WIDE = {
    "hidden": ("gate_expert", "gate_row", "up_expert", "up_row"),
    "output": ("down_expert", "down_row"),
    "compact": ("mask_token",),
}


def _checked(found: list[Case]) -> list[Case]:
    def part(case: Case) -> str:
        return case.name.rsplit("-", 1)[1].removesuffix("_kernel")

    return [
        replace(
            case,
            wants={gpu: _WANTS.get(part(case), ()) for gpu in (80, 90)},
            wide=_WIDE.get(part(case), ()),
        )
        for case in found
    ]


def _runtime(
    name: str, hidden: int, neurons: int, *, dtype: torch.dtype, tokens: int = 1, width: int = 32
) -> list[Case]:
    """What the adaptive runtime launches for a network without biases."""
    gate, up = (torch.empty(neurons, hidden, dtype=dtype) for _ in "gu")
    down = torch.empty(neurons, hidden, dtype=dtype).t()
    mask = torch.zeros(tokens, neurons // width, dtype=torch.bool)
    x = torch.empty(tokens, hidden, dtype=dtype)
    options = {"gate": gate, "up": up, "down": down, "width": width, "activation": functional.silu}
    return _checked(
        cases(name, triton_decode, lambda: decode.expert_ffn(x, mask, **options))  # type: ignore[arg-type]
    )


def _experts(name: str, activation: str, *, glu: bool) -> list[Case]:
    """What a top-k mixture of experts launches, with biases, weights and shared neurons."""
    (tokens, slots), (experts, width, hidden), shared = (8, 4), (64, 96, 2048), 256

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    gate, up = make(experts, 2 * width, hidden).chunk(2, dim=1)
    biases = make(experts, 2 * width).chunk(2, dim=1)
    call = Call(
        x=make(tokens, hidden),
        ids=make(tokens, slots, dtype=torch.int64),
        counts=make(tokens, dtype=torch.int64),
        gate=gate if glu else None,
        up=up,
        down_rows=make(experts, width, hidden),
        gate_bias=biases[0] if glu else None,
        up_bias=biases[1],
        down_bias=make(experts, hidden),
        out_bias=make(hidden),
        weights_of=make(tokens, slots, dtype=torch.float32),
        shared_gate=make(shared, hidden) if glu else None,
        shared_up=make(shared, hidden),
        shared_down_rows=make(shared, hidden),
        shared_gate_bias=make(shared) if glu else None,
        shared_up_bias=make(shared),
        activation=activation,
    )
    found = _checked(cases(name, triton_decode, lambda: triton_decode.run(call)))
    # nothing is multiplied by strides of a gate that is not there
    kept = tuple(wide for wide in _WIDE["hidden"] if glu or not wide.startswith("gate"))
    return [replace(case, wide=kept) if "hidden" in case.name else case for case in found]


def _by_columns() -> list[Case]:
    """The matrix [d, f] by rows, as checkpoints hold it: pieces of 32 numbers of 16 bits."""
    down = torch.empty(2048, 8192, dtype=torch.bfloat16)
    up, mask = torch.empty(8192, 2048, dtype=torch.bfloat16), torch.zeros(1, 256, dtype=torch.bool)
    x = torch.empty(1, 2048, dtype=torch.bfloat16)
    found = cases(
        "decode-columns",
        triton_decode,
        lambda: decode.expert_ffn(x, mask, up=up, down=down, width=32, activation=functional.relu),
    )
    wide = ("down_expert", "down_column")
    return [
        replace(case, wants={80: _WANTS["output"], 90: _WANTS["output"]}, wide=wide)
        for case in found
        if "output" in case.name
    ]


def _most() -> list[Case]:
    """The list of the most experts that one program makes."""
    mask = torch.zeros(1, decode.MOST_EXPERTS, dtype=torch.bool)
    factors = torch.ones(1, decode.MOST_EXPERTS, dtype=torch.bfloat16)
    return cases("decode-most", triton_decode, lambda: triton_decode.compact(mask, factors))


CASES = [
    *_runtime("decode-1b", 2048, 8192, dtype=torch.bfloat16),
    *_runtime("decode-7b-128", 4096, 14336, dtype=torch.float16, width=128),
    *_runtime("decode-135m-fp32", 576, 1536, dtype=torch.float32),
    *_experts("decode-experts-glu", "gelu_tanh", glu=True),
    *_experts("decode-experts-plain", "relu2", glu=False),
    *_by_columns(),
    *_most(),
]
