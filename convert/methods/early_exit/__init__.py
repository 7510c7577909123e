"""Early exits: heads behind some of a model's blocks, to leave there or to draft with.

Sources: EE-LLM 2312.04916 and EE-Tuning 2402.00518 (heads, how they begin); LayerSkip 2404.16710
(the shared head, drafting); CALM 2207.07061 (confidence, decay, propagation); tuned lens 2303.08112
(the affine map); PABEE 2006.04152 (patience).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from adaconvert.arch import adaptive, exits
from adaconvert.arch.base import RuntimeVerdict
from adaconvert.arch.exits import CAUSAL, KINDS, NOT_SLICED, Places
from adaconvert.arch.recursion import recursion_of
from adaconvert.arch.trunk import trunk_of
from adaconvert.data.text import Documents, read_documents
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.aux_files import GENERATION_CONFIG
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.io.source_config import MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object
from adaconvert.methods.early_exit import notes
from adaconvert.methods.early_exit.config import SHARED, EarlyExitOptions
from adaconvert.methods.early_exit.drafting import most_frequent
from adaconvert.methods.early_exit.plan import TOKENS_KEY, exits_plan, stock_plan
from adaconvert.methods.options import option
from adaconvert.methods.planned import Fitted, PlainPlan, Prepared
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Plan

#: the way the tokens of a draft are chosen; a change makes others of the same options.
ALGORITHM = 1
#: options that mean nothing where nothing is generated.
_OF_TEXT = ("draft_exit", "draft_tokens", "draft_threshold", "draft_vocab", "decay_length")
#: ids a model that is to end a text must be able to draft.
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def prepare(options: EarlyExitOptions, described: Sequence[Described]) -> Prepared:
    """Return the planned run over opened sources; reads no weights.

    Raises:
        SourceError: the model cannot have exits, or has some already.
        OptionError: the options do not fit the model.
        DataError: the text cannot be read.
    """
    item = described[0]
    documents = None
    if options.draft_data is not None:
        documents = read_documents(options.draft_data, field=options.draft_data_field)
    plan = _plan(options, item, None if documents is None else documents.digest)
    is_stock = _is_stock(options, item)
    planned = PlainPlan(
        plan=plan,
        described=tuple(described),
        target=str(plan.config["model_type"]),
        runtimes=_stock_verdicts(options, item) if is_stock else adaptive.verdicts(),
        files={GENERATION_CONFIG: _generation_config(options, item)} if is_stock else {},
    )
    return Prepared(planned=planned, fit=lambda progress: _fitted(options, item, documents))


def replan(options: Mapping[str, object], described: Sequence[Described]) -> Plan:
    """Return the plan of a finished run, from the options in its manifest."""
    given: dict[str, Any] = dict(options)
    return _plan(EarlyExitOptions(**given), described[0], given.get("draft_data"))


def _plan(options: EarlyExitOptions, item: Described, data: str | None) -> Plan:
    """Return the checked plan; `data` is the digest of the text a draft's tokens are counted in."""
    _check_source(item)
    places = exits.places_of(item.spec)
    _check_options(options, item, places)
    at = options.places(item.spec.layers)
    content = _content(options, item, places, at)
    said = {**asdict(options), "exits": ",".join(map(str, at)), "every": None, "draft_data": data}
    if _is_stock(options, item):
        plan = stock_plan(said, item, notes=notes.of_stock(options, item, at))
    else:
        text = json.dumps([ALGORITHM, data, options.draft_vocab])
        digest = hashlib.sha256(text.encode()).hexdigest()
        plan = exits_plan(content, said, item, digest, notes=notes.of(options, item, content))
    check_plan(plan, [item.source.tensors])
    return plan


def _is_stock(options: EarlyExitOptions, item: Described) -> bool:
    """Return whether a stock checkpoint is written, which stock `generate` drafts with."""
    if options.head != SHARED or options.needs_runtime:
        return False
    return item.spec.adaptive is None and item.spec.kind == "decoder"


def _check_source(item: Described) -> None:
    """Refuse a model that cannot have exits.

    Raises:
        SourceError: it has no norm, no head or a head of no use, or exits already.
    """
    where = f"{escape(item.source.label)}/config.json"
    found = exits.exits_of(item.spec.adaptive)
    if found is not None:
        listed = ", ".join(str(head["at"]) for head in found["heads"])
        raise SourceError(
            f"has exits already, at {listed}",
            where=where,
            hint="Start from the checkpoint they were added to. `finetune --train exits` trains "
            "those it has, `calibrate` sets their thresholds.",
        )
    if recursion_of(item.spec.adaptive) is not None:
        raise SourceError(
            "has blocks that share matrices, and an exit would leave them at every pass",
            where=where,
            hint="Start from the checkpoint it was made of.",
        )
    why = exits.refusal(item.spec)
    if why is not None:
        raise SourceError(f"cannot have exits: {why}", where=where)


