"""Forward passes in which tokens, or whole texts of a classifier, leave at exits.

Of a language model this is the reference: a pass over whole sequences in which every token leaves
where it would when it was generated. With "recompute" all keys and values are exact, so the pass
runs all blocks and takes each token's logits from the first exit that is sure enough; with
"propagate" a token's state stays as it was at its exit while later blocks read it. What saves time
is `generate` (adaptive_exit_decode.py), which gives the same tokens.

Of a classifier texts that left are dropped from the batch, so later blocks run for the rest alone.

Shapes: B sequences, S positions of a pass, T tokens, d hidden size, V vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import ForSequenceClassificationLoss

from .adaptive_checks import AdaptiveConfigError
from .adaptive_context import current, entered
from .adaptive_costs import patches
from .adaptive_exit_costs import count_left, count_sites, counts_sites
from .adaptive_exit_decide import confidence, similarity
from .adaptive_exits import run_stage
from .adaptive_stages import Stage

#: tokens whose logits are held at once, of every exit.
_AT_ONCE = 512


def leaving_forward(
    model: Any, stock: Any, bound: dict[str, Any], *args: Any, **kwargs: Any
) -> Any:
    """Return the stock output of a pass, with `exit_layers` where tokens may leave.

    Args:
        model: adaptive; with exits, or a backbone of such a one.
        stock: the stock forward.
        bound: its arguments by name.
        args, kwargs: its arguments as given.
    """
    exits = model.adaptive_runtime.exits
    # a backbone that is called by itself has nothing to leave to
    if not getattr(model, "exits", None):
        return stock(model, *args, **kwargs)
    count = len(model.get_submodule(exits["blocks"]))
    cut = model.config.num_hidden_layers
    if cut < count:
        # the draft of `generate(assistant_early_exit=cut)`
        own = cut if cut in model.adaptive_exits() else None
        stage = Stage(0, cut, exit=own, end=cut)
        inputs = _flat(bound)
        cached = inputs.get("past_key_values") is not None
        if own is not None and cached and _has_block(model, cut):
            raise AdaptiveConfigError(
                f"the exit after {cut} blocks has a block of its own, for which stock caches have "
                f"no place: use generate(draft_exit={cut})"
            )
        return run_stage(model, stage, **inputs)
    rule = model.adaptive_runtime.leaving()
    if rule is None or model.training or current().stage is not None:
        return stock(model, *args, **kwargs)
    inputs = _flat(bound)
    if inputs.get("past_key_values") is not None and _with_block(model):
        # a given cache has no place for blocks of exits
        return stock(model, *args, **kwargs)
    named = inputs.pop("return_dict", None)
    inputs["return_dict"] = True
    run = _classified if exits["kind"] == "classifier" else _tokens
    output = run(model, rule, inputs, count)
    return output if (model.config.return_dict if named is None else named) else output.to_tuple()


def _flat(bound: Mapping[str, Any]) -> dict[str, Any]:
    """Return bound arguments as keywords."""
    given = {name: value for name, value in bound.items() if name not in ("self", "kwargs")}
    return {**given, **bound.get("kwargs", {})}


class Judge:
    """Who decides, exit by exit, which tokens leave.

    Args:
        model: adaptive, with exits.
        rule: {"measure", "thresholds", "decay", "patience"}.
        positions: [T] of the tokens in their texts, for thresholds that fall.
    """

    def __init__(self, model: Any, rule: Mapping[str, Any], positions: Tensor) -> None:
        self._heads, self._rule, self._positions = model.adaptive_exits(), rule, positions
        self._places = [head["at"] for head in model.adaptive_runtime.exits["heads"]]
        self._state: Tensor | None = None
        self._logits: Tensor | None = None
        self._agreed = torch.zeros_like(positions)

    def exits(self) -> tuple[int, ...]:
        """Return the exits that have to be looked at."""
        rule, places = self._rule, self._places
        if rule["measure"] == "patience":
            wanted = places
        else:
            taken = [i for i, level in enumerate(rule["thresholds"]) if level is not None]
            # one that compares needs the exit before
            compares = rule["measure"] == "state"
            wanted = places[: max(taken) + 1] if compares else [places[i] for i in taken]
        return tuple(wanted)

    def leave(self, at: int, logits: Tensor, state: Tensor, going: Tensor) -> Tensor:
        """Return which tokens leave, bool [n].

        Args:
            at: the exit; ascending from call to call.
            logits, state: [n, V] and [n, d] of the tokens that are still going.
            going: [n] their indices among all T.
        """
        before = (self._logits, self._state)
        rule, order = self._rule, self._places.index(at)
        if rule["measure"] == "patience":
            self._logits = _spread(logits, going, before[0], len(self._positions))
        if rule["measure"] == "state":
            self._state = _spread(state, going, before[1], len(self._positions))
        none = torch.zeros(len(going), dtype=torch.bool, device=logits.device)
        level = rule["thresholds"][order]
        if rule["measure"] == "patience":
            if before[0] is None:
                return none
            last = before[0][going]
            same = logits.argmax(-1) == last.argmax(-1)
            agrees = same if level is None else similarity(logits, last) > level
            self._agreed[going] = torch.where(agrees, self._agreed[going] + 1, 0)
            enough: Tensor = self._agreed[going] >= int(rule["patience"])
            return enough
        if level is None or (rule["measure"] == "state" and before[1] is None):
            return none
        sure = confidence(
            rule["measure"],
            logits,
            state=state,
            previous_state=None if before[1] is None else before[1][going],
            head=self._heads[at],
        )
        return sure > self._level(float(level), going)

    def _level(self, level: float, going: Tensor) -> Tensor:
        """Return the threshold of each token, [n] (CALM's falls to nine tenths)."""
        decay = self._rule["decay"]
        here = self._positions[going].double()
        if decay is None:
            return torch.full_like(here, level)
        fall: Tensor = torch.exp(-float(decay["rate"]) * here / int(decay["length"]))
        return 0.9 * level + 0.1 * level * fall


def _spread(values: Tensor, going: Tensor, before: Tensor | None, count: int) -> Tensor:
    """Return values of all T tokens, those that go on replaced."""
    known = values.new_zeros(count, values.shape[-1]) if before is None else before.clone()
    known[going] = values
    return known


def _tokens(model: Any, rule: Mapping[str, Any], inputs: dict[str, Any], count: int) -> Any:
    """Run a language model over whole sequences, or over what follows a cache."""
    labels = inputs.pop("labels", None)
    given = next(inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None)
    positions = _positions(inputs, given).reshape(-1)
    judge = Judge(model, rule, positions)
    places = judge.exits()
    depth = torch.full(given.shape[:2], count, device=given.device)
    frozen = rule["kv"] == "propagate" and not _with_block(model)
    if frozen:
        chosen: dict[int, Tensor] = {}
        stage = Stage(0, count, watched=places, kept=torch.zeros_like(depth, dtype=torch.bool))
        stage.leave = _freezing(model, judge, stage, depth, chosen)
        out = run_stage(model, stage, **inputs)
        states = chosen
    else:
        again = current().account is not None and counts_sites(model, inputs)
        stage = Stage(0, count, wanted=places, trace=[] if again else None)
        if _with_block(model) and inputs.get("past_key_values") is None:
            # a default cache has no place for blocks of exits
            inputs["use_cache"] = False
        with entered(replace(current(), account=None) if again else current()):
            out = run_stage(model, stage, **inputs)
        states = stage.states
        _choose(model, judge, states, depth, places)
        if again:
            assert stage.trace is not None
            count_sites(model, stage.trace, depth, inputs)
    kept = out.logits.shape[1]
    index = _kept(inputs.get("logits_to_keep", 0), given.shape[1], kept, given.device)
    logits = out.logits.clone()
    for at in places:
        mine = depth[:, index] == at
        if bool(mine.any()):
            logits[mine] = _logits(model, at, states[at][:, index][mine]).to(logits.dtype)
    out.logits = logits
    if labels is not None:
        extra = {k: v for k, v in inputs.items() if k == "num_items_in_batch"}
        loss = model.loss_function(
            logits=logits, labels=labels, vocab_size=model.config.vocab_size, **extra
        )
        balance = getattr(out, "aux_loss", None)
        if balance is not None:
            # of mixtures asked for their router logits, as in the stock forward
            loss = loss + model.router_aux_loss_coef * balance.to(loss.device)
        out = _with_loss(out, loss)
    _account(model, depth, positions.view_as(depth) + 1, places)
    mask = current().token_mask
    out.exit_layers = depth if mask is None else depth.masked_fill(~mask.to(depth.device), 0)
    return out


def _account(model: Any, depth: Tensor, seen: Tensor, places: tuple[int, ...]) -> None:
    """Tell who counts what the tokens of a pass ran, [B, S] each."""
    call = current()
    if call.account is None:
        return
    real = torch.ones_like(depth, dtype=torch.bool) if call.token_mask is None else call.token_mask
    inside = model._own_modules()
    count_left(model, call.account, depth[real], seen[real], places, inside=inside)


def _freezing(
    model: Any, judge: Judge, stage: Stage, depth: Tensor, chosen: dict[int, Tensor]
) -> Callable[[int, Tensor], None]:
    """Return what a pass calls at an exit: it decides who leaves, whose states then stay."""

    def leave(at: int, state: Tensor) -> None:
        assert stage.kept is not None
        chosen[at] = state
        going = (~stage.kept).reshape(-1).nonzero().view(-1)
        if not len(going):
            return
        flat = state.reshape(-1, state.shape[-1])[going]
        gone = judge.leave(at, _logits(model, at, flat), flat, going)
        left = going[gone]
        depth.view(-1)[left] = at
        stage.kept = stage.kept.reshape(-1).index_fill(0, left, True).view_as(stage.kept)

    return leave


def _choose(
    model: Any, judge: Judge, states: Mapping[int, Tensor], depth: Tensor, places: tuple[int, ...]
) -> None:
    """Set the depth [B, S] of tokens that leave."""
    going = torch.arange(depth.numel(), device=depth.device)
    for at in places:
        flat = states[at].reshape(-1, states[at].shape[-1])[going]
        gone = judge.leave(at, _logits(model, at, flat), flat, going)
        depth.view(-1)[going[gone]] = at
        going = going[~gone]
        if not len(going):
            return


def _logits(model: Any, at: int, states: Tensor) -> Tensor:
    """Return an exit's logits of some tokens, [n, d] -> [n, V]."""
    return torch.cat(
        [model.exit_logits(at, part[None])[0] for part in torch.split(states, _AT_ONCE)]
    )


def _positions(inputs: Mapping[str, Any], given: Tensor) -> Tensor:
    """Return where tokens are in their texts, [B, S]."""
    found = inputs.get("position_ids")
    if isinstance(found, Tensor) and found.dim() == 2:
        return found.expand(given.shape[:2]).clamp_min(0)
    cache, mask = inputs.get("past_key_values"), inputs.get("attention_mask")
    length = getattr(cache, "get_seq_length", None)
    start = int(length()) if length is not None else 0
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= start + given.shape[1]:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, start : start + given.shape[1]]
    every = torch.arange(start, start + given.shape[1], device=given.device)
    return every.expand(given.shape[:2])


