"""The options of `molora`, checked before anything is opened.

Letters: E adapters of rank r.
"""

from __future__ import annotations

from dataclasses import dataclass

from adaconvert.arch.adapters import IA3, LORA
from adaconvert.errors import OptionError
from adaconvert.methods.options import check_choice, check_range, check_types, option

#: how adapters are weighed -> rule of the runtime; the last two need adapters that exist.
RULES = {
    "soft": "soft",
    "topk": "top-k",
    "topp": "top-p",
    "uniform": "uniform",
    "arrow": "top-k",
    "phatgoose": "top-k",
}
POST_HOC = ("arrow", "phatgoose")
READS = {"per-module": "module", "per-layer": "layer", "shared": "shared"}
#: what is written instead of a PEFT folder.
FORMS = ("standalone", "as_plain_lora", "as_moe")
#: adapters of a linear, their rank and strength where neither options nor adapters say.
EXPERTS, RANK, ALPHA = 8, 8, 16.0
K, ARROW_K, P = 2, 3, 0.8
#: options that are about adapters that are made here; those of a source say all of it themselves.
OF_NEW = (
    *("experts", "rank", "alpha", "target_modules", "routing", "k", "p", "renormalize", "router"),
    *("experts_kind", "share", "dropout", "adapters", "data", "gate_steps", "subtract_mean"),
)
#: further options that say how adapters are made.
OF_FITS = ("data_field", "device", "work")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoloraOptions:
    """What `molora` does.

    Attributes:
        experts: E; None for 8, or as many as `adapters`.
        rank: r; None for 8, or the largest of `adapters`.
        alpha: over r, what every adapter is multiplied by; None for 16, or what `adapters` say.
        target_modules: linears that get adapters, as PEFT reads it: comma-separated ends of paths,
            "all-linear" or a regular expression; None for all of the blocks, with "ia3" for those
            that give keys and values and those that read hidden units.
        routing: "soft", "topk", "topp", "uniform" (no router), or of existing adapters "arrow"
            (2405.11157) or "phatgoose" (2402.05859).
        k, p: of topk and topp; None for 2 (arrow: 3) and 0.8.
        renormalize: weights of the chosen adapters sum to 1; MoLoRA's own do not (2309.05444).
        router: "per-module": every linear its own, on its own input; "per-layer": one a block, on
            the input of the block; "shared": one for the model, on the input of every block.
        experts_kind: "lora" (MoLoRA), or "ia3" (MoV): vectors that scale keys, values and hidden
            units.
        share: "a": one A for all adapters of a linear (HydraLoRA, 2404.19245).
        dropout: on the input of adapters, in training.
        adapters: folders of existing LoRA adapters that become the experts, in this order.
        data: for "phatgoose": one text per adapter, on which its gate is trained.
        data_field: field of a row that holds the text.
        gate_steps: for "phatgoose": steps of it. Default: the paper's.
        subtract_mean: take the mean of all adapters off each (GenKnowSub).
        standalone: write a checkpoint that needs neither PEFT nor adaconvert to load.
        as_plain_lora: write the stock LoRA of rank E r that equals uniform routing.
        as_moe: write a stock mixture whose experts are the dense network plus an adapter each
            (as in Branch-Train-MiX, 2403.07816), for runtimes without adapters.
        target: host architecture of that mixture.
        top_k: experts per token of that mixture; None for k, or all where routing is soft.
        base: what an adapter folder names as its base; None for SRC as it was given.
        device: torch device gates are trained on, or "auto" for the accelerator if there is one.
        work: folder for gates while they are trained, from which a killed run goes on; None for
            none.
        seed: of every random choice.
    """

    experts: int | None = None
    rank: int | None = None
    alpha: float | None = None
    target_modules: str | None = None
    routing: str = "soft"
    k: int | None = None
    p: float | None = None
    renormalize: bool = False
    router: str = "per-module"
    experts_kind: str = LORA
    share: str | None = None
    dropout: float = 0.0
    adapters: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    data_field: str = "text"
    gate_steps: int = 100
    subtract_mean: bool = False
    standalone: bool = False
    as_plain_lora: bool = False
    as_moe: bool = False
    target: str = "auto"
    top_k: int | None = None
    base: str | None = None
    device: str = "auto"
    work: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("adapters", "data"):
            given = getattr(self, name)
            object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        check_types(self)
        check_choice(self, "routing", tuple(RULES))
        check_choice(self, "router", tuple(READS))
        check_choice(self, "experts_kind", (LORA, IA3))
        if self.share is not None:
            check_choice(self, "share", ("a",))
        for name, low, high in (
            ("experts", 1, 4096),
            ("rank", 1, 65536),
            ("alpha", 0, 1e6),
            ("k", 1, self.experts or 4096),
            ("p", 0, 1),
            ("dropout", 0, 0.99),
            ("gate_steps", 1, 1_000_000),
            ("top_k", 1, 4096),
            ("seed", 0, 2**63 - 1),
        ):
            check_range(self, name, low, high)
        self._check_pairs()
        self._check_kind()
        self._check_adapters()
        self._check_form()

    @property
    def form(self) -> str:
        """Return what is written: "folder", or one of `FORMS`."""
        return next((name for name in FORMS if getattr(self, name)), "folder")

    def select(self, experts: int) -> dict[str, object]:
        """Return the rule of the gates as configurations hold it.

        Args:
            experts: E.

        Raises:
            OptionError: k is more than E.
        """
        rule = RULES[self.routing]
        if rule == "top-k":
            usual = min(ARROW_K if self.routing == "arrow" else K, experts)
            k = self.k or usual
            if k > experts:
                raise OptionError(
                    "is more adapters than there are", where="--k", expected=experts, found=k
                )
            renormalize = self.renormalize or self.routing in POST_HOC
            return {"rule": rule, "k": k, "renormalize": renormalize}
        if rule == "top-p":
            return {"rule": rule, "p": self.p or P, "renormalize": self.renormalize}
        return {"rule": rule}

    def _check_pairs(self) -> None:
        """Refuse options that another one leaves without meaning."""
        rule = RULES[self.routing]
        for name, needed in (("k", "top-k"), ("p", "top-p")):
            if getattr(self, name) is not None and rule != needed:
                raise self._idle(name, f"--routing {self.routing}")
        if self.p == 0:
            raise OptionError("out of range", where="--p", expected="above 0, at most 1", found=0)
        if self.renormalize and rule not in ("top-k", "top-p"):
            raise self._idle("renormalize", f"--routing {self.routing}")
        if self.routing == "uniform" and self.router != "per-module":
            raise self._idle("router", "--routing uniform, which has no router")
        if self.routing in POST_HOC and self.router != "per-module":
            raise self._idle("router", f"--routing {self.routing}: every linear has its own")

    def _check_kind(self) -> None:
        if self.experts_kind == LORA:
            return
        for name, default in (("rank", None), ("alpha", None), ("share", None), ("dropout", 0)):
            if getattr(self, name) != default:
                raise self._idle(name, "--experts-kind ia3, which has no low-rank factors")
        for name in ("as_plain_lora", "as_moe"):
            if getattr(self, name):
                raise self._idle(name, "--experts-kind ia3, which has no low-rank factors")

    def _check_adapters(self) -> None:
        if self.routing in POST_HOC and not self.adapters:
            raise OptionError(
                f"{self.routing} routes adapters that exist: name them with --from",
                where="--routing",
                expected="soft, topk, topp or uniform without --from",
            )
        if not self.adapters:
            for name in ("data", "subtract_mean", "work"):
                if getattr(self, name):
                    raise self._idle(name, "no --from")
            return
        for name, default in (("experts", None), ("rank", None), ("alpha", None), ("share", None)):
            if getattr(self, name) != default:
                raise self._idle(name, "--from: the adapters say it")
        if self.experts_kind != LORA:
            raise self._idle("experts_kind", "--from, which takes LoRA adapters")
        if self.routing == "phatgoose" and len(self.data) != len(self.adapters):
            raise OptionError(
                "phatgoose trains the gate of each adapter on a text of its own",
                where="--data",
                expected=f"{len(self.adapters)} texts, one for each --from",
                found=len(self.data),
            )
        for name in ("data", "work"):
            if self.routing != "phatgoose" and getattr(self, name):
                raise self._idle(name, f"--routing {self.routing}")

    def _check_form(self) -> None:
        given = [name for name in FORMS if getattr(self, name)]
        if len(given) > 1:
            raise OptionError(
                "one result at a time", where=" ".join(option(name) for name in given)
            )
        if not self.as_moe and (self.top_k is not None or self.target != "auto"):
            name = "top_k" if self.top_k is not None else "target"
            raise self._idle(name, "a result that is no mixture (--as-moe)")

    def _idle(self, name: str, why: str) -> OptionError:
        where = "--from" if name == "adapters" else option(name)
        return OptionError(f"does nothing with {why}", where=where)
