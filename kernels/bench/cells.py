"""What is measured: operations, shapes and dtypes, the most valuable first."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FLOAT, BFLOAT = torch.float32, torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One operation at one shape and dtype.

    Attributes:
        slots: experts per token; of dynk_decode, how many are selected.
        size: what else belongs to the shape: rank, vocabulary.
        heads: of cross-entropy.
        seconds: the cell may take, of measured rounds.
    """

    op: str
    dtype: torch.dtype
    tokens: int
    hidden: int = 0
    width: int = 0
    experts: int = 0
    slots: int = 0
    size: int = 0
    heads: int = 1
    seconds: float = 40.0

    @property
    def detail(self) -> str:
        """Return the part of the shape that has no column of its own."""
        named = {"lora": f"rank {self.size}"}
        named["cross_entropy"] = f"vocabulary {self.size}, {self.heads} heads"
        return named.get(self.op, "")

    def __str__(self) -> str:
        sizes = (self.tokens, self.hidden, self.width, self.experts, self.slots)
        shape = "T{} d{} i{} E{} K{}".format(*sizes)
        return f"{self.op} {shape} {self.detail} {str(self.dtype).removeprefix('torch.')}"


def ffn(tokens: int, hidden: int, width: int, experts: int, slots: int, dtype: torch.dtype) -> Cell:
    """Return a cell of grouped_ffn."""
    sizes = {"tokens": tokens, "hidden": hidden, "width": width}
    return Cell(op="grouped_ffn", dtype=dtype, experts=experts, slots=slots, **sizes)


def decode(
    hidden: int, neurons: int, width: int, share: float, dtype: torch.dtype, tokens: int = 1
) -> Cell:
    """Return a cell of dynk_decode: a share of the experts of `width` neurons."""
    experts = neurons // width
    sizes = {"tokens": tokens, "hidden": hidden, "width": width, "experts": experts}
    return Cell(
        op="dynk_decode", dtype=dtype, slots=max(1, round(experts * share)), seconds=8, **sizes
    )


#: hidden size and width of the dense networks decoded.
HOSTS = {"135M": (576, 1536), "360M": (960, 2560), "1B": (2048, 8192), "7B": (4096, 14336)}
SHARES = (0.25, 0.5, 0.1, 0.75, 1.0)


def plans(tokens: int) -> list[Cell]:
    """Return cells of the routing plan and of the router."""
    sizes = ((64, 8), (8, 2), (512, 8))
    return [
        Cell(op=op, dtype=FLOAT, tokens=tokens, experts=experts, slots=slots, seconds=10)
        for op in ("route_plan", "router_select")
        for experts, slots in sizes
    ]


def rest(tokens: int, dtype: torch.dtype, vocabulary: int) -> list[Cell]:
    """Return cells of adapters, cross-entropy and token rows."""
    common = {"dtype": dtype, "tokens": tokens}
    return [
        Cell(op="lora", hidden=576, width=1536, experts=8, slots=2, size=16, **common),
        Cell(op="cross_entropy", hidden=576, size=vocabulary, heads=4, **common),
        Cell(op="cross_entropy", hidden=576, size=vocabulary, heads=1, **common),
        Cell(op="token_rows", hidden=576, width=1536, **common),
        Cell(op="lora", hidden=2048, width=2048, experts=8, slots=2, size=16, **common),
    ]


CPU = [
    ffn(512, 576, 1536, 8, 2, FLOAT),
    *(decode(*HOSTS["1B"], 32, share, FLOAT) for share in SHARES),
    *plans(16384),
    ffn(512, 768, 256, 64, 8, FLOAT),
    *rest(512, FLOAT, 8192),
    ffn(256, 960, 2560, 8, 2, FLOAT),
    *(decode(*HOSTS["135M"], 32, share, FLOAT) for share in SHARES),
    ffn(1024, 576, 1536, 8, 2, BFLOAT),
    *(decode(*HOSTS["1B"], 32, share, BFLOAT) for share in SHARES),
    ffn(512, 768, 256, 64, 8, BFLOAT),
    ffn(8, 576, 1536, 8, 2, FLOAT),
]

#: the numbers of the GPU calls; the first measures ceilings and tests, and the small operations.
CALLS: dict[int, list[Cell]] = {
    1: plans(16384),
    2: [
        ffn(16384, 576, 1536, 8, 2, BFLOAT),
        ffn(16384, 2048, 1024, 64, 8, BFLOAT),
        ffn(16384, 768, 256, 128, 8, BFLOAT),
        ffn(16384, 2048, 8192, 8, 2, BFLOAT),
        ffn(16384, 960, 2560, 8, 2, BFLOAT),
        ffn(16384, 4096, 14336, 8, 2, BFLOAT),
    ],
    3: [
        *(decode(*HOSTS[host], 32, share, BFLOAT) for host in ("1B", "7B") for share in SHARES),
        *rest(8192, BFLOAT, 49152),
        *(
            decode(*HOSTS[host], width, 0.25, BFLOAT, tokens)
            for host in HOSTS
            for width in (32, 64, 128)
            for tokens in (1, 2, 4, 8)
            if (width, tokens) != (32, 1)
        ),
        *(decode(*HOSTS[host], 32, share, BFLOAT) for host in ("135M", "360M") for share in SHARES),
    ],
}
