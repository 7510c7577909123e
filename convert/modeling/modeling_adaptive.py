"""Adaptive models over any model class of transformers.

`Adaptive<Base>` exists for every class of transformers; it is made when asked for. It builds the
stock model, fills the sites `config.adaptive` names, and gives the forward pass its call: token
mask, knobs, account, collectors. Everything else, loading, saving, generation, caches, devices, is
the stock class's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationMixin
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from .adaptive_adapted import AdaptedMixin
from .adaptive_calls import AdaptiveBackbone, Runtime, forward_of
from .adaptive_context import Account, checkpointed
from .adaptive_costs import static_costs
from .adaptive_depth import DepthLayer
from .adaptive_depth_costs import block_costs
from .adaptive_depth_model import DepthMixin
from .adaptive_depth_parts import Depth, init_depth
from .adaptive_execution import prepare
from .adaptive_exit_costs import exit_modules
from .adaptive_exits import ExitsMixin, fill_exits, init_exit
from .adaptive_generating import GeneratingMixin
from .adaptive_knobs import Knobs, Setting, knobs_for
from .adaptive_linear import AdaptiveLinear
from .adaptive_mixed import mixed_class
from .adaptive_mixture import AdaptiveMixture
from .adaptive_projection import AdaptiveProjection, drop_plans
from .adaptive_recursion import RecursionMixin, Residual
from .adaptive_routers import Router
from .adaptive_schema import RULES, AdaptiveConfigError, check_select, read
from .adaptive_slots import SITES, fill
from .adaptive_starts import init_part
from .configuration_adaptive import made_config

_MADE: dict[str, type] = {}
_PREFIX = "Adaptive"
#: ending of a class name -> the Auto class that loads it.
_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForPreTraining",
    "ForNextSentencePrediction": "AutoModelForNextSentencePrediction",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "Model": "AutoModel",
}
_COLLECTED = {"router_scores", "experts_run", "decisions", "adapter_logits", "depth"}
_NO_EXPERTS = "this model has no experts to choose from; see `set_adapters` for routed adapters"
#: an adaptive model is being built; models inside it are parts of it and fill no sites.
_BUILDING: ContextVar[bool] = ContextVar("adaptive_building", default=False)


class AdaptiveMixin(AdaptedMixin, ExitsMixin, DepthMixin, RecursionMixin):
    """What every adaptive model can do besides what its stock class can."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        inside = _BUILDING.get()
        token = _BUILDING.set(True)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            _BUILDING.reset(token)
        self.adaptive_runtime = Runtime()
        if inside or config.adaptive is None:
            return
        adaptive = read(config.adaptive)
        own: Any = self
        self._fill_exits(adaptive)
        self._fill_recursion(adaptive)
        filled = fill(own, adaptive, own.base_model_prefix)
        adapted = {p: site for p, site in filled.items() if isinstance(site, AdaptiveLinear)}
        routed = {p: site for p, site in filled.items() if isinstance(site, DepthLayer)}
        sites = {p: site for p, site in filled.items() if p not in {*adapted, *routed}}
        self.adaptive_runtime.sites = tuple(sites)
        self.adaptive_runtime.routed = tuple(routed)
        self.adaptive_runtime.adapted = tuple(adapted)
        self._share_runtime()
        drop_plans(own, [p for p, site in filled.items() if isinstance(site, AdaptiveProjection)])
        self._fill_adapters(adapted)
        for module in sites.values():
            assert isinstance(module, SITES)
            mixture = isinstance(module, AdaptiveMixture)
            added: Any = module.null_experts if mixture else module.router
            if added is not None and not next(added.parameters()).is_meta:
                self._init_weights(added)
        for block in routed.values():
            assert isinstance(block, DepthLayer)
            if not block.depth.router.weight.is_meta:
                init_depth(block.depth)
        self._keep_stock_routers()

    def _fill_exits(self, adaptive: Mapping[str, Any]) -> None:
        """Put exits after blocks; a backbone alone has nothing to leave to."""
        own: Any = self
        exits = (adaptive.get("model") or {}).get("exits")
        if not exits or (own.base_model_prefix and not hasattr(own, own.base_model_prefix)):
            return
        fill_exits(own, exits)
        self.adaptive_runtime.exits = exits
        for head in own.exits.values():
            if not next(head.parameters(), torch.empty(0, device="meta")).is_meta:
                init_exit(head)

    def _keep_stock_routers(self) -> None:
        """Let a mixture's own routers have the model's dtype, whatever their name; what is beside
        them stays in float32, and so do the routers of sites, of adapters and of blocks."""
        own: Any = self
        kept = set(own._keep_in_fp32_modules_strict or ()) - {"router"}
        kept |= {f"null_experts.{name}" for name in ("bias", "scale", "value")}
        named = {name for name, module in own.named_modules() if isinstance(module, Router)}
        own._keep_in_fp32_modules_strict = kept | named

    def _share_runtime(self) -> None:
        """Let the backbone inside run, when it is called by itself, as this model does."""
        own: Any = self
        backbone: Any = own.base_model
        if backbone is self:
            return
        if not isinstance(backbone, AdaptiveMixin):
            backbone.__class__ = mixed_class(AdaptiveBackbone, type(backbone))
        backbone.adaptive_runtime = self.adaptive_runtime

    @property
    def _adaptive_sites(self) -> tuple[str, ...]:
        return self.adaptive_runtime.sites

    @property
    def _adaptive_knobs(self) -> Knobs:
        return self.adaptive_runtime.knobs

    # -- what a caller uses

    def adaptive_sites(self) -> dict[str, Any]:
        """Return the sites that choose experts, by path: feed-forward networks and networks in
        place of projections (`AdaptiveFFN`), and mixtures with null experts (`AdaptiveMixture`)."""
        return {path: self._site(path) for path in self._adaptive_sites}

    def set_select(
        self, rule: str | None = None, *, sites: list[str] | None = None, **value: float
    ) -> Setting:
        """Select experts by `rule` from now on; as a context manager, until its end.

        It holds for the model, so for every thread; `generate(compute=x)` holds for one call alone.

        Args:
            rule: "all", "top-k" (k), "dynamic-k" (tau), "threshold" (threshold) or "top-p" (p); of
                mixtures with null experts "null" (bias, the stored one when not given), "all" (as
                without null experts) or "top-k" of the real ones; None goes back to what the
                configuration says.
            sites: paths it holds for; all when not given, and then a k above a site's number of
                experts runs all of them there.
            value: the rule's value by its name.

        Raises:
            ValueError: unknown rule, site or value.
        """
        runtime = self.adaptive_runtime
        before = runtime.kept()
        if rule is None:
            runtime.knobs = {}
            return Setting(runtime, before)
        if not runtime.sites:
            raise AdaptiveConfigError(_NO_EXPERTS)
        select = {"rule": rule, **value}
        unknown = sorted(set(sites or ()) - set(self._adaptive_sites))
        if unknown:
            raise AdaptiveConfigError(f"no such site: {', '.join(unknown)}")
        specs = {path: site.adaptive_spec for path, site in self.adaptive_sites().items()}
        counts = {path: spec["experts"]["count"] for path, spec in specs.items()}
        for path in sites or counts:
            most = counts[path] if sites else max(counts.values())
            check_select(f"set_select at {path}", select, most, mixture="mixture" in specs[path])
        if set(value) - {RULES[rule]}:
            raise AdaptiveConfigError(
                f"{rule} takes {RULES[rule] or 'no value'}, not {sorted(value)}"
            )
        runtime.knobs = (
            {"*": select} if sites is None else {**before[0], **dict.fromkeys(sites, select)}
        )
        return Setting(runtime, before)

    def set_compute(self, compute: float | None) -> Setting:
        """Spend at most this fraction of the reference's FLOPs per token from now on.

        Args:
            compute: fraction above 0; 1 runs every expert, or, in a mixture with null experts, what
                it runs without them; None goes back to what the configuration says. See
                `adaptive_knobs.knobs_for`.

        Raises:
            ValueError: out of reach; the message gives the range.
        """
        runtime = self.adaptive_runtime
        before = runtime.kept()
        adaptive = self.config.adaptive  # type: ignore[attr-defined]
        runtime.knobs = {} if compute is None else knobs_for(adaptive, compute)
        return Setting(runtime, before)

    def prepare_decoding(self, *, in_place: bool = False) -> int:
        """Lay matrices out so that decoding one sequence on the CPU reads only chosen neurons.

        Costs a third more memory for the feed-forward networks, or none with `in_place`, which
        slows short prompts down. Values, names and what is saved stay. Call it again after the
        weights have changed.

        Returns:
            How many matrices were laid out.
        """
        return prepare(self, in_place=in_place)

    @contextmanager
    def account(self) -> Iterator[Account]:
        """Count what the forward passes inside the body do."""
        static_flops, static_bytes = static_costs(self, self._own_modules() | exit_modules(self))
        reference = self.config.adaptive["reference"]  # type: ignore[attr-defined]
        made = Account(static_flops=static_flops, static_bytes=static_bytes, reference=reference)
        made.block_costs = block_costs(self, self._own_modules())
        with self.adaptive_runtime.watching(account=made):
            yield made

    @contextmanager
    def collect(self, *names: str) -> Iterator[dict[str, Any]]:
        """Collect what sites find in the forward passes inside the body.

        "router_scores": [T, E] of the real tokens, with their gradients; of mixtures with null
        experts the margins, [T, J]. Of these alone "experts_run": [T] how many real experts the
        real tokens run, and "decisions": the `Decision` on all tokens, padding as well. Of linears
        with routed adapters "adapter_logits": [T, E] of the real tokens, by the site that holds the
        router; a router for every block has one entry for each. Of blocks that tokens may skip
        "depth": `DepthSeen`.

        Yields:
            path -> list, one entry per pass; of several names, name -> path -> list.
        """
        if not names or set(names) - _COLLECTED:
            raise ValueError(f"cannot collect {names}; known: {', '.join(sorted(_COLLECTED))}")
        kept: dict[str, dict[str, list[Any]]] = {name: {} for name in names}
        with self.adaptive_runtime.watching(collected=kept):
            yield kept[names[0]] if len(names) == 1 else kept

    # -- what transformers calls

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as the stock class does, and refuse a model whose adaptive part did not load.

        Raises:
            AdaptiveConfigError: tensors of a site are missing, or quantisation replaced a site.
        """
        wanted = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(info["missing_keys"])
        # a class the checkpoint was not written for brings a head of its own
        if cls.__name__ not in (model.config.architectures or [cls.__name__]):
            missing = [key for key in missing if model._is_of_a_site(key)]
        if missing:
            raise AdaptiveConfigError(f"the checkpoint lacks {', '.join(missing[:5])}")
        for path in model._adaptive_sites:
            if not isinstance(model._site(path), SITES):
                raise AdaptiveConfigError(
                    f"{path} was replaced while loading; its experts are lost"
                )
        model._check_adapters()
        return (model, info) if wanted else model

    def _init_weights(self, module: nn.Module) -> None:
        if not init_part(module):
            super()._init_weights(module)  # type: ignore[misc]

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        given = gradient_checkpointing_func or torch.utils.checkpoint.checkpoint
        if enable and getattr(given, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "adaptive models need use_reentrant=False: the reentrant form runs the first pass "
                "without gradients, so router losses would get none"
            )
        super()._set_gradient_checkpointing(  # type: ignore[misc]
            enable=enable, gradient_checkpointing_func=checkpointed(given), **kwargs
        )

    # -- inside

    def _own_modules(self) -> set[int]:
        """Return the ids of the modules that sites and adapters on their matrices are made of."""
        inside: set[int] = set()
        for site in self.adaptive_sites().values():
            own = [getattr(site, name) for name in site.adaptive_spec["weights"].values()]
            parts = site.adaptive_spec.get("mixture", {})
            own += [getattr(site, parts[role]) for role in ("router", "experts") if role in parts]
            if "down_path" in site.adaptive_spec:
                own.append(self._at(site.adaptive_spec["down_path"]))
            # an adapter wraps the matrix it adapts
            inside |= {id(part) for child in own for part in child.modules()}
        return inside

    def _is_of_a_site(self, key: str) -> bool:
        """Return whether a tensor is one that the stock model does not have."""
        if ".null_experts." in key or key.endswith(".neuron_order"):
            return True
        named: Any = self.named_modules()  # type: ignore[attr-defined]
        new = [
            name
            for name, module in named
            if isinstance(module, Router | Depth | Residual)
            or getattr(module, "adaptive_slot", None) == "linear"
        ]
        return any(key.startswith(f"{name}.") for name in new)

    def _site(self, path: str) -> Any:
        return self._at(path)

    def _at(self, path: str) -> Any:
        prefix = self.base_model_prefix  # type: ignore[attr-defined]
        bare = bool(prefix) and not hasattr(self, prefix)
        return self.get_submodule(path.removeprefix(f"{prefix}.") if bare else path)  # type: ignore[attr-defined]


def _register_names(name: str, base: Any) -> None:
    """Give the class the stock one's names on disk, where they differ from those in memory."""
    own_type = f"{_PREFIX.lower()}_{base.config_class.model_type}"
    for stock, own in ((base.__name__, name), (base.config_class.model_type, own_type)):
        mapping = get_checkpoint_conversion_mapping(stock)
        if mapping is not None:
            register_checkpoint_conversion_mapping(own, mapping, overwrite=True)


