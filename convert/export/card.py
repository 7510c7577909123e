"""The model card (README.md) of a checkpoint of any stage, made from its manifest and config.json.

Nothing else enters it, so that it can be made again from the folder at any time, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from adaconvert.arch.base import ModelSpec
from adaconvert.arch.registry import describe
from adaconvert.errors import AdaconvertError
from adaconvert.export import (
    card_adapters,
    card_calibration,
    card_classes,
    card_depth,
    card_exits,
    card_proof,
    card_sections,
    card_training,
)
from adaconvert.export.card_classes_plot import plot_classes
from adaconvert.export.card_facts import LICENSE_KEYS, license_of
from adaconvert.export.card_plot import plot
from adaconvert.export.card_stages import (
    datasets,
    made_lines,
    merged_at,
    stages_of,
    tags,
    title,
)
from adaconvert.export.card_text import is_hub_id, yaml_text
from adaconvert.export.card_told import Told
from adaconvert.io.adapter_files import ADAPTER_CONFIG
from adaconvert.io.card_file import CARD, CLASSES_PLOT, MARKER, PLOT, RECIPE
from adaconvert.io.commit import Staging
from adaconvert.io.regular import read_text
from adaconvert.io.source_config import CONFIG_FILE, MAX_CONFIG_BYTES
from adaconvert.io.strict_json import load_object

_MAX_RECIPE: Final = 1 << 20


def told_of(
    record: Mapping[str, Any], config: Mapping[str, Any], recipe: str | None = None
) -> Told:
    """Return what a card tells.

    Args:
        record: content of adaconvert.json, of any stage and version; what it lacks is left out.
        config: content of config.json.
        recipe: text of the recipe the folder was made by, None without one.
    """
    calibration, stale = card_calibration.calibration_of(config, record)
    return Told(
        record=record,
        config=config,
        recipe=recipe,
        stages=stages_of(record),
        calibration=calibration,
        classes=card_classes.classes_of(record),
        stale=tuple(stale),
        spec=_spec(config),
    )


def _spec(config: Mapping[str, Any]) -> ModelSpec | None:
    try:
        return describe(config)
    except AdaconvertError:
        return None


def render(record: Mapping[str, Any], config: Mapping[str, Any], recipe: str | None = None) -> str:
    """Return the text of the card; arguments as for `told_of`."""
    return _text(told_of(record, config, recipe))


def card_files(folder: Path, record: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the card of an output and the drawing beside it, by file name.

    Args:
        folder: holds its config.json or adapter_config.json, and the recipe if there is one.
        record: content of its adaconvert.json.

    Raises:
        SourceError: config.json is missing or damaged.
    """
    name = CONFIG_FILE if os.path.lexists(folder / CONFIG_FILE) else ADAPTER_CONFIG
    config = load_object(folder / name, name, MAX_CONFIG_BYTES)
    # as it will be read back: keys in their order in the file
    read = json.loads(json.dumps(record, sort_keys=True))
    told = told_of(read, config, _recipe(folder))
    files = {CARD: _text(told).encode()}
    drawn = None if told.calibration is None else plot(told.calibration)
    if drawn is not None:
        files[PLOT] = drawn
    if told.classes is not None:
        files[CLASSES_PLOT] = plot_classes(told.classes)
    return files


def write_card(staging: Staging, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest of an output whose card and drawing are written, with all files listed.

    Args:
        staging: holds everything else but the manifest.
        record: the manifest so far, with its "card" entry.
    """
    files = card_files(staging.path, record)
    for name, data in files.items():
        staging.write_file(name, data)
    return with_card(record, staging.files, staging.files[CARD])


def with_card(record: Mapping[str, Any], files: Mapping[str, str], sha256: str) -> dict[str, Any]:
    """Return a manifest that lists files, and knows the card adaconvert wrote.

    Args:
        record: the manifest so far.
        files: sha256 of every file but the shards.
        sha256: of the card as adaconvert makes it, whether or not it is among the files.
    """
    card = record.get("card")
    facts = card if isinstance(card, dict) else {}
    return {**record, "card": {**facts, "sha256": sha256}, "files": dict(files)}


def _recipe(folder: Path) -> str | None:
    try:
        return read_text(folder / RECIPE, RECIPE, _MAX_RECIPE)
    except AdaconvertError:
        return None


def _text(told: Told) -> str:
    name = told.facts.get("name")
    lines = [
        *_front_matter(told),
        "",
        MARKER,
        f"# {title(told.stages, name if isinstance(name, str) else None)}",
        "",
        card_adapters.intro(told) if told.is_adapter else card_sections.intro(told),
        "",
        card_sections.class_line(told),
        "",
        *card_sections.size(told),
        *("## How it was made", "", *made_lines(told.stages), ""),
        *card_proof.verification(told),
        *card_training.section(told.stages),
        *card_proof.quality(told),
        *card_classes.section(told.classes),
        *([] if told.calibration is None else card_calibration.section(told.calibration)),
        *(card_adapters.loading(told) if told.is_adapter else card_sections.loading(told)),
        *card_exits.section(told),
        *card_depth.section(told),
        *card_sections.using(told),
        *card_sections.runtimes(told),
        *card_sections.limits(told),
        *card_sections.recipe(told),
        *card_sections.license_section(told),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front_matter(told: Told) -> list[str]:
    lines = ["---", f"library_name: {'peft' if told.is_adapter else 'transformers'}"]
    if told.pipeline:
        lines.append(f"pipeline_tag: {told.pipeline}")
    lines += _license_lines(told)
    listed = told.facts.get("base_models")
    bases = [base for base in (listed if isinstance(listed, list) else []) if is_hub_id(base)]
    if bases:
        lines += ["base_model:", *(f"- {base}" for base in bases)]
        lines.append(f"base_model_relation: {_relation(told)}")
    trained_on = datasets(told.stages)
    if trained_on:
        lines += ["datasets:", *(f"- {name}" for name in trained_on)]
    return [*lines, "tags:", *(f"- {tag}" for tag in _tags(told)), "---"]


def _license_lines(told: Told) -> list[str]:
    found = license_of(told.facts.get("license"))
    if not found and _all_stated(told.facts.get("licenses")):
        return ["license: other", "license_name: those-of-the-base-models"]
    lines = []
    for key in LICENSE_KEYS:
        value = found.get(key)
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {yaml_text(item)}" for item in value)]
        elif value is not None:
            lines.append(f"{key}: {yaml_text(value)}")
    return lines


def _all_stated(entries: object) -> bool:
    return isinstance(entries, list) and bool(entries) and all(map(license_of, entries))


def _relation(told: Told) -> str:
    """Return how the hub relates it to its base model; a converted model counts as fine-tuned."""
    if told.is_adapter:
        return "adapter"
    if merged_at(told.stages) is not None:
        return "merge"
    return "quantized" if told.config.get("quantization_config") else "finetune"


def _tags(told: Told) -> list[str]:
    found = ["adaconvert", *tags(told.stages)]
    if told.is_mixture and (told.is_split or not told.is_adaptive):
        found.append("moe")
    exits, depth = card_exits.found_exits(told.config), card_depth.found(told.config)
    if told.is_split or exits is not None or depth:
        found.append("adaptive-compute")
    if told.config.get("auto_map"):
        found.append("custom_code")
    return list(dict.fromkeys(found))
