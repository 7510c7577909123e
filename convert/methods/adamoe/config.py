"""The options of `adamoe`, checked before anything is opened.

Letters: n real experts, M null ones, k experts per token of the source, K' slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from adaconvert.arch.null_experts import KINDS, WEIGHTS
from adaconvert.errors import OptionError
from adaconvert.methods.moefy.config import MATRICES, MoefyConfig
from adaconvert.methods.moefy.config import SPLITS as MOEFY_SPLITS
from adaconvert.methods.options import check_choice, check_range, check_types, option
from adaconvert.methods.upcycle.config import (
    DROP_INDEX,
    DTYPES,
    ROUTER_INITS,
    SHARED,
    UpcycleConfig,
)

INITS = ("exact", "bias")
VIAS = ("upcycle", "moefy")
#: splits of `moefy` that make equal experts and none that always runs.
SPLITS = tuple(name for name in MOEFY_SPLITS if name != "shared+routed")
#: null bias at which no null expert is chosen; finite, so that a float16 model may hold the sum.
OFF = -1e4
#: our option -> that of the method that makes a mixture of a dense model first.
UPCYCLE_OPTIONS = {
    "experts": "experts",
    "base_top_k": "top_k",
    "granularity": "granularity",
    "shared_experts": "shared_experts",
    "shared_width": "shared_width",
    "noise": "noise",
    "drop": "drop",
    "drop_index": "drop_index",
    "router_init": "router_init",
    "router_prompts": "router_prompts",
    "base": "base",
    "dtype": "dtype",
    "aux_loss_coef": "aux_loss_coef",
}
MOEFY_OPTIONS = {
    "num_experts": "num_experts",
    "expert_width": "expert_width",
    "split": "split",
    "matrices": "matrices",
}
#: options both have.
BOTH_OPTIONS = {"target": "target", "layers": "layers", "seed": "seed"}
_CHOICES: dict[str, tuple[str, ...]] = {
    "shared_experts": SHARED,
    "drop_index": DROP_INDEX,
    "router_init": ROUTER_INITS,
    "dtype": tuple(DTYPES),
    "split": SPLITS,
    "matrices": MATRICES,
    "via": VIAS,
    "null_init": INITS,
    "null_weights": WEIGHTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamoeConfig:
    """What `adamoe` does.

    Attributes:
        null_experts: M; None for as many as real experts, or the least multiple of them with which
            a token can do without any. AdaMoE has 2 n (2406.13233).
        top_k: K', slots of a token, real and null; None for the exact start's: k (1 + M/n) with
            "exact", k with "bias".
        null_kind: what a chosen null expert adds: "zero" (AdaMoE), "identity" or "constant"
            (2410.07348); the last two are learned and start at nothing.
        null_init: "exact": null rows are copies of the router's, each M/n times, and the bias is 0:
            the k best groups of equal logits fill the slots, a real expert in each. "bias": rows of
            zeros and a bias at which none is chosen; lowering it makes a threshold of the real
            logits. None for "exact" where the source leaves experts out, else "bias".
        null_weights: "real" (AdaMoE): the real experts a token runs weigh what they would among
            themselves. "selected": null ones take part in the sum, which a stock mixture can hold
            (`materialize`). None for "selected" with `materialize`, else "real".
        min_real: real experts a token runs in any case, 0 or 1; None for 1 where no share
            below 1/k is asked for, of a fresh upcycle also then, and for 0 with weights of all
            selected, which are to become a stock mixture. Ours: of a pretrained model briefly
            tuned, tokens without any expert lose most.
        target_compute: share of the source's k real experts that is meant to run; kept in
            config.json for a fine-tune, or reached at once on `data`.
        layer_budget: shares of single blocks instead, such as "0-4=0.9,5-=0.6".
        data: text on which the bias of every block is set so that it spends its share; nothing is
            trained. With via "moefy" the text of its splits.
        data_field, data_split: see `data.text.read_documents`.
        data_tokens: tokens of it that are used. Default 50,000, what our measurements took.
        device: torch device the text runs on, or "auto" for the accelerator if there is one.
        materialize: write a stock mixture of n + M experts instead whose last M are zero: every
            runtime of the architecture runs it, and it saves nothing.
        layers: blocks that get null experts, None for all mixtures; of a dense model those that
            become mixtures.
        via: of a dense model, what makes it a mixture first: "upcycle" (None) or "moefy" (its
            native form, in which every expert runs).
        experts, base_top_k, granularity, shared_experts, shared_width, noise, drop, drop_index,
            router_init, router_prompts, base, dtype, aux_loss_coef: of `upcycle`, `base_top_k`
            being its `top_k`; None for its default.
        num_experts, expert_width, split, matrices: of `moefy`; None for its default.
        target: host architecture of the mixture that is made of a dense model.
        seed: of every random choice of either.
    """

    null_experts: int | None = None
    top_k: int | None = None
    null_kind: str = "zero"
    null_init: str | None = None
    null_weights: str | None = None
    min_real: int | None = None
    target_compute: float | None = None
    layer_budget: str | None = None
    data: str | None = None
    data_field: str = "text"
    data_split: str | None = None
    data_tokens: int = 50_000
    device: str = "auto"
    materialize: bool = False
    layers: str | None = None
    via: str | None = None
    experts: int | None = None
    base_top_k: int | None = None
    granularity: int | None = None
    shared_experts: str | None = None
    shared_width: int | None = None
    noise: float | None = None
    drop: float | None = None
    drop_index: str | None = None
    router_init: str | None = None
    router_prompts: str | None = None
    base: str | None = None
    dtype: str | None = None
    aux_loss_coef: float | None = None
    num_experts: int | None = None
    expert_width: int | None = None
    split: str | None = None
    matrices: str | None = None
    target: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "null_kind", KINDS)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) is not None:
                check_choice(self, name, allowed)
        if self.null_experts == 0:
            raise OptionError(
                "is 0: without null experts every token runs what it runs now",
                where="--null-experts",
                expected="at least 1",
            )
        check_range(self, "null_experts", 1, 65536)
        check_range(self, "top_k", 1, 2**17)
        check_range(self, "min_real", 0, 1)
        check_range(self, "target_compute", 0.0, 1e6)
        check_range(self, "data_tokens", 2, 2**31 - 1)
        self._check_via()
        self._check_budget()
        self._check_materialize()
        self._check_stock_form()

    def _check_via(self) -> None:
        own = {"upcycle": UPCYCLE_OPTIONS, "moefy": MOEFY_OPTIONS}
        for method, names in own.items():
            given = [name for name in names if getattr(self, name) is not None]
            if given and (self.via or "upcycle") != method:
                raise _means_nothing(given[0], f"with --via {method}", self.via)

    def _check_budget(self) -> None:
        budget = self.target_compute is not None or self.layer_budget is not None
        if self.via == "moefy" and self.data is not None and self.split != "coactivation":
            raise OptionError(
                "the routers of a split model are zero until they are trained: no bias can tell "
                "its tokens apart",
                where="--data",
                hint="Leave it out, and give --target-compute to `finetune`.",
            )
        if self.data is not None and self.router_init == "zeros":
            raise OptionError(
                "does not go with --data: no bias can tell tokens apart by routers of zeros",
                where="--router-init",
                expected="small, orthogonal or hidden",
                found="zeros",
            )
        if self.data is not None and not budget and self.via != "moefy":
            raise _means_nothing("data", "with --target-compute or --layer-budget", None)

    def _check_materialize(self) -> None:
        if not self.materialize:
            return
        apart = {
            "null_kind": "zero",
            "min_real": 0,
            "null_init": "exact",
            "null_weights": "selected",
            "target_compute": None,
            "layer_budget": None,
        }
        for name, only in apart.items():
            found = getattr(self, name)
            if found not in (only, AdamoeConfig.__dataclass_fields__[name].default):
                raise OptionError(
                    "does not go with --materialize: a stock mixture has no place for it",
                    where=option(name),
                    expected="nothing" if only is None else str(only),
                    found=found,
                )

    def _check_stock_form(self) -> None:
        """Refuse a stock mixture whose start is not the copied one, before anything is opened."""
        if self.materialize and self.via == "moefy":
            raise OptionError(
                "does not go with --via moefy: all experts of a split model run, so there is "
                "nothing that experts of zeros could stand for",
                where="--materialize",
                hint="`moefy --native` writes a split model as a stock mixture.",
            )
        if self.materialize and self.router_init == "zeros":
            raise OptionError(
                "does not go with --materialize: all logits tie, and the slots cut them anywhere",
                where="--router-init",
                expected="small, orthogonal or hidden",
                found="zeros",
            )

    def given_for_dense(self) -> list[str]:
        """Return the options that were given and only mean something for a dense source."""
        names = ("via", "target", *UPCYCLE_OPTIONS, *MOEFY_OPTIONS)
        return [name for name in names if getattr(self, name) is not None]

    def inner(self) -> UpcycleConfig | MoefyConfig:
        """Return the options of what makes a mixture of a dense model.

        Raises:
            OptionError: they are wrong; named as there.
        """
        own = UPCYCLE_OPTIONS if self.via != "moefy" else MOEFY_OPTIONS
        named = {theirs: getattr(self, ours) for ours, theirs in {**own, **BOTH_OPTIONS}.items()}
        given: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if self.via != "moefy":
            return _renamed(given)
        text = ("data", "data_field", "data_split", "data_tokens")
        if self.split == "coactivation":
            given |= {name: getattr(self, name) for name in text}
        return MoefyConfig(native=True, **given)


def _renamed(given: dict[str, Any]) -> UpcycleConfig:
    try:
        return UpcycleConfig(**given)
    except OptionError as error:
        if error.where != "--top-k":
            raise
        raise OptionError(
            error.message,
            where="--base-top-k",
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from None


def option_names() -> list[str]:
    """Return the name of every option."""
    return [field.name for field in fields(AdamoeConfig)]


def _means_nothing(name: str, when: str, found: object) -> OptionError:
    return OptionError(f"only means something {when}", where=option(name), found=found)