def _register_backbone(config_class: Any, base: Any) -> None:
    """Let stock heads that build their backbone through AutoModel build the stock one."""
    found: Any = transformers.MODEL_MAPPING.get(base.config_class, None)
    backbone = found[0] if isinstance(found, tuple) else found
    if backbone is not None and config_class not in transformers.MODEL_MAPPING:
        transformers.MODEL_MAPPING.register(config_class, backbone)


def _make(name: str) -> type:
    base: Any = getattr(transformers, name.removeprefix(_PREFIX), None)
    if base is None or not issubclass(base, transformers.PreTrainedModel):
        raise AttributeError(f"transformers has no model {name.removeprefix(_PREFIX)}")
    bases: tuple[type, ...] = (AdaptiveMixin, base)
    if issubclass(base, GenerationMixin):
        bases = (AdaptiveMixin, GeneratingMixin, base, GenerationMixin)
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "config_class": made_config(f"{_PREFIX}{base.config_class.__name__}"),
        "forward": forward_of(base.forward),
        "adaptive_stock_forward": staticmethod(base.forward),
        # a rounded router chooses other experts
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), "router"},
    }
    made = type(name, bases, body)
    _register_names(name, base)
    _register_backbone(body["config_class"], base)
    auto = next((auto for end, auto in _AUTO.items() if name.endswith(end)), None)
    if auto is not None:
        made.register_for_auto_class(auto)  # type: ignore[attr-defined]
    return made


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX) and name[len(_PREFIX) :][:1].isupper():
        if name not in _MADE:
            _MADE[name] = _make(name)
        return _MADE[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
