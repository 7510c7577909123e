"""The options of `upcycle`, checked before anything is opened.

Letters: N routed experts, k experts per token, G granularity, I neurons of the dense FFN.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, option
from adaconvert.methods.options import parse_layers as parse_layers

ROUTER_INITS = ("small", "zeros", "orthogonal", "hidden")
SHARED = ("none", "neutral", "split")
DROP_INDEX = ("shared", "per-matrix")
DTYPES = {"keep": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleConfig:
    """What `upcycle` does.

    Attributes:
        experts: routed experts per converted layer, N. Default 8 as in 2410.07524 and 2502.19261.
        top_k: routed experts per token, k. Default 2, likewise.
        target: host architecture, or "auto" for the one that holds the source exactly.
        granularity: G; each expert holds 1/G of the FFN's neurons and N/G groups hold them all
            (2410.07524, virtual groups). A power of two, so that scaling stays exact in 16 bits.
        shared_experts: "none"; "neutral" adds a shared expert that contributes zero; "split" moves
            part of the FFN into a shared expert so that shared + routed is the dense FFN.
        shared_width: neurons of the shared expert; None for I/2 ("split") or 64 at most
            ("neutral").
        layers: blocks to convert, None for all.
        noise: standard deviation of the noise added to expert matrices, in standard deviations of
            each.
        drop: share of each expert's neurons that is re-drawn (2502.19261; 0.5 is best there).
        drop_index: "shared" draws one index set per expert (the paper), "per-matrix" one for each
            matrix (the published script).
        router_init: "small" (normal, std 0.02 kept inside the range where logits neither tie nor
            saturate), "zeros", "orthogonal", "hidden" (mean FFN inputs of `router_prompts`).
        router_prompts: text file; see `methods.upcycle.hidden.read_prompts`.
        base: with several sources, where everything outside the FFNs comes from: "average"
            (2403.07816) or the path of one of the sources.
        dtype: stored dtype, "keep" for that of the source.
        aux_loss_coef: balance-loss coefficient in config.json. Default 0.01 (2410.07524: 1e-3 to
            1e-2 good).
        seed: of every random choice.
    """

    experts: int = 8
    top_k: int = 2
    target: str = "auto"
    granularity: int = 1
    shared_experts: str = "none"
    shared_width: int | None = None
    layers: str | None = None
    noise: float = 0.0
    drop: float = 0.0
    drop_index: str = "shared"
    router_init: str = "small"
    router_prompts: str | None = None
    base: str = "average"
    dtype: str = "keep"
    aux_loss_coef: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        self._check_routing()
        check_choice(self, "shared_experts", SHARED)
        check_choice(self, "drop_index", DROP_INDEX)
        check_choice(self, "router_init", ROUTER_INITS)
        check_choice(self, "dtype", tuple(DTYPES))
        check_range(self, "noise", 0.0, 10.0)
        check_range(self, "drop", 0.0, 1.0)
        check_range(self, "aux_loss_coef", 0.0, 100.0)
        if self.shared_width is not None and self.shared_experts == "none":
            raise OptionError(
                "only means something with --shared-experts neutral or split",
                where="--shared-width",
            )
        if (self.router_init == "hidden") != (self.router_prompts is not None):
            raise OptionError(
                "--router-init hidden and --router-prompts FILE go together",
                where="--router-prompts",
            )

    def _check_routing(self) -> None:
        for name in ("experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise OptionError(
                    "must be at least 1", where=option(name), found=getattr(self, name)
                )
        if self.experts > 4096:
            raise OptionError(
                "out of range", where="--experts", expected="1 to 4096", found=self.experts
            )
        if self.shared_width is not None and self.shared_width < 1:
            raise OptionError("must be at least 1", where="--shared-width", found=self.shared_width)
        if self.top_k > self.experts:
            raise OptionError(
                "more experts per token than there are experts",
                where="--top-k",
                expected=f"1 to {self.experts}",
                found=self.top_k,
            )
        if self.granularity > 1:
            self._check_groups()

    def _check_groups(self) -> None:
        g = self.granularity
        if g & (g - 1):
            raise OptionError(
                "granularity must be a power of two, or scaling by it would round 16-bit weights",
                where="--granularity",
                expected="1, 2, 4, 8, ...",
                found=g,
            )
        for name in ("experts", "top_k"):
            if getattr(self, name) % g:
                raise OptionError(
                    "must be a multiple of the granularity, or groups would be incomplete",
                    where=option(name),
                    expected=f"a multiple of {g}",
                    found=getattr(self, name),
                )
        if self.router_init == "zeros":
            raise OptionError(
                "a zero router ties all groups and picks incomplete ones when granularity is "
                "above 1",
                where="--router-init",
                expected="small, orthogonal or hidden",
                found="zeros",
            )
