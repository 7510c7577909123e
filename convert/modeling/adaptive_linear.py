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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .adaptive_adapters import AdapterRouter, Gates, RoutedAdapters, gates_of, planned
from .adaptive_context import Call, SiteAccount, current
from .adaptive_schema import AdaptiveConfigError

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
#: name of a router -> its logits in the block that runs; "" -> what held outside of it; "block" ->
#: the block, by which what an interrupted pass left is known.
_READ: ContextVar[Mapping[str, Any] | None] = ContextVar("adaptive_read", default=None)


def block_of(path: str) -> str | None:
    """Return the path of the block a module is in: up to its first number; None for no block."""
    found = _BLOCK.match(path)
    return None if found is None else found.group()


class Read:
    """What a router says of the input of the block that runs.

    Attributes:
        logits: [T, E].
    """

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits.reshape(-1, logits.shape[-1])
        self._made: dict[tuple[object, ...], Gates] = {}

    def again(self) -> Read:
        """Return the same with nothing made of it, as recomputation repeats every operation."""
        return Read(self.logits)

    def gates(self, select: Mapping[str, Any], device: torch.device, *, plan: bool) -> Gates:
        """Return the gates of a rule, made once for the linears that share them.

        Args:
            select: the rule and its value.
            device: of the linear.
            plan: kernels are to run them.
        """
        # what was made without gradients has none to give
        key = (*sorted(select.items()), device, plan, torch.is_grad_enabled())
        found = self._made.get(key)
        if found is None:
            found = gates_of(self.logits.to(device), select)
            found = self._made[key] = planned(found, self.logits.shape[1]) if plan else found
        return found


def read(name: str) -> Read:
    """Return what the router `name` says in the block that runs.

    Raises:
        RuntimeError: no block that it reads is running.
    """
    known = _READ.get()
    if known is None or name not in known:
        raise RuntimeError(
            f"a linear whose adapters are routed by its block ({name}) was called outside the block"
        )
    found: Read = known[name]
    return found


@contextmanager
def outside_of_blocks() -> Iterator[None]:
    """Run a whole model: it sees no blocks of others, and leaves none of its own, whatever ends it.

    A hook of a block is not called when the block is left by KeyboardInterrupt.
    """
    token = _READ.set(None)
    try:
        yield
    finally:
        _READ.reset(token)


def _around(block: nn.Module, name: str) -> Mapping[str, Any] | None:
    """Return what holds where `block` is entered, without what an earlier pass of it left."""
    outer = known = _READ.get()
    while known is not None:
        # a block is never inside itself
        if known["block"] is block and known["name"] == name:
            outer = known[""]
        known = known[""]
    return outer


