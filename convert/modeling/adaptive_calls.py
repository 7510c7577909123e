"""How a forward pass gets its call, in the whole model and in the backbone inside it.

A model and its backbone share one `Runtime`: whoever of the two is called first makes the call, so
`model.model(...)` obeys the model's knobs, knows its padding and is counted like `model(...)`.
A feed-forward network that is called by itself, outside any forward pass, runs what the
configuration says.

Shapes: B sequences, S positions of a pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adaptive_context import Call, current, entered
from .adaptive_costs import attention_flops, is_causal, patches
from .adaptive_knobs import DEPTH, EXITS, Knobs
from .adaptive_leaving import leaving_forward
from .adaptive_linear import outside_of_blocks
from .adaptive_masks import seen_lengths, token_mask_of

_INPUTS = ("input_ids", "inputs_embeds", "pixel_values")
_KNOBS: ContextVar[tuple[int, Knobs] | None] = ContextVar("adaptive_knobs", default=None)
_WATCH: ContextVar[dict[int, dict[str, Any]] | None] = ContextVar("adaptive_watch", default=None)


class Runtime:
    """What the passes of one model have in common.

    Attributes:
        knobs: selections that override the configuration's, set for the model.
        sites: paths of what chooses experts.
        adapted: paths of the linears with routed adapters; without these and sites, passes make no
            call.
        adapters: selection that overrides the configuration's at them, None for none.
        exits: the checked `config.adaptive.model.exits`, None for none.
        leave: rule of leaving at them that overrides the configuration's; {} for never, None for
            what is configured.
        routed: paths of the blocks that tokens may skip.
        depth: rule of skipping that overrides the configuration's, None for none.
    """

    def __init__(self) -> None:
        self.knobs: Knobs = {}
        self.sites: tuple[str, ...] = ()
        self.adapted: tuple[str, ...] = ()
        self.adapters: Mapping[str, Any] | None = None
        self.exits: Mapping[str, Any] | None = None
        self.leave: Mapping[str, Any] | None = None
        self.routed: tuple[str, ...] = ()
        self.depth: Mapping[str, Any] | None = None

    def kept(self) -> tuple[Any, ...]:
        """Return what is set, for `restore`."""
        return self.knobs, self.adapters, self.leave, self.depth

    def restore(self, kept: tuple[Any, ...]) -> None:
        """Set what was set when `kept` was asked for."""
        self.knobs, self.adapters, self.leave, self.depth = kept

    def leaving(self) -> Mapping[str, Any] | None:
        """Return the rule by which tokens leave at exits, None when none ever does."""
        if self.exits is None:
            return None
        override = _KNOBS.get()
        mine = override is not None and override[0] == id(self)
        knobs = override[1] if mine and override is not None else self.knobs
        rule = knobs.get(EXITS, self.leave)
        if rule is not None and not rule:
            return None
        # a row of calibration says what it was measured with, and no more
        rule = {**self.exits["decide"], "kv": self.exits["kv"], **(rule or {})}
        if rule["measure"] == "patience":
            return rule if rule["patience"] < len(self.exits["heads"]) else None
        return rule if any(level is not None for level in rule["thresholds"]) else None

    @contextmanager
    def overridden(self, knobs: Knobs) -> Iterator[None]:
        """Run the body with other knobs, in this thread alone."""
        token = _KNOBS.set((id(self), knobs))
        try:
            yield
        finally:
            _KNOBS.reset(token)

    @contextmanager
    def watching(self, **what: Any) -> Iterator[None]:
        """Run the body with an `account`, or with `collected` lists, in this thread alone."""
        watch = _WATCH.get() or {}
        mine = {**watch.get(id(self), {}), **what}
        token = _WATCH.set({**watch, id(self): mine})
        try:
            yield
        finally:
            _WATCH.reset(token)

    def call(self, config: Any, inputs: Mapping[str, Any], *, training: bool) -> Call:
        """Return the call of one forward pass over bound arguments."""
        given = next((inputs[n] for n in _INPUTS if inputs.get(n) is not None), None)
        batch = positions = 0
        if isinstance(given, Tensor) and given.dim() in (2, 3):
            batch, positions = given.shape[:2]
        mask = inputs.get("attention_mask")
        cached = _cached(inputs.get("past_key_values"))
        override = _KNOBS.get()
        watch = (_WATCH.get() or {}).get(id(self), {})
        phase = "decode" if positions == 1 and cached else "prefill"
        real = token_mask_of(mask, positions, cached=cached, batch=batch) if positions else None
        knobs = override[1] if override and override[0] == id(self) else self.knobs
        call = Call(
            owner=self,
            token_mask=real,
            phase="train" if training else phase,
            knobs=knobs,
            account=watch.get("account"),
            collected=watch.get("collected", {}),
            adapters=self.adapters,
            depth=knobs.get(DEPTH, self.depth),
        )
        if call.account is not None and isinstance(given, Tensor):
            call = replace(call, seen=_count_tokens(call, config, given, mask, cached))
        return call


def _cached(cache: Any) -> int:
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if length is not None else 0


def _count_tokens(call: Call, config: Any, given: Tensor, mask: Any, cached: int) -> Tensor:
    """Count the tokens of a pass; return how many positions each sees, int64 [B, S]."""
    assert call.account is not None
    positions = given.shape[1] if given.dim() < 4 else patches(config, given)
    real = torch.ones(given.shape[0], positions, dtype=torch.bool)
    if call.token_mask is not None:
        real = call.token_mask.cpu()
    lengths = seen_lengths(real, mask, cached, causal=is_causal(config))
    call.account.tokens += int(real.sum())
    call.account.attention_flops += attention_flops(config, lengths[real])
    return lengths


def forward_of(stock: Any) -> Any:
    """Return the stock forward inside its call, with the stock signature."""
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        runtime: Runtime = self.adaptive_runtime
        busy = runtime.sites or runtime.adapted or runtime.exits or runtime.routed
        if not busy or current().owner is runtime:
            return stock(self, *args, **kwargs)
        inputs = signature.bind_partial(self, *args, **kwargs).arguments if args else kwargs
        call = runtime.call(self.config, inputs, training=self.training)
        run = functools.partial(stock, self)
        if runtime.exits is not None:
            inputs = signature.bind_partial(self, *args, **kwargs).arguments
            run = functools.partial(leaving_forward, self, stock, dict(inputs))
        with outside_of_blocks(), entered(call):
            return run(*args, **kwargs)

    return forward


class AdaptiveBackbone:
    """Mixed into the stock backbone of an adaptive model: called by itself, it is the model's."""

    adaptive_runtime: Runtime

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock: Any = cls.__bases__[1]
        cls.forward = forward_of(stock.forward)  # type: ignore[attr-defined]
