"""A linear with routed adapters, as PEFT holds one; see `modeling.adaptive_adapters` for the math.

Several adapter sets may be active at once: inputs are scaled by all that scale inputs, and each
then adds to, or scales, what came out before it. Every one reads the input as it came.

Shapes: T tokens, n inputs and m outputs of the linear, E adapters of rank r.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from adaconvert.adapters.config import MoloraConfig
from adaconvert.adapters.merging import Part, merged, why_not
from adaconvert.errors import OptionError
from adaconvert.modeling.adaptive_adapters import (
    Gates,
    add_adapters,
    gates_of,
    logits_of,
    scale_by,
)
from adaconvert.modeling.adaptive_linear import Read, Reader, read, sizes_of


class Site(NamedTuple):
    """What an adapter set does at one linear.

    Attributes:
        config: the set's own; a change of its `select` counts from the next token on.
        on_input: of "ia3": the input is scaled.
        width: of what the router held here reads, None where another linear holds it or none is.
        reads: name of the router that the block computes, None for a router of this linear.
    """

    config: MoloraConfig
    on_input: bool = False
    width: int | None = None
    reads: str | None = None


class MoloraLinear(nn.Module, BaseTunerLayer):
    """`base_layer` with adapter sets by name.

    Attributes:
        sites: name of an adapter set -> what it does here.
        molora_A: name -> [E, r, n], or [1, r, n] where shared.
        molora_B: name -> [E, m, r].
        molora_vectors: name -> [E, n or m], float32.
        molora_router: name -> [E, width], float32.
    """

    molora_A: nn.ParameterDict  # noqa: N815
    molora_B: nn.ParameterDict  # noqa: N815
    molora_vectors: nn.ParameterDict
    molora_router: nn.ParameterDict
    adapter_layer_names = ("molora_A", "molora_B", "molora_vectors", "molora_router")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.sites: dict[str, Site] = {}
        self.handles: dict[str, list[Any]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        sizes = sizes_of(base_layer)
        assert sizes is not None
        self.in_features, self.out_features = sizes

    def update_layer(self, name: str, site: Site) -> None:
        """Add the adapter set `name`; it changes nothing yet."""
        config, device, dtype = site.config, *self._kind()
        count, rank = config.num_experts, config.r
        made: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        wide = torch.promote_types(dtype, torch.float32)
        if config.experts_kind == "lora":
            first = 1 if config.share == "a" else count
            made["molora_A"] = ((first, rank, self.in_features), dtype)
            made["molora_B"] = ((count, self.out_features, rank), dtype)
        else:
            size = self.in_features if site.on_input else self.out_features
            made["molora_vectors"] = ((count, size), wide)
        if site.width is not None:
            made["molora_router"] = ((count, site.width), wide)
        for kind, (shape, held) in made.items():
            values = torch.zeros(shape)
            if kind in ("molora_A", "molora_router"):
                values.normal_(std=config.init_std)
            getattr(self, kind)[name] = nn.Parameter(values.to(device=device, dtype=held))
        self.sites[name] = site
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def attach(self, name: str, readers: dict[str, nn.Module]) -> None:
        """Let blocks compute the router that this linear holds for others.

        Args:
            name: of the adapter set.
            readers: path -> block.
        """
        reads = self.sites[name].reads
        assert reads is not None
        found = Reader(reads, BlockLogits(self, name))
        self.handles[name] = [one for block in readers.values() for one in found.attach(block)]

    def detach(self, name: str) -> None:
        """Let no block compute the router of `name` any more."""
        for handle in self.handles.pop(name, []):
            handle.remove()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget the adapter set, and what its blocks compute for it."""
        self.detach(adapter_name)
        super().delete_adapter(adapter_name)
        self.sites.pop(adapter_name, None)

    def is_used(self, name: str) -> bool:
        """Return whether the adapter set counts in a forward now."""
        idle = self.disable_adapters or self.merged
        return not idle and name in self.active_adapters and name in self.sites

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the linear's output with its active adapter sets, [..., n] -> [..., m]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if self.is_used(name)]
        if not names:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        flat = x.reshape(-1, x.shape[-1])
        gates = {name: self._gates(name, flat) for name in names}
        inner = flat
        for name in names:
            if self.sites[name].on_input:
                inner = scale_by(inner, gates[name], self.molora_vectors[name])
        out: Tensor = self.base_layer(inner.reshape(x.shape), *args, **kwargs)
        wide = out.reshape(-1, out.shape[-1])
        for name in names:
            wide = self._after(name, flat, wide, gates[name])
        return wide.reshape(out.shape)

    def _gates(self, name: str, x: Tensor) -> Gates:
        site = self.sites[name]
        router, count = site.config.router, site.config.num_experts
        if router["kind"] == "none" or site.config.select["rule"] == "uniform":
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            return gates_of(x.new_zeros(x.shape[0], count, dtype=wide), {"rule": "uniform"})
        if site.reads is None:
            found = Read(self.logits(name, x))
        else:
            found = read(site.reads)
            if found.logits.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"a linear got {x.shape[0]} tokens and its block, which routes for it, "
                    f"{found.logits.shape[0]}"
                )
        lora = site.config.experts_kind == "lora"
        by_kernels = lora and site.config.share is None
        return found.gates(site.config.select, x.device, plan=by_kernels)

    def logits(self, name: str, x: Tensor) -> Tensor:
        """Return the logits of the router held here, [..., width] -> [..., E]."""
        router = self.sites[name].config.router
        settings = {key: router[key] for key in ("score", "norm", "scale")}
        return logits_of(x, self.molora_router[name].to(x.device), **settings)

    def _after(self, name: str, x: Tensor, out: Tensor, gates: Gates) -> Tensor:
        site = self.sites[name]
        if site.config.experts_kind == "lora":
            read_by = functional.dropout(x, site.config.dropout, self.training)
            factors = {"a": self.molora_A[name], "b": self.molora_B[name]}
            return add_adapters(read_by, out, gates, **factors, scaling=site.config.scalings())
        return out if site.on_input else scale_by(out, gates, self.molora_vectors[name])

    def check_merge(self, name: str) -> None:
        """Return only when the adapter set can become part of the matrix.

        Raises:
            OptionError: it depends on the token, or the matrix is packed.
        """
        reason = why_not(self.sites[name].config)
        hint = "set_routing(model, 'uniform') weighs all alike, which is another function."
        if reason is None and not self.weight.is_floating_point():
            reason = "the base is quantised"
            hint = "Load the base without quantisation to merge into it."
        if reason is not None:
            raise OptionError(f"cannot be merged: {reason}", where=f"adapter '{name}'", hint=hint)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapter sets part of the matrix; `unmerge` brings back the very bits it had.

        Args:
            safe_merge: refuse a result that is not finite.
            adapter_names: the active ones when None.

        Raises:
            OptionError: they cannot be merged.
        """
        names = [
            name for name in check_adapters_to_merge(self, adapter_names) if name in self.sites
        ]
        for name in names:
            self.check_merge(name)
        if not names:
            return
        base: Any = self.get_base_layer()
        if not self.merged:
            # the matrix itself, not a copy; buffers move with the module
            self.register_buffer("kept_weight", base.weight.data, persistent=False)
            bias = None if base.bias is None else base.bias.data
            self.register_buffer("kept_bias", bias, persistent=False)
        parts = [self._part(name) for name in (*self.merged_adapters, *names)]
        weight, bias = self._merged(parts)
        if safe_merge and not bool(weight.isfinite().all()):
            if not self.merged:
                self._drop_kept()
            raise OptionError("what merging gives is not finite", where=f"adapter {names}")
        base.weight.data = weight
        if base.bias is not None:
            base.bias.data = bias
        self.merged_adapters = [*self.merged_adapters, *names]

    def _merged(self, parts: list[Part]) -> tuple[Tensor, Tensor | None]:
        kept: Any = self.kept_weight
        bias: Any = self.kept_bias
        turned = isinstance(self.get_base_layer(), Conv1D)
        with torch.no_grad():
            weight, bias = merged(kept.T if turned else kept, bias, parts)
        return (weight.T.contiguous() if turned else weight), bias

    def unmerge(self) -> None:
        """Give the matrix back what it was before anything was merged."""
        if not self.merged:
            return
        base: Any = self.get_base_layer()
        base.weight.data = self.kept_weight
        if base.bias is not None:
            base.bias.data = self.kept_bias
        self._drop_kept()
        self.merged_adapters = []

    def _drop_kept(self) -> None:
        del self.kept_weight, self.kept_bias

    def _part(self, name: str) -> Part:
        site = self.sites[name]
        held = [
            getattr(self, kind).get(name, None)
            for kind in ("molora_A", "molora_B", "molora_vectors")
        ]
        return Part(site.config, site.on_input, *held)

    def _kind(self) -> tuple[torch.device, torch.dtype]:
        """Return device and dtype that adapters of this linear have when they are made."""
        base: Any = self.get_base_layer()
        dtype = base.weight.dtype
        if not dtype.is_floating_point:
            # packed: what the linear computes in, where it says so
            dtype = getattr(base, "compute_dtype", None) or torch.float32
        return base.weight.device, dtype

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter set beside the matrix; its dtypes stay."""
        where = self._kind()[0] if device is None else device
        if where.type == "meta":
            return
        for kind in self.adapter_layer_names:
            held = getattr(self, kind)
            if adapter_name in held and not held[adapter_name].is_meta:
                held[adapter_name].data = held[adapter_name].data.to(where)

    def __repr__(self) -> str:
        return "molora." + super().__repr__()


class BlockLogits:
    """The logits that a linear's router gives a block; what a `Reader` calls.

    Args:
        owner: the linear that holds the router.
        name: of the adapter set.
    """

    def __init__(self, owner: MoloraLinear, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, x: Tensor) -> Tensor | None:
        """Return [..., d] -> [..., E], None while the adapter set is not used."""
        owner, name = self.owner, self.name
        if not owner.is_used(name) or owner.sites[name].config.select["rule"] == "uniform":
            return None
        return owner.logits(name, x)
