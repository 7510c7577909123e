"""What a card tells of rarer manifests, rendered from data alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from adaconvert.arch.calibration import config_digest
from adaconvert.export.card import render
from adaconvert.export.card_text import percent
from adaconvert.io.manifest import MANIFEST_FILE, weights_of

Stages = Callable[[str], Path]


def content(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    record = json.loads((folder / MANIFEST_FILE).read_text())
    return record, json.loads((folder / "config.json").read_text())


def front_of(card: str) -> dict[str, Any]:
    front = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(front, dict)
    return front


def test_hub_data_sets_are_named_and_files_are_not(stages: Stages) -> None:
    record, config = content(stages("finetune"))
    names = ("org/corpus:en", "org/corpus@v1:de", "org/other@refs/pr/1", "texts.jsonl", "a/b/c.txt")
    record["options"]["data"] = [{"name": name, "weight": 1.0} for name in names]
    assert front_of(render(record, config))["datasets"] == [
        "org/corpus",
        "org/other",
    ]


def test_held_out_losses_and_all_tokens_are_told(stages: Stages) -> None:
    record, config = content(stages("finetune"))
    record["training"]["validation"] = [
        {"step": 0, "loss": 3.0, "names": ["a", "b"], "losses": [2.0, 4.0]},
        {"step": 2, "loss": 2.5, "names": ["a", "b"], "losses": [1.5, 3.5]},
    ]
    text = render(record, config)
    assert "| held-out loss, nats per token | 3 | 2.5 |" in text
    assert "| held-out loss on `b` | 4 | 3.5 |" in text
    assert "Only its training loss is known" not in text
    stage = {**record["history"][0], "method": "finetune", "training": record["training"]}
    record["history"].append({**stage, "options": record["options"], "into": "first"})
    text = render(record, config)
    assert "All fine-tunes together: 256 tokens." in text
    assert "# tiny, upcycled to 4 experts, fine-tuned\n" in text


def test_a_finetune_that_leaves_routers_alone_leaves_them_untrained(stages: Stages) -> None:
    record, config = content(stages("finetune"))
    assert "The routers are not trained." not in render(record, config)
    record["training"]["by_part"]["router"] = 0
    assert "- The routers are not trained.\n" in render(record, config)


def calibrated(config: dict[str, Any], record: dict[str, Any], chosen: int | None) -> None:
    """Give a checkpoint a table that belongs to it."""
    rows = [
        {"name": name, "compute": c, "loss": 2 - c, "loss_increase": 1 - c, "changed": 1 - c}
        for name, c in (("few", 0.5), ("all experts", 1.0))
    ]
    config["adaptive"]["calibration"] = {
        "digests": {"weights": weights_of(record), "config": config_digest(config)},
        "rows": rows,
        "chosen": chosen,
        "phase": "prefill",
        "split": {"evaluation": 9, "unit": "block"},
    }
    record["notes"] += ["calibrated: few, no promise", "calibration: rises were clipped"]


def test_a_calibrated_default_comes_before_what_was_converted(stages: Stages) -> None:
    record, config = content(stages("d2dmoe"))
    assert "Every expert runs until --tau" in render(record, config)
    calibrated(config, record, 0)
    text = render(record, config)
    assert "**Class: exact.** As converted: the neurons are only put" in text
    assert "Its default is now the calibrated setting `few`: 50 % of the reference's" in text
    assert "Every expert runs until" not in text
    assert "Default: few, no promise.\n- Rises were clipped." in text
    assert "Before it was calibrated:" in text
    assert "model.set_compute(0.5)" in text
    # the note on the choice is no note on limits
    assert text.count("few, no promise") == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"rows": [{"name": "x"}]},
        {"rows": []},
        {"chosen": 7},
        {"chosen": "0"},
        {"rows": [{"name": "x", "compute": True}]},
        {"split": None},
    ],
)
def test_a_damaged_table_is_left_out(damage: dict[str, Any], stages: Stages) -> None:
    record, config = content(stages("moefy"))
    calibrated(config, record, 0)
    config["adaptive"]["calibration"] |= damage
    text = render(record, config)
    assert "## Compute and loss" not in text
    assert "Its calibration table is left out: it is damaged." in text


def test_what_is_not_known_is_left_out(stages: Stages) -> None:
    record, _ = content(stages("upcycle"))
    bare = {key: record[key] for key in record if key not in {"card", "history"}}
    bare |= {"method": "newer", "options": {}, "verification": None}
    text = render(bare, {"architectures": ["Strange"], "model_type": "strange"})
    assert front_of(text) == {"library_name": "transformers", "tags": ["adaconvert"]}
    assert "1. **newer**: made from `org/tiny`" in text
    assert "**Not verified**" in text
    assert "AutoModel.from_pretrained" in text


def test_a_quantised_result_says_so_to_the_hub(stages: Stages) -> None:
    record, config = content(stages("upcycle"))
    config["quantization_config"] = {"quant_method": "x"}
    assert front_of(render(record, config))["base_model_relation"] == "quantized"


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.5, "50 %"),
        (0.999, "99.9 %"),
        (0.00123, "0.123 %"),
        (2, "200 %"),
    ],
)
def test_shares_are_told_without_exponents(share: float, text: str) -> None:
    assert percent(share) == text
