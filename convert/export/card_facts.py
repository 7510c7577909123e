"""What a card needs that only its writer knows: licence, base models and costs of the source.

It is kept in the manifest, so that the card can be made again from the folder alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from adaconvert.arch.registry import describe
from adaconvert.errors import AdaconvertError
from adaconvert.export.card_text import is_hub_id
from adaconvert.io import manifest
from adaconvert.io.adapter_files import ADAPTER_CONFIG
from adaconvert.io.card_file import CARD
from adaconvert.io.regular import read_text
from adaconvert.io.source import Source
from adaconvert.io.source_config import MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object
from adaconvert.planning.estimate import Costs, costs

LICENSE_KEYS: Final = ("license", "license_name", "license_link")
_MAX_CARD: Final = 1 << 20
_MAX_FRONT: Final = 64 << 10
#: longest list and name that is taken over from another manifest.
_MOST: Final = 200
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)
_VALUE = re.compile(r"[\w .:/+#?=&%~(),-]{1,200}", re.ASCII)


def facts_of(
    sources: Sequence[Source],
    result: Path,
    *,
    inherit_costs: bool = False,
    after: Mapping[str, int] | None = None,
    places: Sequence[Path] = (),
) -> dict[str, Any]:
    """Return the "card" entry of the manifest of a new output.

    Args:
        sources: what it was made of.
        result: folder that holds its config.json and weights.
        inherit_costs: compare costs with what the source is compared with, not with the source.
        after: what the result costs, where its folder does not say (a PEFT folder); else None.
        places: folders that the only source stands for, adapters and then their base, as its own
            has no card; each thing is taken from the first that tells it.
    """
    cards = [_card_at(source.root) for source in sources] if not places else [_card_at(places[0])]
    licenses = [entry for source in sources for entry in _licenses_of(source, places)]
    bases = [base for source in sources for base in _bases_of(source, places)]
    stated = [license_of(entry) for entry in licenses]
    same = all(license == stated[0] for license in stated)
    inherited = known_costs(cards[0].get("before")) if inherit_costs else None
    return {
        "name": _name(sources[0], cards[0]),
        "license": stated[0] if same else {},
        "licenses": [] if same else licenses,
        "base_models": list(dict.fromkeys(bases))[:_MOST],
        "before": inherited if inherit_costs else _before(sources[0]),
        "after": costs_of(result) if after is None else dict(after),
    }


def recovered_facts(folder: Path) -> dict[str, Any]:
    """Return the "card" entry of a checkpoint whose manifest has none: what its files still say."""
    front = front_matter(folder)
    return {
        "license": license_of(front),
        "licenses": [],
        "base_models": _bases("", front, {})[:_MOST],
        "before": None,
        "after": costs_of(folder),
    }


def _card_at(folder: Path) -> Mapping[str, Any]:
    card = manifest.peek(folder).get("card")
    return card if isinstance(card, dict) else {}


def _licenses_of(source: Source, places: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the licences of a source, from the first place that tells any."""
    found = [
        _licenses(source.label, front_matter(place), _card_at(place))
        for place in places or (source.root,)
    ]
    return next((one for one in found if any(map(license_of, one))), found[0])


def _bases_of(source: Source, places: Sequence[Path]) -> list[str]:
    """Return the hub ids of a source, from the first place that tells any."""
    found = (
        _bases(source.label, front_matter(place), _card_at(place)) or _adapted_base(place)
        for place in places or (source.root,)
    )
    return next(filter(None, found), [])


def _adapted_base(folder: Path) -> list[str]:
    """Return the hub id of the model that a folder of adapters names."""
    with suppress(AdaconvertError):
        raw = load_object(folder / ADAPTER_CONFIG, ADAPTER_CONFIG, MAX_CONFIG_BYTES)
        named = raw.get("base_model_name_or_path")
        # a path such as models/dense looks like a hub id
        return [named] if is_hub_id(named) and not Path(named).exists() else []
    return []


def _licenses(
    label: str, front: Mapping[str, Any], card: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the licences of a source, each with the checkpoint it is of."""
    own = license_of(front) or license_of(card.get("license"))
    several = card.get("licenses")
    if own or not isinstance(several, list) or not several:
        return [{"source": label, **own}]
    return [
        {"source": str(entry.get("source"))[:_MOST], **license_of(entry)}
        for entry in several[:_MOST]
        if isinstance(entry, dict)
    ]


def _name(source: Source, card: Mapping[str, Any]) -> str:
    kept = card.get("name")
    return kept[:_MOST] if isinstance(kept, str) else source.label.split("/")[-1]


def _bases(label: str, front: Mapping[str, Any], card: Mapping[str, Any]) -> list[str]:
    """Return the hub ids a source is, or was made of."""
    if is_hub_id(label):
        return [label]
    known = card.get("base_models") or front.get("base_model")
    listed = known if isinstance(known, list) else [known]
    return [base for base in listed if is_hub_id(base)]


def license_of(front: object) -> dict[str, Any]:
    """Return the licence entries of a front matter whose values are plain text."""
    if not isinstance(front, dict):
        return {}
    found = {key: _license_value(front.get(key)) for key in LICENSE_KEYS}
    return {key: value for key, value in found.items() if value} if found["license"] else {}


def _license_value(value: object) -> str | list[str] | None:
    if isinstance(value, list):
        kept = [item for item in value if isinstance(item, str) and _VALUE.fullmatch(item)]
        return kept[0] if len(kept) == 1 else kept or None
    return value if isinstance(value, str) and _VALUE.fullmatch(value) else None


def front_matter(folder: Path) -> dict[str, Any]:
    """Return the front matter of a folder's card; nothing when there is none that can be read."""
    import yaml

    try:
        found = _FRONT.match(read_text(folder / CARD, CARD, _MAX_CARD))
    except AdaconvertError:
        return {}
    if found is None or len(found[1]) > _MAX_FRONT:
        return {}
    try:
        content = yaml.safe_load(found[1])
    # the constructors of its types raise what they like
    except (yaml.YAMLError, ValueError, TypeError, ArithmeticError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def entries_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what `evaluate --record` measured: an entry for each text, the oldest first."""
    found = record.get("quality")
    # once there was one entry, of the last text
    every = found if isinstance(found, list) else [found]
    return [entry for entry in every if isinstance(entry, dict)]


def known_costs(value: object) -> dict[str, Any] | None:
    """Return the costs a manifest states; None when it does not."""
    if not isinstance(value, dict):
        return None
    found = {field.name: value.get(field.name) for field in fields(Costs)}
    if not all(type(number) is int and number >= 0 for number in found.values()):
        return None
    of = value.get("of")
    return {"of": of[:_MOST], **found} if isinstance(of, str) else found


def _before(source: Source) -> dict[str, Any] | None:
    found = _costs(source)
    return None if found is None else {"of": source.label, **found}


def costs_of(folder: Path) -> dict[str, int] | None:
    """Return what the checkpoint in a folder costs; None when its family is not known."""
    try:
        return _costs(Source.open(folder))
    except AdaconvertError:
        return None


def _costs(source: Source) -> dict[str, int] | None:
    dtypes = {name: ref.dtype for name, ref in source.tensors.items()}
    try:
        return costs(describe(source.config, source.tensors), dtypes).to_json()
    except AdaconvertError:
        return None
