"""Blocks that only some tokens run, each with its absolute position, in stock code.

A block gathers its tokens, runs the stock block on them and puts what it gives back in place. With
keys and values kept ("keep"), the others write theirs first and everyone attends to all; without
("skip", and mixture-of-depths, 2404.02258), tokens that run attend to one another alone. Which
tokens run is decided by each token's own hidden state, so that a text can be computed at once or
token by token; only rule "capacity" compares tokens of a sequence.

What a block changes is weighted: x + w (block(x) - x), with w = 1 + s tanh(r), r the router's logit
without its bias: 1 at the start.

Shapes: B sequences, S positions of a pass, C tokens that run (the most of a sequence), T real
tokens, d hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adaptive_context import Call, current
from .adaptive_depth_parts import Depth
from .adaptive_depth_pass import BlockPass, Decision


@dataclass(frozen=True)
class DepthSeen:
    """What a routed block decided in one pass.

    Attributes:
        logits: [T] of the router, with their gradient.
        predicted: [T] with what the predictor adds, None where there is none; of mixture-of-depths
            without one in training the router's own, whose gradient stays in the router.
        run: bool [T] who ran.
        scores: [B, S] the router's logits before padding was left out.
        soft: [T] of "skip" in training: the sigmoid whose gradient those that run have.
        inputs: [T, d] what the block received, without a gradient; None outside training.
        missed: [T] how far what skipped tokens run instead is from what the block changes: squared
            distance over its squared length, with a gradient for the adapter alone; None where no
            adapter learns, and outside training of "skip".
    """

    logits: Tensor
    predicted: Tensor | None
    run: Tensor
    scores: Tensor
    soft: Tensor | None = None
    inputs: Tensor | None = None
    missed: Tensor | None = None


class DepthLayer(nn.Module):
    """Mixed into a transformer block.

    Attributes:
        adaptive_layer: the checked "layer" slot.
        adaptive_layer_path: path of the block in the model.
        depth: router and adapter.
    """

    adaptive_layer: Mapping[str, Any]
    adaptive_layer_path: str
    depth: Depth

    def adaptive_init(self, path: str, spec: Mapping[str, Any]) -> None:
        """Make the parts a description asks for.

        Args:
            path: of the block in the model.
            spec: its "layer" slot.
        """
        self.__dict__["adaptive_layer"] = spec
        self.__dict__["adaptive_layer_path"] = path
        self.depth = Depth(spec)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the stock block on the tokens that run it.

        Args:
            hidden_states: [B, S, d].
            args, kwargs: of the stock block.
        """
        call = current()
        rule = _rule_of(self, call)
        stock = super().forward
        plain = rule["rule"] == "all" and not self.adaptive_layer["gate"]
        if plain and self.adaptive_layer["kv"] == "keep" and not _watched(call):
            return stock(hidden_states, *args, **kwargs)
        given = _bound(self, hidden_states, args, kwargs)
        real = call.flat_mask(hidden_states.shape[0] * hidden_states.shape[1])
        real = None if real is None else real.reshape(hidden_states.shape[:2])
        decision = self._decide(hidden_states, rule, real, call)
        passed = BlockPass(self, stock, hidden_states, given, decision, real, call)
        if decision.every and decision.mixing is None:
            return passed.all_run()
        return passed.mixed() if passed.computes_all else passed.some_run()

    def names(self) -> tuple[str, ...]:
        """Return the names of what the stock block takes, its hidden states first."""
        known: tuple[str, ...] | None = self.__dict__.get("adaptive_layer_names")
        if known is None:
            stock: Any = getattr(type(self), "adaptive_parts")[-1]  # noqa: B009
            known = tuple(inspect.signature(stock.forward).parameters)[1:]
            self.__dict__["adaptive_layer_names"] = known
        return known

    def _decide(
        self, x: Tensor, rule: Mapping[str, Any], real: Tensor | None, call: Call
    ) -> Decision:
        """Return who runs the block."""
        spec, name = self.adaptive_layer, rule["rule"]
        router = self.depth.router
        every = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if name in ("all", "none") and not spec["gate"] and "depth" not in call.collected:
            run = every if name == "all" else ~every
            run = run if real is None else run & real.to(run.device)
            return Decision(run, name == "all", looked=False)
        training = call.phase == "train" and spec["kind"] == "skip"
        training = training and name in ("threshold", "capacity")
        logits = router(x)
        predicted = None
        if router.predictor is not None:
            predicted = router.deciding(x, logits)
        elif spec["kind"] == "mod" and call.phase == "train" and "depth" in call.collected:
            predicted = router(x.detach())
        if name == "capacity":
            run = _best(logits.detach(), float(rule["capacity"]), real)
            edge: Tensor | float = _edge(logits.detach(), run)
        elif name == "threshold":
            deciding = logits if predicted is None else predicted
            edge = float(rule["threshold"])
            run = deciding.detach() > edge
        else:
            run = every if name == "all" else ~every
        if real is not None:
            run = run & real.to(run.device)
        soft = torch.sigmoid(logits - edge) if training else None
        if "depth" in call.collected:
            seen = DepthSeen(logits, predicted, run, logits, soft, x.detach())
            _collect(call, self.adaptive_layer_path, seen, real)
        weight = mixing = None
        if spec["gate"]:
            known = logits - router.bias.to(logits.dtype)
            weight = (1 + float(spec["gate"]) * torch.tanh(known)).to(x.dtype)[..., None]
        if soft is not None:
            mixing = (run.to(soft.dtype) + soft - soft.detach()).to(x.dtype)[..., None]
        whole = False
        if not torch.compiler.is_compiling():
            whole = bool((run if real is None else run | ~real.to(run.device)).all())
        looked = bool(spec["gate"]) or name not in ("all", "none")
        return Decision(run, whole, weight, mixing, looked)


