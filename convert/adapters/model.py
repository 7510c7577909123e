"""The PEFT tuner of routed adapters: which linears get them, and who holds their routers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from adaconvert.adapters import checks
from adaconvert.adapters.config import MoloraConfig
from adaconvert.adapters.layer import MoloraLinear, Site
from adaconvert.errors import OptionError
from adaconvert.io import fingerprint
from adaconvert.modeling.adaptive_linear import block_of, outside_of_blocks
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError, check_gates

_TARGETS = {
    kind: list(names) for kind, names in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.items()
}


class MoloraModel(BaseTuner):
    """A model whose linears have routed adapters."""

    prefix = "molora_"
    tuner_layer_cls = MoloraLinear
    target_module_mapping = _TARGETS

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Give every target its adapters, and blocks the routers they compute.

        Raises:
            OptionError: the name, or a target, cannot be taken; the model is unchanged then.
        """
        try:
            self._planned = self._plan(adapter_name, model)
        except OptionError:
            # transformers shares these configurations between tuners
            self.peft_config.pop(adapter_name, None)
            raise
        super().inject_adapter(
            model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict
        )
        _attach(model, adapter_name, self._planned)
        _recognise(self.peft_config[adapter_name], model, self._planned)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Run a forward pass.

        Raises:
            OptionError: every sequence of the batch was to have adapters of its own.
        """
        if kwargs.get("adapter_names") is not None:
            raise OptionError(
                "gives sequences of one batch different adapter sets, which routed adapters cannot",
                where="adapter_names",
                hint="Run one batch per set, with set_adapter between them.",
            )
        with outside_of_blocks():
            yield

    def _plan(self, adapter_name: str, model: nn.Module) -> dict[str, Site]:
        config = self.peft_config[adapter_name]
        checks.check_name(adapter_name, model)
        if config.target_modules is None:
            config = self._prepare_adapter_config(config, self.get_model_config(model))
        return _sites_of(config, adapter_name, model, checks.targets_of(config, model))

    def _create_and_replace(
        self,
        peft_config: MoloraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = target
        if not isinstance(layer, MoloraLinear):
            layer = MoloraLinear(target)
            self._replace_module(parent, target_name, layer, target)
        layer.update_layer(adapter_name, self._planned[current_key])

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapter sets into the matrices; nothing is merged unless all can be.

        Raises:
            OptionError: the gates of one depend on the token, or the base is quantised.
        """
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_mergeable(adapter_names)
        layers = list(layers_of(self.model).values())
        super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        for layer in layers:
            for name in list(layer.handles):
                layer.detach(name)
        return self.model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for layer in layers_of(self.model).values():
            names = layer.active_adapters if adapter_names is None else adapter_names
            for name in names:
                if name in layer.sites:
                    layer.check_merge(name)


def layers_of(model: nn.Module) -> dict[str, MoloraLinear]:
    """Return the linears that have routed adapters, by path."""
    return {
        path: module for path, module in model.named_modules() if isinstance(module, MoloraLinear)
    }


def set_routing(
    model: nn.Module, rule: str, *, adapter: str | None = None, **value: float | bool
) -> None:
    """Weigh routed adapters by another rule from now on; `save_pretrained` saves it.

    Args:
        model: of `get_peft_model`, or one with loaded adapters.
        rule: "soft", "uniform", "sigmoid", "top-k" (k) or "top-p" (p).
        adapter: name of the adapter set, all when None.
        value: the rule's value by its name, and `renormalize`.

    Raises:
        OptionError: unknown rule, value or name, or the adapters are merged.
    """
    found = [
        (layer, name, site.config)
        for layer in layers_of(model).values()
        for name, site in layer.sites.items()
        if adapter in (None, name)
    ]
    if not found:
        raise OptionError("has no routed adapters", where=f"set_routing: adapter {adapter!r}")
    select = {"rule": rule, **value}
    for layer, name, config in found:
        if name in layer.merged_adapters:
            raise OptionError("is merged", where=f"set_routing: adapter '{name}'")
        try:
            check_gates("select", select, config.num_experts)
        except AdaptiveConfigError as error:
            raise OptionError(str(error), where="set_routing") from error
    for _, _, config in found:
        config.select = dict(select)


def _sites_of(
    config: MoloraConfig, name: str, model: nn.Module, targets: Mapping[str, nn.Module]
) -> dict[str, Site]:
    """Return what an adapter set does at each of its linears, in the order of the model."""
    owners: dict[str, str] = {}
    found = {}
    for path, module in targets.items():
        on_input = config.feedforward_modules is not None and checks.is_named(
            config.feedforward_modules, path
        )
        own = config.router["kind"] == "linear"
        if not own or config.router["reads"] == "module":
            width = checks.inputs_of(module) if own else None
            found[path] = Site(config, on_input, width)
            continue
        block = checks.block_with(path)
        of = owners.setdefault("" if config.router["reads"] == "shared" else block, path)
        width = checks.hidden_size(model) if of == path else None
        found[path] = Site(config, on_input, width, f"{name}: {of}")
    return found


def _attach(model: nn.Module, name: str, sites: Mapping[str, Site]) -> None:
    """Let blocks compute the routers that linears share."""
    blocks: dict[str, dict[str, nn.Module]] = {}
    for path, site in sites.items():
        block = block_of(path)
        if site.reads is not None and block is not None:
            blocks.setdefault(site.reads, {})[block] = model.get_submodule(block)
    for path, site in sites.items():
        if site.reads is not None and site.width is not None:
            layer = model.get_submodule(path)
            assert isinstance(layer, MoloraLinear)
            layer.attach(name, blocks[site.reads])


def _recognise(config: MoloraConfig, model: nn.Module, paths: Mapping[str, Site]) -> None:
    """Record which base this is, or warn that it is another than the adapters were made for."""
    linears = {}
    for path in paths:
        layer = model.get_submodule(path)
        assert isinstance(layer, BaseTunerLayer)
        linears[path] = layer.get_base_layer()
    found = fingerprint.of_model(linears)
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif found is not None and found != config.base_fingerprint:
        warnings.warn(
            f"these adapters were made for another base: its fingerprint is "
            f"{config.base_fingerprint[:12]}, that of the model they are put on {found[:12]}. If "
            "it is the same base, cast to another dtype, nothing is wrong.",
            stacklevel=2,
        )