def _check_options(options: EarlyExitOptions, item: Described, places: Places) -> None:
    """Hold the options to what the model is.

    Raises:
        OptionError: one means nothing for it, or an exit's copies would compute something else.
    """
    spec = item.spec
    if places.kind != CAUSAL:
        for name in _OF_TEXT:
            if getattr(options, name) is not None:
                raise OptionError(
                    f"does nothing: a {spec.architecture} generates no text", where=option(name)
                )
        if options.kv != "recompute":
            raise OptionError(
                f"does nothing: a {spec.architecture} keeps no keys and values", where="--kv"
            )
    if _is_stock(options, item) and spec.model_type in NOT_SLICED:
        raise OptionError(
            f"a shared head alone makes a stock checkpoint, and stock `assistant_early_exit` fails "
            f"with {spec.model_type}, whose code runs every block in any case",
            where="--head",
            found=SHARED,
            hint="--adaptive writes it for the adaptive runtime, whose own `draft_exit` works.",
        )
    if isinstance(options.draft_vocab, int) and options.draft_vocab > spec.vocab:
        raise OptionError(
            "is more tokens than the model has",
            where="--draft-vocab",
            expected=f"at most {spec.vocab}",
            found=options.draft_vocab,
        )
    if options.measure == "state" and len(options.places(spec.layers)) == 1:
        raise OptionError(
            "compares an exit with the one before, and there is one alone",
            where="--measure",
            expected="max, difference or entropy, or a second exit",
            found=options.measure,
        )
    _, _, branch, block = KINDS[options.head]
    for at in options.places(spec.layers):
        why = exits.uncopied(spec, at - 1, block=False) if branch else None
        why = why or (exits.uncopied(spec, spec.layers - 1, block=True) if block else None)
        if why is not None:
            raise OptionError(
                why,
                where="--head",
                expected="shared, affine or norm" + (", or layer" if _only_branch(why) else ""),
                found=options.head,
            )


def _only_branch(why: str) -> bool:
    """Return whether a block could be copied where its network cannot."""
    return "of one module" in why


def _content(
    options: EarlyExitOptions, item: Described, places: Places, at: Sequence[int]
) -> dict[str, Any]:
    """Return `config.adaptive.model.exits`."""
    own, affine, branch, block = KINDS[options.head]
    roles = [r for r in places.tail if own and not (options.tie_heads and r == "head")]
    networks = {places.networks[place - 1] for place in at} if branch else set()
    return {
        "kind": places.kind,
        "blocks": places.blocks,
        "tail": dict(places.tail),
        "network": networks.pop() if networks else None,
        "scale": places.scale,
        "heads": [
            {
                "at": place,
                "own": list(roles),
                "map": affine,
                "network": branch,
                "block": block,
                "confidence": options.confidence,
            }
            for place in at
        ],
        "decide": options.decide(len(at)),
        "kv": options.kv,
        "draft": options.draft(at) if options.drafts else None,
        "trunk": trunk_of(item.source, item.spec),
    }


def _fitted(options: EarlyExitOptions, item: Described, documents: Documents | None) -> Fitted:
    if not isinstance(options.draft_vocab, int):
        return {}
    found = {**item.source.config, **_generation(item.source)}
    always = [number for name in _SPECIAL for number in _ids(found.get(name))]
    return {TOKENS_KEY: most_frequent(documents, item, options.draft_vocab, always)}


def _ids(value: object) -> list[int]:
    """Return one id, or a list of them, as a list."""
    listed = value if isinstance(value, list) else [value]
    return [number for number in listed if type(number) is int]


def _generation(source: Source) -> dict[str, Any]:
    """Return the generation_config.json of a checkpoint; nothing where it has none."""
    if GENERATION_CONFIG not in source.side_files:
        return {}
    return dict(load_object(source.path(GENERATION_CONFIG), GENERATION_CONFIG, MAX_CONFIG_BYTES))


def _generation_config(options: EarlyExitOptions, item: Described) -> bytes:
    """Return the source's generation_config.json with the settings of a draft.

    A model without one takes its special tokens from config.json, so these go along.
    """
    draft = _stock_draft(options, item)
    found = _generation(item.source)
    if not found:
        known = item.source.config
        found = {name: known[name] for name in _SPECIAL if known.get(name) is not None}
    found |= {
        "num_assistant_tokens": draft["tokens"],
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": draft["threshold"],
    }
    return (json.dumps(found, indent=2, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _stock_draft(options: EarlyExitOptions, item: Described) -> dict[str, object]:
    return options.draft(options.places(item.spec.layers))


def _stock_verdicts(options: EarlyExitOptions, item: Described) -> tuple[RuntimeVerdict, ...]:
    at = _stock_draft(options, item)["at"]
    return (
        RuntimeVerdict(
            runtime="transformers 5",
            verdict="right",
            why=f"the stock class; generate(..., assistant_early_exit={at}) drafts with its first "
            "blocks, one sequence at a time",
        ),
    )
