"""Generation with an adaptive model: the stock loop, at a compute that is asked for; of a model
with exits also with drafts of its own first blocks, or with tokens that leave early.

Shapes: B sequences, P positions of the prompt.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .adaptive_calls import Runtime
from .adaptive_checks import AdaptiveConfigError
from .adaptive_exit_decide import leaving_of
from .adaptive_exit_decode import Leaver
from .adaptive_exit_passes import full_depth, why_not
from .adaptive_exit_schema import check_draft
from .adaptive_knobs import EXITS, knobs_for
from .adaptive_row_stops import RowStops
from .adaptive_speculate import Draft, Speculation

#: of the generation that runs: the id of its runtime, how to draft, whether a cache was given.
_ASKED: ContextVar[tuple[int, Draft | None, bool]] = ContextVar(
    "adaptive_asked", default=(0, None, False)
)
#: logits processors that remember what they were asked before.
_BOUND = (
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
)


class GeneratingMixin:
    """What an adaptive model whose stock class generates can do besides."""

    adaptive_runtime: Runtime
    config: Any

    def generate(
        self,
        *args: Any,
        compute: float | None = None,
        draft_exit: int | bool | None = None,
        draft_tokens: int | None = None,
        draft_threshold: float | None = None,
        draft_schedule: str = "adaptive",
        **kwargs: Any,
    ) -> Any:
        """Generate as the stock class does.

        With drafts what is generated stays what it is without: the same tokens when greedy, the
        same distribution when sampling. The result then has `.draft`, {rounds, drafted, accepted},
        and where tokens left early `.exit_layers`, [B, new tokens], the blocks each one ran, 0 for
        padding; both with `return_dict_in_generate=True`.

        Args:
            args, kwargs: of the stock `generate`.
            compute: fraction of the reference's FLOPs to spend, see `set_compute`.
            draft_exit: exit that drafts, by the blocks before it; True for the configured one.
            draft_tokens: drafts per round at most; the configured number when not given.
            draft_threshold: drafting ends where the likeliest token is no likelier; the configured
                one when not given.
            draft_schedule: "adaptive" for rounds as long as pays, "constant" for `draft_tokens`.

        Raises:
            AdaptiveConfigError: no such exit, or a value out of range.
        """
        stock: Any = super()
        draft = self._draft_of(draft_exit, draft_tokens, draft_threshold, draft_schedule)
        runtime = self.adaptive_runtime
        cached = kwargs.get("past_key_values") is not None
        token = _ASKED.set((id(runtime), draft, cached))
        try:
            knobs = None if compute is None else knobs_for(self.config.adaptive, compute)
            if runtime.exits is not None and self._assisted(args, kwargs):
                if leaving_of(runtime) is not None:
                    warnings.warn("no token leaves early: stock code drafts", stacklevel=3)
                # its checks of drafts are passes over several tokens, which would leave as well
                knobs = {**(runtime.knobs if knobs is None else knobs), EXITS: {}}
            if knobs is None:
                return stock.generate(*args, **kwargs)
            with runtime.overridden(knobs):
                return stock.generate(*args, **kwargs)
        finally:
            _ASKED.reset(token)

    def _assisted(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether stock code drafts, by whatever means."""
        own: Any = self
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or own.generation_config
        names = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens")
        return any((kwargs.get(n) or getattr(config, n, None)) is not None for n in names)

    def _draft_of(
        self, at: int | bool | None, tokens: int | None, threshold: float | None, schedule: str
    ) -> Draft | None:
        """Return how to draft, None for not at all."""
        if at is None or at is False:
            if tokens is not None or threshold is not None:
                raise AdaptiveConfigError("draft_tokens and draft_threshold need draft_exit")
            return None
        exits = self.adaptive_runtime.exits
        if exits is None:
            raise AdaptiveConfigError("draft_exit: this model has no exits")
        given = exits["draft"]
        if at is True and given is None:
            places = [head["at"] for head in exits["heads"]]
            raise AdaptiveConfigError(f"no draft is configured: draft_exit is one of {places}")
        usual = given or {"at": at, "tokens": 4, "threshold": 0.0, "vocab": None}
        made: dict[str, Any] = {
            "at": usual["at"] if at is True else at,
            "tokens": usual["tokens"] if tokens is None else tokens,
            "threshold": usual["threshold"] if threshold is None else threshold,
            "vocab": None,
        }
        check_draft("generate", made, [head["at"] for head in exits["heads"]])
        if schedule not in ("adaptive", "constant"):
            raise AdaptiveConfigError(f"draft_schedule is {schedule!r}: adaptive or constant")
        own: Any = self
        kept = getattr(own.adaptive_exits()[made["at"]], "draft_tokens", None)
        adaptive = schedule == "adaptive"
        return Draft(made["at"], made["tokens"], float(made["threshold"]), kept, adaptive)

    # -- the loops stock `generate` calls

    def _sample(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        return self._decode(stock._sample, input_ids, args, kwargs)

    def _beam_search(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        return self._decode(stock._beam_search, input_ids, args, kwargs)

    def _decode(self, loop: Any, ids: Tensor, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Run a stock loop, or decode in its place.

        Args:
            loop: bound stock method.
            ids: [B, P].
            args, kwargs: what `generate` gives it.
        """
        runtime = self.adaptive_runtime
        given = dict(inspect.signature(loop).bind(ids, *args, **kwargs).arguments)
        inputs = given.pop("model_kwargs", {})
        if runtime.exits is None or given["generation_config"].is_assistant:
            return loop(ids, *args, **kwargs)
        owner, draft, cached = _ASKED.get()
        if owner != id(runtime):
            draft, cached = None, False
        rule = leaving_of(runtime)
        if draft is None and rule is None:
            return loop(ids, *args, **kwargs)
        reason = "a cache was given" if cached else None
        reason = reason or why_not(self, inputs) or _too_much(self.config, given)
        if draft is not None and reason is None:
            reason = _no_draft(given)
        if reason is not None:
            kind = "tokens are not drafted" if draft is not None else "no token leaves early"
            warnings.warn(f"{kind}: {reason}", stacklevel=5)
            return loop.__func__(full_depth(self), **given, **inputs)
        if draft is not None:
            return _speculated(self, draft, given, inputs)
        assert rule is not None
        return _left(self, rule, loop, given, inputs)


def _too_much(model_config: Any, given: Mapping[str, Any]) -> str | None:
    """Return what of a generation wants all blocks for every token, in step; None for nothing."""
    config = given["generation_config"]
    rope = getattr(model_config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if _is_map(r))}
    short = getattr(model_config, "original_max_position_embeddings", None)
    short = short or rope.get("original_max_position_embeddings") or 0
    if kinds & {"longrope", "dynamic"} and config.max_length > short:
        return "its rotary angles change with the length of the text"
    if given.get("synced_gpus"):
        return "the model is spread over processes"
    if config.return_dict_in_generate:
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(config, name):
                return f"{name} wants every block"
    return None


def _is_map(value: Any) -> bool:
    return isinstance(value, Mapping)


def _no_draft(given: Mapping[str, Any]) -> str | None:
    """Return why a generation cannot be drafted, None when it can."""
    config, processors = given["generation_config"], given["logits_processor"]
    bound = [p for p in processors if type(p).__name__ in _BOUND]
    if config.num_beams > 1:
        return "beams are searched"
    if bound:
        return f"{type(bound[0]).__name__} keeps state from token to token"
    if given["input_ids"].shape[0] == 1:
        return None
    if given.get("streamer") is not None:
        return "a streamer takes tokens of several sequences in step"
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        return "scores of several sequences are asked for"
    stops = RowStops(given["stopping_criteria"], int(config.max_length))
    if not stops.plain and not stops.ends:
        return "sequences end by criteria alone"
    return None


def _speculated(model: Any, draft: Draft, given: Mapping[str, Any], inputs: Any) -> Any:
    config = given["generation_config"]
    made = Speculation(
        model,
        draft,
        given["input_ids"],
        config=config,
        processors=given["logits_processor"],
        criteria=given["stopping_criteria"],
        streamer=given.get("streamer"),
    )
    sequences = made.run(inputs)
    if not config.return_dict_in_generate:
        return sequences
    output = GenerateDecoderOnlyOutput(
        sequences=sequences,
        scores=None if made.scores is None else tuple(made.scores),
        logits=None if made.raw is None else tuple(made.raw),
        # sequences that ended earlier have left the cache
        past_key_values=made.cache.as_dynamic() if made.cache.batch == len(sequences) else None,
    )
    output.draft = dataclasses.asdict(made.count)
    return output


def _left(
    model: Any, rule: Mapping[str, Any], loop: Any, given: Mapping[str, Any], inputs: Any
) -> Any:
    config, ids = given["generation_config"], given["input_ids"]
    leaver = Leaver(model, rule)
    stops = RowStops(given["stopping_criteria"], int(config.max_length))
    leaver.cache.room = stops.longest - ids.shape[1]
    inputs = {**inputs, "past_key_values": leaver.cache}
    output = loop.__func__(leaver.stand_in(), **given, **inputs)
    if not isinstance(output, GenerateDecoderOnlyOutput):
        if config.return_dict_in_generate:
            output.past_key_values = None
        return output
    output.past_key_values = leaver.cache.as_dynamic()
    output.exit_layers = leaver.exit_layers(output.sequences, ids.shape[1], stops.ends)
    return output
