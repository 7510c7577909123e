"""Exits: heads after some of a model's blocks, and passes that leave there.

Sources: EE-LLM 2312.04916 and EE-Tuning 2402.00518 (heads and how they start), CALM 2207.07061,
LayerSkip 2404.16710 (the shared head), tuned lens 2303.08112 (the affine map).

Shapes: B sequences, S positions of a pass, d hidden size, V vocabulary or classes, L blocks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .adaptive_checks import AdaptiveConfigError
from .adaptive_context import current, entered
from .adaptive_exit_schema import KV, check_decide, check_trust
from .adaptive_knobs import EXITS, Setting
from .adaptive_linear import outside_of_blocks
from .adaptive_stages import Stage, Tapped, stage_blocks, stage_tail

#: child of the model that holds what exits have of their own: "exits.<at>.<part>...".
NAME = "exits"


class ExitHead(nn.Module):
    """What one exit has of its own; parts it lacks are the model's.

    Args:
        spec: of the exit, see `adaptive_exit_schema`.
        hidden: d.
        scale: factor on what blocks add to the residual stream.
        parts: role -> a copy of that module; "network" and "block" as well.
    """

    def __init__(
        self, spec: Mapping[str, Any], hidden: int, scale: float, parts: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.at, self.scale, self.roles = int(spec["at"]), scale, tuple(spec["own"])
        for name, module in parts.items():
            self.add_module(name, module)
        if spec["map"]:
            self.map = nn.Linear(hidden, hidden)
        if spec["confidence"]:
            self.confidence = nn.Linear(hidden, 1)

    def part(self, role: str) -> nn.Module | None:
        """Return its own part of the tail, or "block"; None where it has none."""
        return self._modules.get(role) if role in (*self.roles, "block") else None

    def branch(self, hidden: Tensor, tapped: Tapped | None) -> Tensor:
        """Return what its tail (or its block) reads, from what the host block gave.

        Args:
            hidden: [B, S, d].
            tapped: what the host block's network read and gave, where it has a branch of it.
        """
        network, affine = self._modules.get("network"), self._modules.get("map")
        if network is not None and tapped is not None:
            # zero as long as the branch is the copy it began as
            change = network(tapped.read) - tapped.gave
            # the branch of a block that a token skips is skipped too
            change = change if tapped.run is None else change * tapped.run[..., None]
            hidden = hidden + self.scale * change
        return hidden if affine is None else affine(hidden)


def init_exit(module: ExitHead) -> None:
    """Fill the parts that are no copies: the map computes what it is given, nothing is trusted."""
    affine, confidence = module._modules.get("map"), module._modules.get("confidence")
    few = module._buffers.get("draft_tokens")
    if few is not None:
        init.copy_(few, torch.arange(len(few), dtype=few.dtype))
    if affine is not None:
        init.eye_(affine.weight)
        init.zeros_(affine.bias)
    if confidence is not None:
        init.zeros_(confidence.weight)
        init.zeros_(confidence.bias)


def fill_exits(model: Any, exits: Mapping[str, Any]) -> None:
    """Give a stock model its exits; call it before its sites are filled, so that copies are stock.

    Args:
        model: with the tail; a backbone alone has no exits.
        exits: a checked `config.adaptive.model.exits`.

    Raises:
        AdaptiveConfigError: an exit lies outside the model, or a module is not there.
    """
    blocks: Any = _at(model, exits["blocks"])
    tail = {role: _at(model, path) for role, path in exits["tail"].items()}
    made: dict[int, ExitHead] = {}
    for order, spec in enumerate(exits["heads"]):
        place = int(spec["at"])
        if not 0 < place < len(blocks):
            # after the last block lies the model's own end
            raise AdaptiveConfigError(
                f"an exit is at {place}, this model has {len(blocks)} blocks: "
                f"1 to {len(blocks) - 1}"
            )
        parts = {role: copy.deepcopy(tail[role]) for role in spec["own"]}
        host: Any = getattr(blocks[place - 1], exits["network"] or "", None)
        if spec["network"]:
            if host is None:
                raise AdaptiveConfigError(f"{exits['blocks']} have no network {exits['network']!r}")
            parts["network"] = copy.deepcopy(host)
        if spec["block"]:
            parts["block"] = _renumbered(copy.deepcopy(blocks[-1]), len(blocks) + order)
        made[place] = ExitHead(spec, model.config.hidden_size, exits["scale"], parts)
        draft = exits["draft"]
        if draft is not None and draft["at"] == place and draft["vocab"] is not None:
            few = torch.arange(draft["vocab"], dtype=torch.long)
            made[place].register_buffer("draft_tokens", few)
        if spec["network"]:
            host.register_forward_hook(_Tap(place))
    model.add_module(NAME, nn.ModuleDict({str(place): head for place, head in made.items()}))
    stage_blocks(blocks, tail, made)


class _Tap:
    """Lets a pass with a stage know what a network read and gave; a class, so that it pickles."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stage = current().stage
        if stage is not None and self._place in stage.exits:
            stage.taps[self._place] = Tapped(args[0], output)


