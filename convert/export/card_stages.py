"""The stages a checkpoint came by, as its manifest lists them, and how a card tells them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from adaconvert.export import card_depth, card_exits
from adaconvert.export.card_text import code, is_hub_id, listed, plain
from adaconvert.io import manifest

#: routers that are no parameters of their own.
_BARE: Final = frozenset({"gate", "oracle", "none"})
_TAGS: Final = {
    "upcycle": ("sparse-upcycling",),
    "moefy": ("moefication",),
    "d2dmoe": ("moefication", "d2dmoe"),
    "adamoe": ("null-experts", "adamoe"),
    "molora": ("lora", "molora"),
    "early-exit": ("early-exit",),
    "depth": ("depth",),
}
#: what makes a mixture of a dense model before it gets null experts -> its own tags.
_VIA: Final = {"upcycle": "sparse-upcycling", "moefy": "moefication"}
#: sources that are named one by one.
_NAMED: Final = 4
#: what a fine-tune records of routers -> its option, and what is no news.
ROUTING: Final[Mapping[str, tuple[str, Any]]] = {
    "balance": ("balance", None),
    "kind": ("balance_kind", "loss"),
    "rate": ("balance_rate", 1e-3),
    "z_loss": ("z_loss", 0.0),
    "regression": ("router_regression", 0.0),
    "target": ("target_compute", None),
    "layers": ("layer_budget", None),
    "ramp": ("compute_ramp", None),
    "null_rate": ("null_rate", 0.2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage.

    Attributes:
        method: registered name.
        options: as resolved.
        sources: label and revision of each.
        training: summary of a fine-tune; empty for any other stage.
        version: of adaconvert, None in old manifests' histories.
        into: what the next stage calls its result, None for the last one.
    """

    method: str
    options: Mapping[str, Any]
    sources: tuple[Mapping[str, Any], ...]
    training: Mapping[str, Any]
    version: str | None = None
    into: str | None = None

    @staticmethod
    def of(entry: Mapping[str, Any], version: object, into: object = None) -> Stage:
        """Return the stage of an entry of the history, or of a manifest."""
        training = entry.get("training")
        return Stage(
            method=str(entry["method"]),
            options=entry["options"],
            sources=tuple(s for s in entry["sources"] if isinstance(s, dict)),
            training=training if isinstance(training, dict) else {},
            version=version if isinstance(version, str) else None,
            into=into if isinstance(into, str) else None,
        )

    @property
    def names(self) -> str:
        """Return the sources for people."""
        shown = [code(source.get("label")) for source in self.sources[:_NAMED]]
        more = len(self.sources) - len(shown)
        return listed([*shown, f"{more} more"] if more else shown)

    @property
    def plain_names(self) -> str:
        """Return the last parts of the sources' names."""
        labels = [str(source.get("label")).split("/")[-1] for source in self.sources]
        shown = listed([plain(label) for label in dict.fromkeys(labels)][:_NAMED])
        return shown if len(labels) <= _NAMED else f"{len(labels)} models"

    @property
    def data(self) -> list[str]:
        """Return the names of the data a fine-tune read."""
        entries = self.options.get("data")
        listed_data = entries if isinstance(entries, list) else []
        names = [entry.get("name") for entry in listed_data if isinstance(entry, dict)]
        return [name for name in names if isinstance(name, str)]


def stages_of(record: Mapping[str, Any]) -> tuple[Stage, ...]:
    """Return all stages a manifest tells of, oldest first; the last one is the manifest's own."""
    earlier = [
        Stage.of(entry, entry.get("version"), entry.get("into"))
        for entry in manifest.history(record)
    ]
    return (*earlier, Stage.of(record, record["adaconvert"]))


def roots(stages: Sequence[Stage]) -> str:
    """Return the checkpoints the first stages were given, for people."""
    made: set[str] = set()
    labels: list[str] = []
    for stage in stages:
        labels += [label for s in stage.sources if (label := str(s.get("label"))) not in made]
        made |= {stage.into} if stage.into is not None else set()
    return listed([code(label) for label in dict.fromkeys(labels)][:_NAMED])


def merged_at(stages: Sequence[Stage]) -> int | None:
    """Return the position of the last stage that mixed several checkpoints."""
    found = [at for at, stage in enumerate(stages) if len(stage.sources) > 1]
    return found[-1] if found else None


def title(stages: Sequence[Stage], name: str | None) -> str:
    """Return the title of a card: the model's name, and what became of it."""
    merged = merged_at(stages)
    line = stages if merged is None else stages[merged:]
    first = line[0].plain_names
    became: list[str] = []
    for stage in line:
        said = _became(stage)
        if stage.method == "unmoefy":
            became = [word for word in became if not word.startswith("split")]
        if said and said not in became[-1:]:
            became.append(said)
    return ", ".join([first if merged is not None or name is None else plain(name), *became])


