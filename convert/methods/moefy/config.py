"""The options of `moefy`, checked before anything is opened.

Letters: f neurons of the dense FFN, s always-on ones, N routed experts of m neurons, f = s + N m.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.arch.base import ModelSpec
from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, divisors, nearest

SPLITS = ("balanced-kmeans", "coactivation", "contiguous", "random", "shared+routed")
ROUTERS = ("param-center", "similarity", "analytic", "gate", "oracle")
RULES = ("top-k", "dynamic-k", "threshold", "top-p")
MATRICES = ("auto", "gate", "up", "gate+up")
#: splits that look at activations on text.
DATA_SPLITS = ("coactivation", "shared+routed")
#: MoEfication's expert width (2110.01786, section 4.1).
WIDTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class UnmoefyConfig:
    """`unmoefy` has no options: what it restores is in the checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoefyConfig:
    """What `moefy` does.

    Attributes:
        num_experts: routed experts per converted layer, N; None to follow from `expert_width`.
        expert_width: neurons of each, m; None to follow from `num_experts`. With neither, the
            largest width up to 32 that divides (MoEfication's 32, 2110.01786).
        layers: blocks to convert, None for all.
        split: how neurons are grouped. "balanced-kmeans": by their weight rows (2110.01786, 3.1);
            "coactivation": by which neurons are active together on `data` (likewise);
            "shared+routed": the most active ones always run, the rest is grouped by activation
            (CMoE, 2502.04416); "contiguous" and "random" are baselines.
        matrices: whose rows balanced-kmeans looks at; "auto" is the gate (D2DMoE, 2310.04361), of
            a plain FFN its only input matrix.
        shared_neurons: s, for "shared+routed"; None for about an eighth of the FFN.
        router: how an expert's score is computed; none of them is trained. "param-center" (mean
            row, 2110.01786), "similarity" (cosine), "analytic" (one neuron stands for its expert,
            2502.04416), "gate" (the model's own gate is run in full), "oracle" (the whole FFN is
            run: for measuring only).
        rule: which experts run: "top-k", "dynamic-k" (score >= tau x the highest, 2310.04361),
            "threshold" (score >= a number), "top-p" (2403.07652).
        top_k, tau, threshold, top_p: the rule's number; None so that every expert runs.
        keep: share of experts a token keeps on average; thresholds that do it are found for each
            layer on `data`. 1 keeps every expert of every token, whatever the text. Only with the
            rule "threshold".
        data: text for splits and thresholds that need it: file, folder or hub id.
        data_field, data_split: see `data.text.read_documents`.
        data_tokens: tokens of it that are used. Default 16384, as in CMoE (8 sequences of 2048).
        native: write the exact stock mixture (every expert runs, a router of zeros) instead.
        target: with `native`, the host architecture, or "auto".
        seed: of every random choice.
    """

    num_experts: int | None = None
    expert_width: int | None = None
    layers: str | None = None
    split: str = "balanced-kmeans"
    matrices: str = "auto"
    shared_neurons: int | None = None
    router: str = "param-center"
    rule: str = "top-k"
    top_k: int | None = None
    tau: float | None = None
    threshold: float | None = None
    top_p: float | None = None
    keep: float | None = None
    data: str | None = None
    data_field: str = "text"
    data_split: str | None = None
    data_tokens: int = 16384
    native: bool = False
    target: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        check_choice(self, "split", SPLITS)
        check_choice(self, "matrices", MATRICES)
        check_choice(self, "router", ROUTERS)
        check_choice(self, "rule", RULES)
        for name in ("num_experts", "expert_width", "top_k", "shared_neurons"):
            check_range(self, name, 1, 2**31 - 1)
        check_range(self, "data_tokens", 2, 2**31 - 1)
        check_range(self, "tau", 0.0, 1.0)
        check_range(self, "top_p", 0.0, 1.0)
        check_range(self, "threshold", 0.0, 3.4e38)
        check_range(self, "keep", 0.0, 1.0)
        self._check_rule()
        self._check_data()
        self._check_native()

    def _check_rule(self) -> None:
        wanted = {"top_k": "top-k", "tau": "dynamic-k", "threshold": "threshold", "top_p": "top-p"}
        wanted["keep"] = "threshold"
        for name, rule in wanted.items():
            if getattr(self, name) is not None and self.rule != rule:
                raise _means_nothing(name, f"with --rule {rule}", f"--rule {self.rule}")
        if self.threshold is not None and self.keep is not None:
            raise OptionError(
                "says what --keep is to find out", where="--threshold", hint="Give one of the two."
            )
        if self.split != "shared+routed" and self.shared_neurons is not None:
            raise _means_nothing("shared_neurons", "with --split shared+routed", self.split)
        if self.split != "balanced-kmeans" and self.matrices != "auto":
            raise _means_nothing("matrices", "with --split balanced-kmeans", self.split)

    def _check_data(self) -> None:
        why = None
        if self.split in DATA_SPLITS:
            why = f"--split {self.split} looks at activations on text"
        elif self.finds_thresholds:
            why = "--keep finds its thresholds on text"
        if why is not None and self.data is None:
            raise OptionError(
                f"is missing: {why}",
                where="--data",
                hint="Give some pages of text like those the model is for.",
            )
        if why is None and self.data is not None and self.keep is None:
            raise _means_nothing(
                "data", "with --split coactivation or shared+routed, or --keep", self.split
            )

    def _check_native(self) -> None:
        if not self.native:
            if self.target != "auto":
                raise _means_nothing("target", "with --native", "an adaptive checkpoint")
            return
        fixed = {"rule": "top-k", "top_k": None, "router": "param-center"}
        for name, default in fixed.items():
            if getattr(self, name) != default:
                raise OptionError(
                    "does not go with --native, where every expert runs behind a router of zeros",
                    where="--" + name.replace("_", "-"),
                    found=getattr(self, name),
                )
        if self.split == "shared+routed":
            raise OptionError("does not go with --native", where="--split", found=self.split)

    def select(self, experts: int) -> dict[str, object]:
        """Return the selection rule of a layer with this many experts, as config.json has it.

        Where thresholds are still to be found (`keep` below 1) it is null.

        Raises:
            OptionError: more experts are to run than there are.
        """
        if self.rule == "top-k":
            if self.top_k is not None and self.top_k > experts:
                raise OptionError(
                    "more experts per token than there are experts",
                    where="--top-k",
                    expected=f"1 to {experts}",
                    found=self.top_k,
                )
            return {"rule": "top-k", "k": self.top_k or experts}
        if self.rule == "dynamic-k":
            return {"rule": "dynamic-k", "tau": self.tau or 0.0}
        if self.rule == "top-p":
            return {"rule": "top-p", "p": 1.0 if self.top_p is None else self.top_p}
        found = None if self.finds_thresholds else self.threshold or 0.0
        return {"rule": "threshold", "threshold": found}

    @property
    def finds_thresholds(self) -> bool:
        """Return whether thresholds are to be found: no score is below zero, so to keep all of the
        experts takes none."""
        return self.keep is not None and self.keep < 1

    def runs_all(self, experts: int) -> bool:
        """Return whether every expert runs for every token."""
        select = self.select(experts)
        number = {"top-k": "k", "dynamic-k": "tau", "threshold": "threshold", "top-p": "p"}
        value = select[number[self.rule]]
        return value == {"top-k": experts, "top-p": 1.0}.get(self.rule, 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How many experts of how many neurons, after how many that always run."""

    experts: int
    width: int
    shared: int = 0


def sizes_of(config: MoefyConfig, spec: ModelSpec) -> Sizes:
    """Return the sizes of every converted layer.

    Raises:
        OptionError: the FFN's width does not divide as asked; names the numbers that would do.
    """
    total = spec.intermediate
    shared = _shared(config, total)
    routed = total - shared
    if config.num_experts is not None:
        experts = _dividing(config.num_experts, routed, "--num-experts", shared)
        if config.expert_width not in (None, routed // experts):
            raise OptionError(
                f"{experts} experts of {routed} neurons have {routed // experts} each",
                where="--expert-width",
                expected=routed // experts,
                found=config.expert_width,
            )
        return Sizes(experts=experts, width=routed // experts, shared=shared)
    width = config.expert_width or max(n for n in divisors(routed) if n <= WIDTH)
    _dividing(width, routed, "--expert-width", shared)
    return Sizes(experts=routed // width, width=width, shared=shared)


def _shared(config: MoefyConfig, total: int) -> int:
    if config.split != "shared+routed":
        return 0
    if config.shared_neurons is not None:
        if config.shared_neurons >= total:
            raise OptionError(
                "leaves no neurons for the routed experts",
                where="--shared-neurons",
                expected=f"less than {total}",
                found=config.shared_neurons,
            )
        return config.shared_neurons
    # about an eighth, so that what is left divides
    unit = config.num_experts or config.expert_width or 1
    left = total * 7 // 8 // unit * unit
    return total - (left or total)


def _dividing(number: int, routed: int, where: str, shared: int) -> int:
    if routed % number == 0:
        return number
    after = f" ({shared} more always run)" if shared else ""
    near = ", ".join(str(n) for n in nearest(divisors(routed), number))
    raise OptionError(
        f"does not divide the {routed} neurons of a feed-forward network{after}",
        where=where,
        expected=f"a divisor of {routed}, such as {near}",
        found=number,
    )


def _means_nothing(name: str, when: str, found: str) -> OptionError:
    return OptionError(
        f"only means something {when}", where="--" + name.replace("_", "-"), found=found
    )