def _kept(keep: Any, length: int, kept: int, device: torch.device) -> Tensor:
    """Return the positions that have logits, [kept]."""
    if isinstance(keep, Tensor):
        return keep.to(device)
    return torch.arange(length - kept, length, device=device)


def _with_block(model: Any) -> bool:
    return any(_has_block(model, at) for at in model.adaptive_exits())


def _has_block(model: Any, at: int) -> bool:
    return model.adaptive_exits()[at].part("block") is not None


def _classified(model: Any, rule: Mapping[str, Any], inputs: dict[str, Any], count: int) -> Any:
    """Run a classifier; texts that leave are dropped from the batch."""
    labels = inputs.pop("labels", None)
    given = next(
        inputs[n]
        for n in ("input_ids", "inputs_embeds", "pixel_values")
        if inputs.get(n) is not None
    )
    size = given.shape[0]
    judge = Judge(model, rule, torch.zeros(size, dtype=torch.long, device=given.device))
    going = torch.arange(size, device=given.device)
    depth = torch.full((size,), count, device=given.device)
    logits: Tensor | None = None
    hidden, start = None, 0
    for at in (*judge.exits(), count):
        own = at if at in model.adaptive_exits() else None
        stage = Stage(start, at, exit=own if at < count else None, entering=hidden)
        mask = current().token_mask
        with entered(replace(current(), token_mask=None if mask is None else mask[going])):
            out = run_stage(model, stage, **_rows(inputs, going, size))
        if logits is None:
            logits = out.logits.new_zeros(size, out.logits.shape[-1])
        logits[going] = out.logits
        assert stage.hidden is not None
        hidden, start = stage.hidden, at
        if at == count:
            break
        state = stage.states[at][:, 0]
        gone = judge.leave(at, out.logits, state, going)
        depth[going[gone]] = at
        going, hidden = going[~gone], hidden[~gone]
        if not len(going):
            break
    assert logits is not None
    out.logits = logits
    if labels is not None:
        out = _with_loss(out, ForSequenceClassificationLoss(labels, logits, model.config))
    out.exit_layers = depth
    _account_texts(model, depth, inputs, judge.exits())
    return out


def _with_loss(out: Any, loss: Tensor) -> Any:
    """Return an output with a loss, which is the first of its tuple."""
    return type(out)(**{**out, "loss": loss})


def _account_texts(
    model: Any, depth: Tensor, inputs: Mapping[str, Any], places: tuple[int, ...]
) -> None:
    """Tell who counts what the tokens of whole texts or images ran, [B] each."""
    call = current()
    if call.account is None:
        return
    pixels = inputs.get("pixel_values")
    given = next(
        (inputs[n] for n in ("input_ids", "inputs_embeds") if inputs.get(n) is not None), None
    )
    if given is None:
        assert pixels is not None
        length = patches(model.config, pixels)
    else:
        length = given.shape[1]
    real = torch.ones(len(depth), length, dtype=torch.bool, device=depth.device)
    real = real if call.token_mask is None else call.token_mask
    each = depth[:, None].expand(len(depth), length)
    _account(model, each, real.sum(1, keepdim=True).expand_as(each), places)


def _rows(inputs: Mapping[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """Return the inputs of some texts."""
    if len(rows) == size:
        return dict(inputs)
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value
        for name, value in inputs.items()
    }
