"""What a card tells of fine-tunes: data, tokens, what was trained, losses, health of routers.

The numbers are those of the manifest's "training" entry; whatever is missing there is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from adaconvert.export.card_stages import Stage
from adaconvert.export.card_text import code, is_number, listed, plain, table
from adaconvert.units import human_count

_REAL: Final = "real experts run, share of those without null experts"
#: what is logged -> what a reader calls it; anything else goes by its own name.
_NAMES: Final = {
    "loss": "all losses, weighted",
    "end": "cross-entropy of the whole model, nats per example",
    "lm": "language-model loss, nats per token",
    "distill": "divergence from the teacher, nats per token",
    "distill_hidden": "distance from the teacher's hidden states",
    "balance": "load-balancing loss",
    "z": "router z-loss",
    "regression": "router regression",
    "hoyer": "square Hoyer of activations",
    "l1": "sum of activations",
    "sparsity": "share of activations that are zero",
    "projection_sparsity": "share of zeros in networks in place of projections",
    "router_entropy": "router entropy, share of an even choice",
    "load": "load of the busiest expert over the mean",
    "dead_experts": "experts without a token",
    "share": _REAL,
    "idle": "share of tokens without a real expert",
}


def section(stages: Sequence[Stage]) -> Iterator[str]:
    """Yield the section on every fine-tune, oldest first."""
    tuned = [stage for stage in stages if stage.training]
    if not tuned:
        return
    yield from ("## Training", "")
    for stage in tuned:
        yield f"Fine-tune of {stage.names}: {_budget(stage.training)}."
        yield ""
        yield from _data(stage)
        yield from _numbers(stage.training)
        yield from _routing(stage.training)
    if len(tuned) > 1:
        total = sum(_whole(stage.training.get("tokens")) for stage in tuned)
        yield from (f"All fine-tunes together: {total} tokens.", "")


def was_validated(stage: Stage) -> bool:
    """Return whether a fine-tune measured its loss on text it did not train on."""
    return bool(_validation(stage.training))


def _budget(told: Mapping[str, Any]) -> str:
    trained, frozen = _whole(told.get("trained")), _whole(told.get("frozen"))
    parts = told.get("by_part")
    counts = parts if isinstance(parts, dict) else {}
    named = [f"{plain(part)} {human_count(_whole(count))}" for part, count in counts.items()]
    return (
        f"{_whole(told.get('tokens'))} tokens in {_whole(told.get('steps'))} steps; trained "
        f"{human_count(trained)} of {human_count(trained + frozen)} parameters"
        f"{f' ({listed(named)})' if named else ''}"
    )


def _data(stage: Stage) -> Iterator[str]:
    """Yield a table of the sources."""
    weights = [entry.get("weight") for entry in _entries(stage.options.get("data"))]
    read = _entries(stage.training.get("sources"))
    rows = []
    for at, name in enumerate(stage.data):
        tally = read[at] if at < len(read) else {}
        commit = tally.get("commit")
        rows.append(
            [
                code(name),
                _shown(weights[at]) if at < len(weights) else "",
                *(_shown(tally.get(key)) for key in ("documents", "tokens", "passes")),
                code(commit, 12) if isinstance(commit, str) else "",
            ]
        )
    yield from _table(("data", "weight", "documents", "tokens", "passes", "commit"), rows)


def _numbers(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield a table of losses and other logged numbers, at first and at the end."""
    first, last = told.get("first"), told.get("last")
    rows: list[list[str]] = []
    if isinstance(first, dict) and isinstance(last, dict):
        rows += [
            [_NAMES.get(name) or plain(name), _shown(first[name]), _shown(last[name])]
            for name in _in_order(last)
            if is_number(first.get(name)) and is_number(last[name])
        ]
    rows += _held_out(_validation(told))
    yield from _table(("on the way", "at first", "at the end"), rows)


def _in_order(names: Iterable[str]) -> list[str]:
    """Return what is known in the order it is told, then the rest."""
    given = list(names)
    return [name for name in _NAMES if name in given] + [n for n in given if n not in _NAMES]


def _held_out(entries: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    if not entries:
        return
    first, last = entries[0], entries[-1]
    if is_number(last.get("accuracy")):
        yield from _classified(first, last)
    else:
        ends = (_shown(first.get("loss")), _shown(last.get("loss")))
        yield ["held-out loss, nats per token", *ends]
    if is_number(last.get("share")):
        yield [f"on held-out text: {_REAL}", _shown(first.get("share")), _shown(last["share"])]
    names = _list(last.get("names"))
    pairs = zip(names, _list(first.get("losses")), _list(last.get("losses")), strict=False)
    for name, start, end in pairs if len(names) > 1 else ():
        yield [f"held-out loss on {code(name)}", _shown(start), _shown(end)]


def _classified(first: Mapping[str, Any], last: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield what exits of a classifier do with held-out examples, and what the whole model does."""
    for name, found in (("accuracy", "accuracy"), ("loss, nats per example", "loss")):
        yield [
            f"held-out {name} of the whole model",
            _shown(first.get(found)),
            _shown(last.get(found)),
        ]
    for name in ("accuracy", "agreement with the whole model"):
        key = name.split()[0]
        for at, after in _exits(last).items():
            before = _exits(first).get(at, {})
            yield [
                f"held-out {name} of the exit after {plain(at)} blocks",
                _shown(before.get(key)),
                _shown(after.get(key)),
            ]


def _exits(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    found = entry.get("exits")
    given = found if isinstance(found, dict) else {}
    return {str(at): each for at, each in given.items() if isinstance(each, dict)}


def _validation(told: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return _entries(told.get("validation"))


def _routing(told: Mapping[str, Any]) -> Iterator[str]:
    """Yield one sentence on the routers at the end."""
    found = told.get("routing")
    layers = _entries(found.get("layers")) if isinstance(found, dict) else []
    loads = [layer["load"] for layer in layers if is_number(layer.get("load"))]
    entropies = [layer["entropy"] for layer in layers if is_number(layer.get("entropy"))]
    if not isinstance(found, dict) or not loads or not entropies:
        return
    dead = sum(len(_list(layer.get("dead"))) for layer in layers)
    yield (
        f"Routers over the last {_whole(found.get('steps'))} steps: {dead} experts without a "
        f"token, busiest expert {max(loads):.3g} times the mean of its layer, entropy "
        f"{sum(entropies) / len(entropies):.3g} of an even choice.{_shares(layers)}"
    )
    yield ""


def _shares(layers: Sequence[Mapping[str, Any]]) -> str:
    """Return what null experts left of the real ones, layer by layer; "" where there are none."""
    found = [layer["share"] for layer in layers if is_number(layer.get("share"))]
    if not found:
        return ""
    mean, least, most = sum(found) / len(found), min(found), max(found)
    return f" Of the real experts {mean:.3g} ran, {least:.3g} to {most:.3g} by layer."


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield a table without the columns that are empty in every row; nothing without rows."""
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    if kept:
        yield from table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows])
        yield ""


def _entries(value: object) -> list[Mapping[str, Any]]:
    return [entry for entry in _list(value) if isinstance(entry, dict)]


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _whole(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _shown(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return f"{value:.4g}" if isinstance(value, float) else ""