def _rule_of(block: DepthLayer, call: Call) -> Mapping[str, Any]:
    """Return the rule of a block in a pass, its value a number."""
    rule, spec = call.depth, block.adaptive_layer
    if rule is None:
        # which tokens are the best of a sequence is what training asks
        if call.phase == "train" and spec["capacity"] is not None:
            return {"rule": "capacity", "capacity": spec["capacity"]}
        found: Mapping[str, Any] = spec["select"]
        return found
    value = next((rule[name] for name in ("threshold", "capacity") if name in rule), None)
    if not isinstance(value, Mapping):
        if value is None or spec["select"]["rule"] != "none":
            return rule
        # a number for all blocks brings none of those back that nobody runs
        dropped: Mapping[str, Any] = spec["select"]
        return dropped
    if block.adaptive_layer_path not in value:
        own: Mapping[str, Any] = spec["select"]
        return own
    return {"rule": rule["rule"], rule["rule"]: value[block.adaptive_layer_path]}


def _watched(call: Call) -> bool:
    return call.account is not None or "depth" in call.collected


def _best(logits: Tensor, capacity: float, real: Tensor | None) -> Tensor:
    """Return the best tokens of each sequence, bool [B, S], the earlier of two that are alike.

    Args:
        logits: [B, S].
        capacity: share of its real tokens, rounded up; at least one token.
        real: bool [B, S], None when all are.
    """
    if real is not None:
        logits = logits.masked_fill(~real.to(logits.device), -torch.inf)
    size = logits.shape[1]
    counts = torch.full((len(logits),), size, device=logits.device)
    counts = counts if real is None else real.to(logits.device).sum(1)
    # a share such as 0.3 of 10 is 3, whatever its rounding says
    most = torch.ceil(counts.double() * capacity - 1e-9).clamp_min(1)
    ranks = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < most[:, None]


def _edge(logits: Tensor, run: Tensor) -> Tensor:
    """Return the lowest logit of each sequence that runs, [B, 1]; of one where none does, the
    highest there is.

    Args:
        logits: [B, S].
        run: bool [B, S].
    """
    lowest = logits.masked_fill(~run, torch.inf).amin(dim=1, keepdim=True)
    return torch.where(lowest.isinf(), logits.amax(dim=1, keepdim=True), lowest)


def _collect(call: Call, path: str, seen: DepthSeen, real: Tensor | None) -> None:
    which = torch.ones_like(seen.run) if real is None else real.to(seen.run.device)
    found = DepthSeen(
        seen.logits[which],
        None if seen.predicted is None else seen.predicted[which],
        seen.run[which],
        seen.scores,
        None if seen.soft is None else seen.soft[which],
        seen.inputs[which] if call.phase == "train" and seen.inputs is not None else None,
    )
    # a second run of a segment computes what the first did, and tells it once
    if not call.recomputing:
        kept: Any = call.collected["depth"]
        kept.setdefault(path, []).append(found)


def _bound(
    block: DepthLayer, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what the stock block is given, by name, its hidden states left out."""
    if not args:
        return dict(kwargs)
    names = block.names()[1 : 1 + len(args)]
    return {**dict(zip(names, args, strict=True)), **kwargs}