class Reader:
    """Computes a router's logits when a block is entered; hooks of the block.

    Args:
        name: the router is known by.
        logits: [..., d] -> [..., E], or None while nobody asks.
        obeys: the call it runs in is one of its model, and may override the rule.
    """

    def __init__(self, name: str, logits: Any, *, obeys: bool = False) -> None:
        self.name, self.logits, self.obeys = name, logits, obeys

    def attach(self, block: nn.Module) -> list[Any]:
        """Return the handles of the hooks `block` has now."""
        return [
            block.register_forward_pre_hook(self.enter, with_kwargs=True),
            block.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, block: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Keep the logits of the block's input.

        Raises:
            ValueError: the block is checkpointed in the reentrant form.
        """
        given = getattr(block, "_gradient_checkpointing_func", None)
        if given is not None and not hasattr(given, "adaptive_carries"):
            block._gradient_checkpointing_func = carried(given)  # type: ignore[assignment]
        outer = _around(block, self.name)
        known = {**(outer or {}), "": outer, "block": block, "name": self.name}
        known.pop(self.name, None)
        override = current().adapters if self.obeys else None
        if (override or {}).get("rule") != "uniform":
            x = args[0] if args else kwargs["hidden_states"]
            logits = self.logits(x)
            if logits is not None:
                known[self.name] = Read(logits)
        _READ.set(known)

    def leave(self, block: nn.Module, args: Any, output: Any) -> None:
        """Forget them."""
        known = _READ.get()
        _READ.set(None if known is None else known[""])


def carried(inner: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpoint function whose recomputation knows what routers said in its first run.

    Since transformers 5.23 hooks of a block are no part of what is recomputed.

    Args:
        inner: (function, *args) -> output, maybe from `adaptive_context.checkpointed`.

    Raises:
        ValueError: it is the reentrant form, whose first run has no gradients to send routers.
    """
    if getattr(inner, "keywords", {}).get("use_reentrant"):
        raise ValueError("routers of blocks need use_reentrant=False")

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        known = _READ.get()

        def segment(*a: Any, **k: Any) -> Any:
            token = _READ.set(_afresh(known))
            try:
                return function(*a, **k)
            finally:
                _READ.reset(token)

        return inner(segment, *args, **kwargs)

    run.adaptive_carries = True  # type: ignore[attr-defined]
    return run


def _afresh(known: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if known is None:
        return None
    return {name: v.again() if isinstance(v, Read) else v for name, v in known.items()}


class AdaptiveLinear(nn.Module):
    """What a linear with routed adapters becomes; mixed into its class.

    Attributes:
        adapters: RoutedAdapters.
        router: AdapterRouter, None where another site's decides.
        adaptive_first: it is the first linear of its block that takes these gates, so it counts
            and collects for all.
    """

    adaptive_slot = "linear"
    adaptive_path: str
    adaptive_spec: Mapping[str, Any]
    adapters: RoutedAdapters
    router: AdapterRouter | None
    adaptive_first: bool

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
        self.adaptive_first = spec["router"].get("reads") == "module"
        self.adapters = RoutedAdapters(adapters, dtype=own.weight.dtype, device=own.weight.device)
        router = spec["router"]
        owns = router["kind"] == "linear" and router.get("of") in (None, path)
        # made on the device of the weight, which may be meta
        with torch.device(own.weight.device):
            reads = adapters["input"] if router.get("reads") == "module" else router.get("input")
            self.router = AdapterRouter(reads, adapters["count"], router) if owns else None

    def forward(self, x: Tensor) -> Tensor:
        call = current()
        flat = x.reshape(-1, x.shape[-1])
        gates = self._gates(call, flat)
        inner = self.adapters.before(flat, gates).reshape(x.shape)
        out: Tensor = super().forward(inner)
        if call.account is not None and not call.recomputing:
            self._count(call, gates, flat)
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
            found = Read(self.router(x))
        else:
            found = read(router["of"])
            tokens = found.logits.shape[0]
            if tokens != x.shape[0]:
                raise RuntimeError(
                    f"{self.adaptive_path} got {x.shape[0]} tokens and its block {tokens}"
                )
        self._collect(call, found.logits)
        return found.gates(select, x.device, plan=self.adapters.takes_plans)

    def _collect(self, call: Call, logits: Tensor) -> None:
        kept = call.collected.get("adapter_logits")
        if kept is None or not self.adaptive_first:
            return
        real = call.flat_mask(logits.shape[0])
        logits = logits if real is None else logits[real]
        owner = self.adaptive_spec["router"].get("of") or self.adaptive_path
        # recomputation must repeat every operation, so only the keeping is left out there
        if not call.recomputing:
            kept.setdefault(owner, []).append(logits)

    def _count(self, call: Call, gates: Gates, x: Tensor) -> None:
        """Count one pass: a "neuron" is an adapter."""
        assert call.account is not None
        site = call.account.sites.get(self.adaptive_path)
        if site is None:
            site = call.account.sites[self.adaptive_path] = self._new_account()
        with torch.no_grad():
            weights = gates.dense(self.adapters.count)
        real = call.flat_mask(weights.shape[0])
        if real is not None:
            weights = weights[real]
        chosen = weights > 0
        uses = chosen.sum(dim=0).cpu()
        site.tokens += weights.shape[0]
        if (call.adapters or self.adaptive_spec["select"])["rule"] != "uniform":
            site.routed_tokens += weights.shape[0]
        site.neurons += int(uses.sum())
        few = self.adapters.runs_selected(x, gates)
        site.executed += int(uses.sum()) if few else weights.numel()
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
        # of a router for several linears the first one of the block pays
        asked = self.adaptive_spec["router"].get("input", spec["input"])
        router = spec["count"] * asked if self.adaptive_first else 0
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

    Raises:
        AdaptiveConfigError: a site is in no block, or the router it names is not there.
    """
    wanted: dict[tuple[str, str], AdapterRouter] = {}
    for path, site in sites.items():
        router, block = site.adaptive_spec["router"], block_of(path)
        if router["kind"] != "linear" or router["reads"] == "module":
            continue
        owner = sites.get(router["of"])
        if block is None:
            raise AdaptiveConfigError(f"site {path!r} is in no block whose input could be read")
        if owner is None or owner.router is None:
            raise AdaptiveConfigError(
                f"site {path!r} takes the router of {router['of']!r}, which has none"
            )
        site.adaptive_first = (block, router["of"]) not in wanted
        wanted[block, router["of"]] = owner.router
    for (block, name), made in wanted.items():
        Reader(name, made, obeys=True).attach(model.get_submodule(block.removeprefix(prefix)))
