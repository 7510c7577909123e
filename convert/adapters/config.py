"""The configuration of PEFT's method MOLORA: what adapter_config.json holds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig, PeftType

from adaconvert.adapters.register import NAME, register
from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError, check_gates

#: key of `router` -> its known values, the default first.
ROUTER: dict[str, tuple[str, ...]] = {
    "kind": ("linear", "none"),
    "reads": ("module", "layer", "shared"),
    "score": ("dot", "abs"),
    "norm": ("none", "layernorm"),
}


@dataclass
class MoloraConfig(PeftConfig):
    """E routed adapters on each of some linears.

    Attributes:
        target_modules: ends of module paths, a regular expression of whole paths, "all-linear" for
            every linear of the blocks, or None for those PEFT's LoRA has in this architecture.
        num_experts: adapters of each linear.
        r: rank of each.
        lora_alpha: over r the scaling, unless `scaling` says it.
        scaling: None, a number, or one number per adapter.
        experts_kind: "lora" (MoLoRA) or "ia3" (MoV); Zadouri et al. 2023, arXiv 2309.05444.
        share: "a": one first factor for all adapters (HydraLoRA, 2404.19245).
        feedforward_modules: of ia3, the targets whose input is scaled; others' output is.
        dropout: on what adapters read, in training.
        router: {"kind", "reads", "score", "norm", "scale"}; see `modeling.adaptive_schema`.
        select: {"rule", its value, "renormalize"}.
        init_std: standard deviation of the first factor and of routers. The second factor, or the
            vectors, start as zeros: a new adapter changes nothing.
        base_fingerprint: `io.fingerprint` of the base.
        modules_to_save: as in every PEFT method: whole modules trained and saved beside.
    """

    target_modules: list[str] | str | None = None
    num_experts: int = 8
    r: int = 8
    lora_alpha: float = 16
    scaling: float | list[float] | None = None
    experts_kind: str = "lora"
    share: str | None = None
    feedforward_modules: list[str] | str | None = None
    dropout: float = 0.0
    router: dict[str, Any] = field(default_factory=dict)
    select: dict[str, Any] = field(default_factory=lambda: {"rule": "soft"})
    init_std: float = 0.02
    base_fingerprint: str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        """Fill in what follows from the rest.

        Raises:
            OptionError: a value that means nothing.
        """
        register()
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PeftType(NAME)
        if isinstance(self.router, dict):
            known = {name: values[0] for name, values in ROUTER.items()}
            self.router = {**known, "scale": 1.0, **self.router}
        _check(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the same for the same adapter: PEFT makes sets of lists."""
        found = super().to_dict()
        return {
            name: sorted(value) if isinstance(value, set) else copy.deepcopy(value)
            for name, value in found.items()
        }

    def scalings(self) -> float | list[float]:
        """Return the factor of all adapters, or of each."""
        return self.lora_alpha / self.r if self.scaling is None else self.scaling


def _check(config: MoloraConfig) -> None:
    """Refuse a configuration that means nothing."""
    _check_sizes(config)
    lora = config.experts_kind == "lora"
    for name, known in (("experts_kind", ("lora", "ia3")), ("share", (None, "a"))):
        if getattr(config, name) not in known:
            listed = " or ".join(map(str, known))
            raise _wrong(name, expected=listed, found=repr(getattr(config, name)))
    if not lora and config.share is not None:
        raise _wrong("share", expected="None with ia3, which has no factor", found=config.share)
    if not lora and config.dropout:
        raise _wrong("dropout", expected="0 with ia3", found=config.dropout)
    if lora and config.feedforward_modules is not None:
        raise _wrong("feedforward_modules", expected="None with lora", found="some")
    _check_router(config.router)
    try:
        check_gates("select", config.select, config.num_experts)
    except (AdaptiveConfigError, AttributeError) as error:
        raise OptionError(str(error), where=f"{NAME} configuration") from error


def _check_sizes(config: MoloraConfig) -> None:
    for name in ("num_experts", "r"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise _wrong(name, expected="1 or more", found=repr(value))
    for name, low, high in (
        ("lora_alpha", 0.0, math.inf),
        ("dropout", 0.0, 1.0),
        ("init_std", 0.0, math.inf),
    ):
        value = getattr(config, name)
        if not _is_number(value) or not low <= value < high:
            raise _wrong(name, expected=f"{low:g} or more, below {high:g}", found=repr(value))
    each = config.scaling if isinstance(config.scaling, list | tuple) else None
    if each is not None and len(each) != config.num_experts:
        raise _wrong("scaling", expected=f"{config.num_experts} numbers", found=len(each))
    values = [config.scaling] if each is None else each
    if config.scaling is not None and not all(map(_is_number, values)):
        raise _wrong("scaling", expected="numbers", found=repr(config.scaling))


def _check_router(router: Any) -> None:
    if not isinstance(router, dict) or set(router) != {*ROUTER, "scale"}:
        listed = ", ".join([*ROUTER, "scale"])
        raise _wrong("router", expected=f"an object of {listed}", found=repr(router))
    for name, known in ROUTER.items():
        if router[name] not in known:
            raise _wrong(f"router.{name}", expected=" or ".join(known), found=repr(router[name]))
    if not _is_number(router["scale"]):
        raise _wrong("router.scale", expected="a number", found=repr(router["scale"]))


def _is_number(value: Any) -> bool:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return known and math.isfinite(value)


def _wrong(name: str, *, expected: object, found: object) -> OptionError:
    return OptionError(
        "is no value this method can have",
        where=f"{NAME} configuration: {name}",
        expected=expected,
        found=found,
    )
