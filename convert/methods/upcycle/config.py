"""The options of `upcycle`, checked before anything is opened.

Letters: N routed experts, k experts per token, G granularity, I neurons of the dense FFN.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields

from adaconvert.errors import OptionError

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
        self._check_types()
        self._check_routing()
        self._check_choice("shared_experts", SHARED)
        self._check_choice("drop_index", DROP_INDEX)
        self._check_choice("router_init", ROUTER_INITS)
        self._check_choice("dtype", tuple(DTYPES))
        self._check_range("noise", 0.0, 10.0)
        self._check_range("drop", 0.0, 1.0)
        self._check_range("aux_loss_coef", 0.0, 100.0)
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

    def _check_types(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind = str(field.type).split(" | ")[0]
            optional = "None" in str(field.type)
            if value is None and optional:
                continue
            fits = {
                "int": isinstance(value, int) and not isinstance(value, bool),
                "float": isinstance(value, int | float) and not isinstance(value, bool),
                "str": isinstance(value, str),
            }[kind]
            if not fits:
                raise OptionError(
                    "wrong type", where=_option(field.name), expected=kind, found=repr(value)
                )

    def _check_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise OptionError(
                "unknown choice",
                where=_option(name),
                expected=" or ".join(allowed),
                found=repr(value),
            )

    def _check_range(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not (math.isfinite(value) and low <= value <= high):
            raise OptionError(
                "out of range", where=_option(name), expected=f"{low} to {high}", found=value
            )

    def _check_routing(self) -> None:
        for name in ("experts", "top_k", "granularity"):
            if getattr(self, name) < 1:
                raise OptionError(
                    "must be at least 1", where=_option(name), found=getattr(self, name)
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
                    where=_option(name),
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


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def parse_layers(text: str | None, count: int) -> frozenset[int]:
    """Return the blocks a selection names.

    Args:
        text: comma-separated indexes and inclusive ranges, such as "4-20,22"; None for all.
        count: blocks of the model.

    Raises:
        OptionError: the text is malformed, empty, or names a block that does not exist.
    """
    if text is None:
        return frozenset(range(count))
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part, re.ASCII)
        if match is None:
            raise OptionError(
                "cannot be read",
                where="--layers",
                expected="indexes and ranges such as 4-20,22",
                found=repr(text[:80]),
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last or last >= count:
            raise OptionError(
                f"the model has blocks 0 to {count - 1}", where="--layers", found=part.strip()
            )
        chosen.update(range(first, last + 1))
    return frozenset(chosen)
