"""What a model with routed adapters can do besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import initialization as init

from .adaptive_adapters import RoutedAdapters
from .adaptive_calls import Runtime
from .adaptive_knobs import Setting
from .adaptive_linear import AdaptiveLinear, attach_readers
from .adaptive_schema import AdaptiveConfigError, check_gates


class AdaptedMixin:
    """The part of an adaptive model that is about routed adapters."""

    adaptive_runtime: Runtime

    def adaptive_adapters(self) -> dict[str, AdaptiveLinear]:
        """Return the linears with routed adapters, by path."""
        own: Any = self
        return {path: _inside(own._site(path)) for path in self.adaptive_runtime.adapted}

    def set_adapters(self, rule: str | None = None, **value: float | bool | None) -> Setting:
        """Weigh routed adapters by `rule` from now on; as a context manager, until its end.

        Args:
            rule: "soft", "uniform", "sigmoid", "top-k" (k) or "top-p" (p), the last two also with
                `renormalize`; None goes back to what the configuration says.
            value: the rule's value by its name.

        Raises:
            ValueError: unknown rule or value, or no routed adapters.
        """
        runtime = self.adaptive_runtime
        before = runtime.kept()
        if not runtime.adapted:
            raise AdaptiveConfigError("this model has no routed adapters")
        select = None if rule is None else {"rule": rule, **value}
        if select is not None:
            for path, site in self.adaptive_adapters().items():
                check_gates(f"set_adapters at {path}", select, site.adapters.count)
        runtime.adapters = select
        return Setting(runtime, before)

    def _fill_adapters(self, adapted: Mapping[str, AdaptiveLinear]) -> None:
        """Initialise what linears with routed adapters hold, and let blocks route for them."""
        own: Any = self
        bare = bool(own.base_model_prefix) and not hasattr(self, own.base_model_prefix)
        attach_readers(own, adapted, f"{own.base_model_prefix}." if bare else "")
        for site in adapted.values():
            for part in (site.adapters, site.router):
                if part is not None and not next(part.parameters()).is_meta:
                    own._init_weights(part)

    def _check_adapters(self) -> None:
        """Return only when every linear that had adapters still has them.

        Raises:
            AdaptiveConfigError: quantisation replaced one.
        """
        own: Any = self
        for path in self.adaptive_runtime.adapted:
            if not isinstance(own._site(path), AdaptiveLinear):
                raise AdaptiveConfigError(
                    f"{path} was replaced while loading; its adapters are lost: load the dense "
                    "model so, and the adapters as a PEFT folder"
                )


def _inside(module: Any) -> Any:
    """Return the linear that wrappers of peft were put around."""
    found = module
    while not isinstance(found, AdaptiveLinear) and "base_layer" in found._modules:
        found = found._modules["base_layer"]
    return found if isinstance(found, AdaptiveLinear) else module


def init_adapters(module: RoutedAdapters) -> None:
    """Fill adapters so that they add nothing: A is random, B and scales are zero.

    Source: N(0, 0.02), MoLoRA's own code (2309.05444, `src/molora.py`).
    """
    for name, parameter in module.named_parameters():
        if name == "a":
            init.normal_(parameter, mean=0.0, std=0.02)
        else:
            init.zeros_(parameter)