def _renumbered(block: nn.Module, index: int) -> nn.Module:
    """Return a block whose keys and values have a place of their own in caches."""
    for module in block.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", index)  # noqa: B010
    return block


def _at(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        raise AdaptiveConfigError(
            f"config.adaptive.model.exits names {path!r}, which {type(model).__name__} lacks"
        ) from None


def run_stage(model: Any, stage: Stage, **inputs: Any) -> Any:
    """Return the stock output of a pass that runs what `stage` says, inside the present call.

    Only inside a forward pass of the model (its call is made once, so tokens count once); `stage`
    then holds what was found. Logits are those of the exit it leaves at, or the model's.

    Args:
        model: adaptive, with exits.
        stage: which blocks, and where to leave.
        inputs: of the stock forward. A pass that begins later than block 0 takes
            `inputs_embeds=stage.entering` (of images their pixels): what is embedded is not used.
    """
    with entered(replace(current(), stage=stage)):
        return type(model).adaptive_stock_forward(model, **inputs)


class ExitsMixin:
    """The part of an adaptive model that is about exits."""

    adaptive_runtime: Any

    def adaptive_exits(self) -> dict[int, ExitHead]:
        """Return what each exit has of its own, by the blocks before it; empty without exits."""
        heads: Any = getattr(self, NAME, None)
        return {} if heads is None else {head.at: head for head in heads.values()}

    def set_exits(
        self,
        thresholds: float | Sequence[float | None] | str | None = None,
        *,
        measure: str | None = None,
        patience: int | None = None,
        kv: str | None = None,
        decay: Mapping[str, Any] | None = None,
    ) -> Setting:
        """Let tokens leave by this rule from now on; as a context manager, until its end.

        Args:
            thresholds: of every exit alike, or of each; a token leaves strictly above. None, and
                no `patience`: no token ever leaves, and the model computes what it did without.
                "config" goes back to what the configuration says.
            measure: how sure an exit is; as configured when not given. See `adaptive_exit_schema`.
            patience: of measure "patience": exits in a row that must agree; as configured when not
                given.
            kv: "recompute" or "propagate"; as configured when not given.
            decay: {"rate", "length"}: thresholds fall with the position; None for not.

        Raises:
            ValueError: no exits, or a value out of range.
        """
        runtime = self.adaptive_runtime
        if runtime.exits is None:
            raise AdaptiveConfigError("this model has no exits")
        if isinstance(thresholds, str):
            if thresholds != "config" or (measure, patience, kv, decay) != (None,) * 4:
                raise AdaptiveConfigError(
                    f"set_exits: thresholds is {thresholds!r}: numbers, None, or 'config' alone"
                )
            return self.reset_exits()
        rule = rule_of(runtime.exits, thresholds, measure, patience, kv, decay)
        before = runtime.kept()
        runtime.knobs = {path: knob for path, knob in runtime.knobs.items() if path != EXITS}
        runtime.leave = rule
        return Setting(runtime, before)

    def reset_exits(self) -> Setting:
        """Let tokens leave as the configuration says; as a context manager, until its end."""
        runtime = self.adaptive_runtime
        before = runtime.kept()
        runtime.knobs = {path: knob for path, knob in runtime.knobs.items() if path != EXITS}
        runtime.leave = None
        return Setting(runtime, before)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the model's output matrix; exits go on using it, or their own, as before."""
        stock: Any = super()
        stock.set_output_embeddings(new_embeddings)
        runtime = getattr(self, "adaptive_runtime", None)
        exits = None if runtime is None else runtime.exits
        if exits is not None and exits["kind"] == "causal":
            stage_tail("head", new_embeddings, self.adaptive_exits())

    def _resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """Let the output matrices of exits follow the model's, as stock code makes that follow."""
        own: Any = self
        stock: Any = super()
        made: Any = stock._resize_token_embeddings(
            new_num_tokens, pad_to_multiple_of, mean_resizing
        )
        exits = own.adaptive_runtime.exits
        if exits is None or exits["kind"] != "causal":
            return made  # type: ignore[no-any-return]
        size = made.weight.shape[0]
        for head in own.adaptive_exits().values():
            old = head.part("head")
            if old is not None and old.weight.shape[0] != size:
                head.head = own._get_resized_lm_head(old, size, mean_resizing=mean_resizing)
                head.head.requires_grad_(old.weight.requires_grad)
        _keep_drafted(own, size)
        return made  # type: ignore[no-any-return]

    def exit_states(self, exits: Sequence[int] | None = None, **inputs: Any) -> dict[int, Tensor]:
        """Return what the tail of each exit reads, [B, S, d], and under L what the last block gave.

        One pass through all blocks, without cache and without any head; of states of exits with
        parts of their own in front of the tail, gradients reach these.

        Args:
            exits: which, by the blocks before them; all when not given.
            inputs: of the forward pass, `input_ids`, `attention_mask` and the like.
        """
        own: Any = self
        wanted = tuple(self.adaptive_exits() if exits is None else exits)
        count = _count(own)
        stage = Stage(0, count, wanted=wanted)
        if "use_cache" in inspect.signature(own.base_model.forward).parameters:
            inputs["use_cache"] = False
        with _calling(own, inputs), entered(replace(current(), stage=stage)):
            own.base_model(**inputs)
        assert stage.hidden is not None
        return {**{place: stage.states[place] for place in wanted}, count: stage.hidden}

    def exit_logits(self, at: int, state: Tensor, **inputs: Any) -> Tensor:
        """Return the logits of an exit from its state, [B, S, d] -> [B, S, V] (classes: [B, V]).

        Args:
            at: blocks before the exit; L is the model's own end.
            state: what `exit_states` gave, or positions of it.
            inputs: further ones of the stock forward; of images their pixels.
        """
        own: Any = self
        count = _count(own)
        stage = Stage(count, count, exit=at if at in self.adaptive_exits() else None)
        stage.entering = state
        if "use_cache" in inspect.signature(type(own).adaptive_stock_forward).parameters:
            inputs["use_cache"] = False
        if "pixel_values" not in inputs:
            inputs["inputs_embeds"] = state
        with _calling(own, {}):
            logits: Tensor = run_stage(own, stage, **inputs).logits
        return logits


def _keep_drafted(model: Any, size: int) -> None:
    """Let drafts choose among the tokens they chose among, of those there are; of all if none is.

    Args:
        model: adaptive, with exits.
        size: V, once the embeddings were resized.
    """
    for head in model.adaptive_exits().values():
        few = head._buffers.get("draft_tokens")
        if few is None or bool((few < size).all()):
            continue
        head.draft_tokens = few[few < size] if bool((few < size).any()) else None
        count = None if head.draft_tokens is None else len(head.draft_tokens)
        for exits in (model.adaptive_runtime.exits, model.config.adaptive["model"]["exits"]):
            exits["draft"]["vocab"] = count


def rule_of(
    exits: Mapping[str, Any],
    thresholds: float | Sequence[float | None] | None,
    measure: str | None,
    patience: int | None,
    kv: str | None,
    decay: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the checked rule that `set_exits` was asked for, {} for never.

    Raises:
        AdaptiveConfigError: a value is out of range.
    """
    if kv not in (None, *KV):
        raise AdaptiveConfigError(f"set_exits: kv is {kv!r}, known: {', '.join(KV)}")
    off = thresholds is None and patience is None
    if off and measure is None and decay is None:
        return {}
    count, usual = len(exits["heads"]), exits["decide"]
    each = list(thresholds) if isinstance(thresholds, Sequence) else [thresholds] * count
    chosen = measure or ("patience" if patience is not None else usual["measure"])
    if chosen != "patience" and patience is not None:
        raise AdaptiveConfigError(
            f"set_exits: patience is {patience!r}, which only measure 'patience' knows, and "
            f"measure is {chosen!r}: leave out one of them"
        )
    if chosen == "patience" and patience is None:
        patience = usual["patience"]
    rule = {"measure": chosen, "thresholds": each, "decay": decay, "patience": patience}
    check_decide("set_exits", rule, count)
    check_trust("set_exits", rule, exits["heads"])
    return {} if off else {**rule, "kv": kv or exits["kv"]}


@contextmanager
def _calling(model: Any, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Run the body inside a call of the model, as a forward pass over these inputs does."""
    runtime = model.adaptive_runtime
    if current().owner is runtime:
        yield
        return
    with outside_of_blocks(), entered(runtime.call(model.config, inputs, training=model.training)):
        yield


def _count(model: Any) -> int:
    """Return L."""
    exits = model.adaptive_runtime.exits
    if exits is None:
        raise AdaptiveConfigError("this model has no exits")
    return len(model.get_submodule(exits["blocks"]))
