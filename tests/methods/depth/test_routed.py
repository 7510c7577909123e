"""Checkpoints whose tokens may skip blocks, as they are converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaconvert import api
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.modeling.loading import load_model
from adaconvert.testing.depth_by_hand import FAMILIES

from .conftest import BLOCKS, inputs_of, logits_of, opened

WAYS = {
    "skip": {"kind": "skip"},
    "skip-kv": {"kind": "skip", "kv": "skip", "adapter_width": 0, "router_width": 8},
    "mod": {"kind": "mod"},
    "mod-router": {"kind": "mod", "predictor": "router", "gate": 0.0, "layers": "1,3-4"},
}
Deep = Callable[..., Path]
#: how both sides are computed where they must agree but for the order of sums.
EXACT: dict[str, Any] = {"dtype": "float64"}
#: the fused experts of transformers know no float64.
EAGER = {"experts_implementation": "eager"}


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuse logits that differ by more than rounding in float64."""
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_token_runs_every_block_as_written(
    deep: Deep, tmp_path: Path, family: str, way: str
) -> None:
    source = deep(family)
    api.convert(source, destination=tmp_path / "out", method="depth", **WAYS[way])
    given = {**EXACT, **(EAGER if family == "mixtral" else {})}
    dense, made = opened(source, **given), load_model(tmp_path / "out", **given)
    assert_same(logits_of(made), logits_of(dense))
    indices = [block.adaptive_layer["index"] for block in made.adaptive_depth().values()]
    assert indices == {"mod": [3], "mod-router": [1, 3, 4]}.get(way, [2, 3, 4])
    with made.account() as account, torch.no_grad():
        made(**inputs_of(made))
    assert all(layer.run == layer.tokens > 0 for layer in account.layers.values())
    assert api.verify(source, tmp_path / "out").ok


def test_blocks_that_no_token_runs_run_adapters(deep: Deep, tmp_path: Path) -> None:
    source = deep("llama")
    given: dict[str, Any] = {"method": "depth", "drop": "1,3"}
    api.convert(source, destination=tmp_path / "out", kind="skip", **given)
    api.convert(source, destination=tmp_path / "dropped", **given)
    made, dropped = load_model(tmp_path / "out", **EXACT), opened(tmp_path / "dropped", **EXACT)
    # as written adapters add nothing
    assert_same(logits_of(made), logits_of(dropped))
    slots = {block.adaptive_layer["index"]: block.adaptive_layer for block in _blocks(made)}
    assert list(slots) == [1, 2, 3, 4]
    assert [slots[index]["select"]["rule"] for index in slots] == [
        *("none", "threshold", "none", "threshold")
    ]
    # nobody attends in them
    assert [slots[index]["kv"] for index in slots] == ["skip", "keep", "skip", "keep"]
    with made.account() as account, torch.no_grad():
        made(**inputs_of(made))
    assert [layer.run > 0 for layer in account.layers.values()] == [False, True, False, True]
    with made.set_depth("all"):
        assert_same(logits_of(made), logits_of(opened(source, **EXACT)))
    assert api.verify(source, tmp_path / "out").ok


def _blocks(model: Any) -> list[Any]:
    return list(model.adaptive_depth().values())


def test_what_was_routed_beside_experts_and_exits_stays(deep: Deep, tmp_path: Path) -> None:
    source = deep("llama")
    api.convert(source, destination=tmp_path / "split", method="moefy", num_experts=4)
    api.convert(tmp_path / "split", destination=tmp_path / "exits", method="early-exit", exits="3")
    api.convert(tmp_path / "exits", destination=tmp_path / "out", method="depth", kind="skip")
    dense, made = opened(source, **EXACT), load_model(tmp_path / "out", **EXACT)
    assert_same(logits_of(made), logits_of(dense))
    assert len(made.adaptive_sites()) == BLOCKS
    assert list(made.adaptive_exits()) == [3]
    assert len(made.adaptive_depth()) == 3


def test_the_backbone_and_the_seed(deep: Deep, tmp_path: Path) -> None:
    source = deep("llama")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        api.convert(source, destination=tmp_path / name, method="depth", kind="skip", seed=seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1] != (tmp_path / "three" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "mod", "capacity": 0.0}, "selects no token"),
        ({"kind": "mod", "capacity": 1.5}, "capacity"),
        ({"kind": "mod", "kv": "skip"}, "does nothing with --kind mod"),
        ({"kind": "skip", "keep": 2}, "does nothing with --kind skip"),
        ({"kind": "skip", "gate": 0.1}, "does nothing with --kind skip"),
        ({"kind": "skip", "data": "text.txt"}, "does nothing with --kind skip"),
        ({"kind": "skip", "generations": 3}, "does nothing with --kind skip"),
        ({"keep": 3, "capacity": 0.5}, "does nothing with --kind layer-drop"),
        ({"kind": "skip", "layers": "2;3"}, "cannot be read"),
        ({"kind": "skip", "layers": "2,1-3"}, "twice"),
        ({"kind": "skip", "layers": "3-1"}, "names no block"),
        ({"kind": "skip", "layers": "2", "every": 2}, "names the blocks already"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DepthOptions(**options)


def test_blocks_that_are_not_there_are_refused(deep: Deep, tmp_path: Path) -> None:
    for options, message in (({"layers": "6"}, "blocks 0 to 5"), ({"every": 4}, "at most 3")):
        with pytest.raises(OptionError, match=message):
            api.convert(
                deep("llama"), destination=tmp_path / "out", method="depth", kind="skip", **options
            )
    assert not (tmp_path / "out").exists()


def test_models_whose_tokens_cannot_skip_are_refused(deep: Deep, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no causal language model"):
        api.plan(deep("bert"), method="depth", kind="skip")
    api.convert(deep("llama"), destination=tmp_path / "out", method="depth", kind="mod")
    with pytest.raises(SourceError, match="skip already"):
        api.plan(tmp_path / "out", method="depth", kind="skip")
    with pytest.raises(SourceError, match="is adaptive"):
        api.plan(tmp_path / "out", method="depth", keep=4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    site = next(iter(config["adaptive"]["sites"].values()))
    site["layer"]["router"]["width"] = "wide"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match="not usable"):
        api.plan(tmp_path / "out", method="early-exit", exits="3")