def _became(stage: Stage) -> str:
    options = stage.options
    if stage.method == "upcycle":
        return f"upcycled to {plain(options.get('experts', 'several'))} experts"
    if stage.method == "moefy" or (stage.method == "d2dmoe" and _splits(stage)):
        split = f"split into {plain(options.get('num_experts', 'several'))} experts"
        return f"{split}, with networks for projections" if _replaces(stage) else split
    if stage.method == "adamoe":
        return listed([*_first_became(options), _null_words(options)])
    if stage.method == "molora":
        return _adapter_words(options)
    if stage.method == card_exits.METHOD:
        return card_exits.became(options)
    if stage.method == card_depth.METHOD:
        return card_depth.became(options)
    if _replaces(stage):
        return "with networks for projections"
    known = {"unmoefy": "dense again", "finetune": "fine-tuned", "d2dmoe": "with fitted routers"}
    return known.get(stage.method, "")


def _first_became(options: Mapping[str, Any]) -> list[str]:
    """Return what a dense model became before it got null experts."""
    if options.get("via") == "upcycle":
        return [f"upcycled to {plain(options.get('experts', 'several'))} experts"]
    if options.get("via") == "moefy":
        return [f"split into {plain(options.get('num_experts', 'several'))} experts"]
    return []


def _was_dense(stage: Stage) -> bool:
    """Return whether a dense model became a mixture and got null experts in one stage."""
    return stage.method == "adamoe" and str(stage.options.get("via")) in _VIA


def _null_words(options: Mapping[str, Any]) -> str:
    kind = "experts of zeros" if options.get("materialize") else "null experts"
    return f"with {plain(options.get('null_experts', 'several'))} {kind}"


def _adapter_words(options: Mapping[str, Any]) -> str:
    """Return what `molora` made of a model."""
    if options.get("as_moe"):
        return "adapters merged into experts"
    if options.get("as_plain_lora"):
        return "as one LoRA"
    count = options.get("experts")
    if count is None:
        return "in another form"
    what = "vectors" if options.get("experts_kind") == "ia3" else "LoRA adapters"
    return f"with {plain(count)} routed {what}"


def _adapter_sentence(stage: Stage) -> str:
    """Return what `molora` did."""
    options, names = stage.options, stage.names
    form = next((key for key in ("as_plain_lora", "as_moe") if options.get(key)), None)
    into = {"as_plain_lora": "one stock LoRA", "as_moe": "the experts of a stock mixture"}
    after = f", written as {into[form]}" if form else ""
    if options.get("experts") is None:
        return f"the adapters of {names} in another form{after}"
    what = _adapter_words({**options, "as_plain_lora": False, "as_moe": False})
    return f"{names} {what}, routing {plain(options.get('routing'))}{after}"


def _replaces(stage: Stage) -> bool:
    return stage.method == "d2dmoe" and "5" in str(stage.options.get("stages", ""))


def _splits(stage: Stage) -> bool:
    return "2" in str(stage.options.get("stages", "2"))


def tags(stages: Sequence[Stage]) -> list[str]:
    """Return the tags of the methods whose mark the checkpoint still bears."""
    found: list[str] = []
    for stage in stages:
        if stage.method == "unmoefy":
            found.clear()
        found += _TAGS.get(stage.method, ())
        found += [_VIA[str(stage.options["via"])]] if _was_dense(stage) else []
    return list(dict.fromkeys(found))


def datasets(stages: Sequence[Stage]) -> list[str]:
    """Return the hub data sets that were trained on, without revision and configuration."""
    names = [re.split("[@:]", name)[0] for stage in stages for name in stage.data]
    return [name for name in dict.fromkeys(names) if is_hub_id(name)]


def routers(stages: Sequence[Stage]) -> str:
    """Return how far routers are: "none", "untrained", "fitted" or "trained"."""
    state = "none"
    for stage in stages:
        options = stage.options
        if stage.method == "unmoefy":
            state = "none"
        elif stage.method == "upcycle" or _was_dense(stage):
            state = "untrained"
        elif stage.method == "moefy":
            bare = not options.get("native") and options.get("router") in _BARE
            state = "none" if bare else "untrained"
        elif stage.method == "d2dmoe" and {"3", "5"} & set(str(options.get("stages", ""))):
            state = "fitted"
        elif state != "none" and _trained_routers(stage):
            state = "trained"
    return state


def _trained_routers(stage: Stage) -> bool:
    parts = stage.training.get("by_part")
    return isinstance(parts, dict) and bool(parts.get("router"))


