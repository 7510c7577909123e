"""Passes of a decoding model through a range of its blocks, at slots of a cache.

Shapes: B sequences, R rows of a pass (some of the B), S positions of a pass, d hidden size, V
vocabulary, L blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .adaptive_context import Call, entered
from .adaptive_exit_cache import ExitCache, Places
from .adaptive_exit_costs import count_left
from .adaptive_linear import outside_of_blocks
from .adaptive_stages import Stage

_KINDS = {"full_attention", "sliding_attention"}
_ATTENTION = ("eager", "sdpa")
#: what `generate` may hand to the stock loop for a text model; anything else would be lost.
_KNOWN = {
    *("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"),
    *("inputs_embeds", "return_dict"),
}


def why_not(model: Any, inputs: Mapping[str, Any]) -> str | None:
    """Return why a model cannot be decoded in stages, None when it can.

    Args:
        model: adaptive, with exits.
        inputs: of the stock loop of generation, by name.
    """
    config = model.config
    cache = inputs.get("past_key_values")
    kind = getattr(config, "_attn_implementation", None)
    strange = sorted(k for k, v in inputs.items() if k not in _KNOWN and v is not None)
    if not inputs.get("use_cache", True):
        return "the cache is off"
    if cache is not None and (type(cache).__name__ != "DynamicCache" or cache.get_seq_length()):
        return f"the cache is {type(cache).__name__}, given or of another kind than the default"
    if kind not in _ATTENTION:
        return f"its attention runs as {kind}, known: {', '.join(_ATTENTION)}"
    if strange:
        return f"generate was given {', '.join(strange)}"
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return f"{type(model.base_model).__name__} takes no positions"
    kinds = set(getattr(config, "layer_types", None) or ()) - _KINDS
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has attention of kind {', '.join(sorted(kinds)) or 'chunked'}"
    return None


class StandIn:
    """Stands in for a model in a stock loop of generation: the model in all but its passes.

    Args:
        model: what it stands for.
        run: in place of the forward pass; the first argument says whether it is of the prompt.
    """

    def __init__(self, model: Any, run: Callable[..., Any]) -> None:
        self._model, self._run, self._prompt = model, run, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the pass gives."""
        return self._run(self._prompt, *args, **kwargs)

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        self._prompt = True
        try:
            return type(self._model)._prefill(self, *args, **kwargs)
        finally:
            self._prompt = False

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return the pass itself: what it runs changes with the tokens."""
        return self.__call__


def full_depth(model: Any) -> StandIn:
    """Return a stand-in no token of which leaves early.

    Args:
        model: adaptive, with exits.
    """

    def run(prompt: bool, *args: Any, **inputs: Any) -> Any:
        call = model.adaptive_runtime.call(model.config, inputs, training=False)
        with outside_of_blocks(), entered(call):
            return type(model).adaptive_stock_forward(model, *args, **inputs)

    return StandIn(model, run)


class Passes:
    """Runs passes of one model over one cache.

    Args:
        model: adaptive, with exits.
        cache: what the passes read and write.
        exits: those whose own blocks need the prompt as well.
    """

    def __init__(self, model: Any, cache: ExitCache, exits: Sequence[int]) -> None:
        self.model, self.cache = model, cache
        self.heads: dict[int, Any] = model.adaptive_exits()
        self.count = len(model.get_submodule(model.adaptive_runtime.exits["blocks"]))
        self.with_block = tuple(at for at in exits if self.heads[at].part("block") is not None)
        self._stock = type(model).adaptive_stock_forward
        parameters = inspect.signature(self._stock).parameters
        self._keeps = "logits_to_keep" in parameters
        self._call: Call | None = None

    # -- the prompt

    def prompt(self, **inputs: Any) -> Any:
        """Run a prompt, or a chunk of it, through all blocks; return the stock output."""
        stage = Stage(0, self.count, wanted=self.with_block) if self.with_block else None
        call = self.model.adaptive_runtime.call(self.model.config, inputs, training=False)
        inputs["past_key_values"] = self.cache
        with outside_of_blocks(), entered(replace(call, stage=stage)):
            return self._stock(self.model, **inputs)

    def prefill(self, ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor:
        """Run the prompt of a generation; return the last position's logits, [B, V].

        Args:
            ids: [B, P].
            config, kwargs: what `generate` gives its loop.
        """
        stand = StandIn(self.model, lambda prompt, **inputs: self.prompt(**inputs))
        given = {**kwargs, "past_key_values": self.cache}
        output = stand._prefill(ids, config, given)
        self.begin(given.get("attention_mask"), given.get("position_ids"))
        logits: Tensor = output.logits[:, -1]
        return logits

    def begin(self, mask: Tensor | None, positions: Tensor | None) -> None:
        """Say what the prompt was, once all of it has run."""
        self.cache.begin(mask, positions)

    # -- tokens

    def run(
        self,
        stage: Stage,
        places: Places,
        *,
        ids: Tensor | None = None,
        keep: int | Tensor = 0,
        real: Tensor | None = None,
    ) -> Tensor:
        """Run a pass with a head; return logits, [R, kept positions, V].

        Args:
            stage: which blocks; holds what was found.
            places: where the tokens are.
            ids: [R, S] tokens, for a pass that begins at block 0.
            keep: positions that want logits: how many of the last, 0 for all, or which.
            real: bool [R, S], None when all tokens are.
        """
        inputs = self._inputs(stage, places, ids)
        if self._keeps:
            inputs["logits_to_keep"] = keep
        with self.cache.at(places), outside_of_blocks(), self._entered(stage, places, ids, real):
            logits: Tensor = self._stock(self.model, **inputs).logits
        if not self._keeps and not (isinstance(keep, int) and keep == 0):
            logits = logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]
        return logits

    def fill(
        self,
        stage: Stage,
        places: Places,
        *,
        ids: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Tensor:
        """Run a pass without a head; return what the head would read, [R, S, d].

        Args:
            stage, places, ids, real: see `run`.
        """
        inputs = self._inputs(stage, places, ids)
        with self.cache.at(places), outside_of_blocks(), self._entered(stage, places, ids, real):
            hidden: Tensor = self.model.base_model(**inputs)[0]
        return hidden

    def _entered(
        self, stage: Stage, places: Places, ids: Tensor | None, real: Tensor | None
    ) -> Any:
        """Return the call of a pass; what begins at block 0 is what counts tokens."""
        if ids is not None or self._call is None:
            mask = self.cache.seen_mask(0 if ids is None else ids.shape[1])
            if mask is not None and places.rows is not None:
                mask = mask[places.rows]
            given = {"input_ids": ids, "past_key_values": self.cache, "attention_mask": mask}
            runtime, config = self.model.adaptive_runtime, self.model.config
            self._call = runtime.call(config, given, training=False)
        assert self._call is not None
        return entered(replace(self._call, stage=stage, token_mask=real))

    def account(self, depths: Tensor, looked: Sequence[int]) -> None:
        """Tell who counts how deep the newest token of every row went.

        Args:
            depths: [B] blocks each ran.
            looked: exits that were looked at, by the blocks before them.
        """
        account = None if self._call is None else self._call.account
        if account is not None:
            pairs = zip(self.cache.lengths, self.cache.offsets, strict=True)
            seen = torch.tensor([length - offset + 1 for length, offset in pairs])
            inside = self.model._own_modules()
            count_left(self.model, account, depths, seen, looked, inside=inside)

    def _inputs(self, stage: Stage, places: Places, ids: Tensor | None) -> dict[str, Any]:
        embeds = None if ids is not None else stage.entering
        return {
            "input_ids": ids,
            "inputs_embeds": embeds,
            "attention_mask": self._masks(places),
            "position_ids": self.cache.positions(places),
            "past_key_values": self.cache,
            "use_cache": True,
            "return_dict": True,
        }

    def _masks(self, places: Places) -> Any:
        """Return masks as `generate` makes them for static caches: by kind of layer, or one."""
        config, dtype = self.model.config, self.model.dtype
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            return self.cache.mask(places, dtype, window)
        return {
            kind: self.cache.mask(places, dtype, window if kind == "sliding_attention" else None)
            for kind in set(kinds)
        }


def reduced_head(model: Any, at: int, kept: Tensor) -> Callable[[Tensor], Tensor]:
    """Return an exit's output matrix cut to some tokens, [R, S, d] -> [R, S, len(kept)].

    What the stock class does to logits behind the matrix is done here as well, where it is known:
    a draft only gets better by it.

    Args:
        model: adaptive, with exits.
        at: the exit.
        kept: int64, the tokens.
    """
    own = model.adaptive_exits()[at].part("head")
    path = model.adaptive_runtime.exits["tail"]["head"]
    head = own if own is not None else model.get_submodule(path)
    weight = head.weight.index_select(0, kept)
    bias = None if getattr(head, "bias", None) is None else head.bias.index_select(0, kept)
    scale = float(getattr(model.config, "logit_scale", None) or 1.0)
    scale /= float(getattr(model.config, "logits_scaling", None) or 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        found = functional.linear(hidden, weight, bias) * scale
        return found if cap is None else torch.tanh(found / cap) * cap

    return logits
