"""Linears with routed adapters; see `adaptive_adapters` for what they compute.

A site keeps its place, its weight and bias. Beside them it holds `adapters`, and `router` unless it
takes the gates of another site's: a router reads the input of its own linear ("module"), or the
input of the block it is in ("layer", one router for a block's linears), or the input of every block
("shared", one router for the model). The last two are computed when a block is entered, and known
to its linears until it is left; nothing of it stays on a module.

Shapes: T tokens, E adapters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adaptive_adapters import AdapterRouter, Gates, RoutedAdapters, gates_of
from .adaptive_context import Call, SiteAccount, current
from .adaptive_schema import AdaptiveConfigError

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
#: name of a router -> its logits in the block that runs; "" -> what held outside of it.
_READ: ContextVar[Mapping[str, Any] | None] = ContextVar("adaptive_read", default=None)


def block_of(path: str) -> str | None:
    """Return the path of the block a module is in: up to its first number; None for no block."""
    found = _BLOCK.match(path)
    return None if found is None else found.group()


def read(name: str) -> Tensor:
    """Return the logits of the router `name` in the block that runs, [..., E].

    Raises:
        RuntimeError: no block that it reads is running.
    """
    known = _READ.get()
    if known is None or name not in known:
        raise RuntimeError(
            f"a linear whose adapters are routed by its block ({name}) was called outside the block"
        )
    found: Tensor = known[name]
    return found


class Reader:
    """Computes a router's logits when a block is entered; hooks of the block.

    Args:
        name: the router is known by.
        logits: [..., d] -> [..., E], or None to do nothing this time.
    """

    def __init__(self, name: str, logits: Any) -> None:
        self.name, self.logits = name, logits

    def attach(self, block: nn.Module) -> list[Any]:
        """Return the handles of the hooks `block` has now."""
        return [
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Keep the logits of the block's input."""
        outer = _READ.get()
        x = args[0] if args else kwargs["hidden_states"]
        _READ.set({**(outer or {}), "": outer, self.name: self.logits(x)})

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """Forget them."""
        known = _READ.get()
        _READ.set(None if known is None else known[""])


class AdaptiveLinear(nn.Module):
    """What a linear with routed adapters becomes; mixed into its class.

    Attributes:
        adapters: RoutedAdapters.
        router: AdapterRouter, None where another site's decides.
    """

    adaptive_slot = "linear"
    adaptive_path: str
    adaptive_spec: Mapping[str, Any]
    adapters: RoutedAdapters
    router: AdapterRouter | None

    def adaptive_init(self, path: str, spec: Mapping[str, Any]) -> None:
        """Put adapters beside the matrix.

        Raises:
            AdaptiveConfigError: the module is no linear of the sizes the spec has.
        """
        own: Any = self
        adapters = spec["adapters"]
        expected, found = (adapters["input"], adapters["output"]), sizes_of(self)
        if found != expected:
            raise AdaptiveConfigError(
                f"site {path!r} has adapters for a matrix of (inputs, outputs) {expected}, and "
                f"the module is {'one of ' + str(found) if found else 'no linear'}"
            )
        self.adaptive_path, self.adaptive_spec = path, spec
        self.adapters = RoutedAdapters(adapters, dtype=own.weight.dtype, device=own.weight.device)
        router = spec["router"]
        owns = router["kind"] == "linear" and router.get("of") in (None, path)
        # made on the device of the weight, which may be meta
        with torch.device(own.weight.device):
            reads = adapters["input"] if router["reads"] == "module" else router.get("input")
            self.router = AdapterRouter(reads, adapters["count"], router) if owns else None

    def forward(self, x: Tensor) -> Tensor:
        call = current()
        flat = x.reshape(-1, x.shape[-1])
        gates = self._gates(call, flat)
        inner = self.adapters.before(flat, gates).reshape(x.shape)
        out: Tensor = super().forward(inner)
        if call.account is not None and not call.recomputing:
            self._count(call, gates)
        wide = out.reshape(-1, out.shape[-1])
        return self.adapters.after(flat, wide, gates).reshape(out.shape)

    def _gates(self, call: Call, x: Tensor) -> Gates:
        select = call.adapters or self.adaptive_spec["select"]
        router = self.adaptive_spec["router"]
        count = self.adapters.count
        if select["rule"] == "uniform" or router["kind"] == "none":
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            return Gates(x.new_full((x.shape[0], count), 1 / count, dtype=wide))
        if router["reads"] == "module":
            assert self.router is not None
            logits = self.router(x)
        else:
            logits = read(router["of"]).reshape(-1, count).to(x.device)
            if logits.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"{self.adaptive_path} got {x.shape[0]} tokens and its block {logits.shape[0]}"
                )
        kept = call.collected.get("adapter_logits")
        if kept is not None and not call.recomputing and self.router is not None:
            real = call.flat_mask(x.shape[0])
            kept.setdefault(self.adaptive_path, []).append(logits if real is None else logits[real])
        return gates_of(logits, select)

    def _count(self, call: Call, gates: Gates) -> None:
        """Count one pass: a "neuron" is an adapter."""
        assert call.account is not None
        site = call.account.sites.get(self.adaptive_path)
        if site is None:
            site = call.account.sites[self.adaptive_path] = self._new_account()
        weights = gates.dense(self.adapters.count).detach()
        real = call.flat_mask(weights.shape[0])
        if real is not None:
            weights = weights[real]
        chosen = weights > 0
        uses = chosen.sum(dim=0).cpu()
        site.tokens += weights.shape[0]
        site.routed_tokens += weights.shape[0]
        site.neurons += int(uses.sum())
        site.executed += weights.shape[0] * self.adapters.count
        site.experts = uses if site.experts is None else site.experts + uses

    def _new_account(self) -> SiteAccount:
        spec = self.adaptive_spec["adapters"]
        size = self.adapters.__dict__["_parameters"]
        nbytes = next(iter(size.values())).element_size()
        shared, each = 0, 0
        if spec["kind"] == "lora":
            low, high = spec["rank"] * spec["input"], spec["rank"] * spec["output"]
            shared, each = (low, high) if spec.get("share") == "a" else (0, low + high)
        else:
            each = spec["input" if spec.get("on") == "input" else "output"]
        router = 0 if self.router is None else self.router.weight.numel()
        return SiteAccount(
            slot="adapters",
            neuron_flops=2 * each,
            router_flops=2 * router,
            gate_flops=2 * shared,
            neuron_bytes=each * nbytes,
            router_bytes=4 * router,
            gate_bytes=shared * nbytes,
        )


def sizes_of(module: Any) -> tuple[int, int] | None:
    """Return inputs and outputs of a linear, None of any other module; packed weights too."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features), int(module.out_features)
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return rows, columns
    return None


def attach_readers(model: nn.Module, sites: Mapping[str, AdaptiveLinear], prefix: str) -> None:
    """Let the blocks of a model compute the routers their linears share.

    Args:
        model: it and `sites` are filled.
        sites: path -> linear with adapters.
        prefix: left out of paths, for a backbone called by itself; may be empty.
    """
    wanted: dict[tuple[str, str], AdapterRouter] = {}
    for path, site in sites.items():
        router, block = site.adaptive_spec["router"], block_of(path)
        if router["kind"] != "linear" or router["reads"] == "module":
            continue
        owner = sites.get(router["of"])
        if owner is None or owner.router is None or block is None:
            raise AdaptiveConfigError(f"site {path!r} takes the router of {router['of']!r}")
        wanted[block, router["of"]] = owner.router
    for (block, name), made in wanted.items():
        Reader(name, made).attach(model.get_submodule(block.removeprefix(prefix)))