def made_lines(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield the stages as a numbered list, each with its options."""
    for number, stage in enumerate(stages, 1):
        into = "" if stage.into is None else f", called {code(stage.into)} below"
        by = "" if stage.version is None else f" (adaconvert {plain(stage.version)})"
        yield f"{number}. **{plain(stage.method)}**: {_sentence(stage)}{into}{by}."
        yield from (f"   - {line}" for line in _details(stage))


def _sentence(stage: Stage) -> str:
    options, names = stage.options, stage.names
    if stage.method == "upcycle":
        experts = plain(options.get("experts"))
        how = f"{experts} experts, {plain(options.get('top_k'))} per token"
        if len(stage.sources) > 1:
            return f"the feed-forward networks of {names} became experts of one model, {how}"
        return f"the feed-forward networks of {names} were copied into {how}"
    if stage.method == "adamoe":
        return _null_sentence(stage)
    if stage.method == "molora":
        return _adapter_sentence(stage)
    if stage.method == card_exits.METHOD:
        return card_exits.stage_sentence(stage)
    if stage.method == card_depth.METHOD:
        return card_depth.stage_sentence(stage)
    if stage.method == "d2dmoe" and _replaces(stage):
        return _replaced_sentence(stage)
    if stage.method in ("moefy", "d2dmoe"):
        return _split_sentence(stage)
    if stage.method == "unmoefy":
        return f"every neuron of {names} went back to its place"
    if stage.method == "finetune":
        tokens = stage.training.get("tokens")
        count = f" for {tokens} tokens" if isinstance(tokens, int) else ""
        return f"{names} was trained{count} on {listed([code(name) for name in stage.data])}"
    if stage.method == "calibrate":
        return f"{names} was measured at several settings of its knobs"
    return f"made from {names}"


def _null_sentence(stage: Stage) -> str:
    """Return what became of a mixture, or of a dense model on the way to one."""
    options = stage.options
    count = plain(options.get("null_experts"))
    if options.get("materialize"):
        got = f"got {count} experts of zeros each, which stand for null experts"
    else:
        kind, slots = plain(options.get("null_kind")), plain(options.get("top_k"))
        got = f"got {count} null experts of kind {kind} each, for {slots} slots"
    first = _first_became(options)
    line = f"the mixtures of {stage.names} {got}"
    if first:
        line = f"{stage.names} was {first[0]}, and its mixtures {got}"
    budget = options.get("target_compute") is not None or options.get("layer_budget") is not None
    return f"{line}; null biases were set on text" if budget and options.get("data") else line


def _replaced_sentence(stage: Stage) -> str:
    """Return what stage 5 did, and the other stages of the same run."""
    given = set(str(stage.options.get("stages", "")))
    roles = plain(str(stage.options.get("projections", "")).replace(",", ", "))
    line = f"networks trained to do the same took the place of the projections {roles}"
    if not given & {"2", "3", "4"}:
        return f"{line} of {stage.names}"
    return f"{_split_sentence(stage)}; {line}"


def _split_sentence(stage: Stage) -> str:
    options, names = stage.options, stage.names
    if stage.method == "d2dmoe" and not _splits(stage):
        fitted = "3" in str(options.get("stages"))
        what = "new routers fitted on text" if fitted else "another selection rule"
        return f"{names} with {what}"
    experts, width = plain(options.get("num_experts")), plain(options.get("expert_width"))
    line = f"the feed-forward networks of {names} were split into {experts} experts of {width}"
    line += " neurons"
    if options.get("shared_neurons"):
        line += f" and {plain(options['shared_neurons'])} neurons that always run"
    if isinstance(options.get("split"), str):
        line += f", grouped by {plain(options['split'])}"
    if options.get("native"):
        return f"{line}, behind routers of zeros"
    if stage.method == "d2dmoe" and options.get("router") == "contribution":
        return f"{line}, and routers fitted that predict how much each expert contributes"
    named = [f"{key} {code(options[key])}" for key in ("router", "rule") if key in options]
    return f"{line}; {', '.join(named)}" if named else line


def _details(stage: Stage) -> Iterator[str]:
    """Yield commits of hub sources, then the options that are set."""
    for source in stage.sources[:_NAMED]:
        if isinstance(source.get("revision"), str):
            yield f"{code(source.get('label'))} at commit {code(source['revision'])}"
    shown = [f"{key}={_short(value)}" for key, value in stage.options.items() if _is_told(value)]
    if shown:
        yield f"Options: {', '.join(code(item, 120) for item in sorted(shown))}"
    asked = _routing(stage.options.get("routing"))
    if asked:
        yield f"Of routers: {', '.join(code(item, 120) for item in asked)}"


def _routing(options: object) -> list[str]:
    """Return what a fine-tune was asked for of budgets and balance, where that is no default."""
    found = options if isinstance(options, dict) else {}
    return sorted(
        f"{name}={_short(found[key])}"
        for key, (name, usual) in ROUTING.items()
        if found.get(key, usual) != usual and _is_told(found[key])
    )


def _is_told(value: object) -> bool:
    return isinstance(value, str | int | float) and value is not False


def _short(value: object) -> str:
    text = str(value)
    is_digest = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
    return f"{text[:12]} (sha256)" if is_digest else text
