"""Which blocks go: evenly spaced by hand, planted useless blocks found on text."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adaconvert import api
from adaconvert.errors import DataError, OptionError, OutputConflictError
from adaconvert.methods.depth.choose import evenly
from adaconvert.methods.depth.config import DepthOptions
from adaconvert.methods.depth.search import loaded
from adaconvert.methods.sources import open_source
from adaconvert.planning.evolution import Levels, Stage, evolve, greedy

from .conftest import logits_of, opened, skipping

Deep = Callable[..., Path]
WORDS = "the quick brown fox jumps over the lazy dog while seven wizards mix grey potions "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of enough tokens for a few sequences."""
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 40)
    return path


@pytest.fixture
def planted(deep: Deep, tmp_path: Path) -> Path:
    """A model of which blocks 2 and 3 add nothing."""
    source, target = deep("llama"), tmp_path / "planted"
    target.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (target / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for name in tensors:
            if name.startswith(("model.layers.2.", "model.layers.3.")) and name.endswith(
                ("o_proj.weight", "down_proj.weight")
            ):
                tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, target / path.name, metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("blocks", "count", "expected"),
    [
        (12, 3, (2, 6, 9)),
        (12, 1, (6,)),
        (30, 7, (3, 7, 11, 15, 19, 23, 27)),
        (6, 4, (1, 2, 3, 4)),
        (3, 1, (1,)),
    ],
)
def test_even_spacing_by_hand(blocks: int, count: int, expected: tuple[int, ...]) -> None:
    assert evenly(blocks, count) == expected


def test_keep_and_compute(deep: Deep) -> None:
    source = deep("llama")
    assert api.plan(source, method="depth", keep=4).options["blocks"] == [2, 4]
    # per block: 2 * (2*32*32 + 2*32*16 + 3*32*64) of matrices and 4 * 32 * 256.5 of attention;
    # the head: 2 * 320 * 32
    block, head = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) + 4 * 32 * 256.5, 2 * 320 * 32
    whole = 6 * block + head
    for gone in range(1, 5):
        share = (whole - gone * block) / whole
        for near in (share - 0.3 * block / whole, share, share + 0.3 * block / whole):
            found = api.plan(source, method="depth", compute=near).options["blocks"]
            assert len(found) == gone  # type: ignore[arg-type]


@pytest.mark.parametrize("search", ["greedy", "evolve"])
def test_a_search_finds_blocks_that_add_nothing(
    search: str, planted: Path, text: Path, tmp_path: Path
) -> None:
    more = {"generations": 8, "offspring": 8} if search == "evolve" else {}
    given = {"search": search, "data": str(text), "data_length": 32}
    target = tmp_path / "out"
    result = api.convert(
        planted, destination=target, method="depth", keep=4, data_tokens=256, **given, **more
    )
    record = json.loads((target / "adaconvert.json").read_text())
    assert record["options"]["blocks"] == [2, 3]
    assert record["options"]["data"] == "text.txt"
    assert torch.equal(logits_of(opened(target)), logits_of(opened(planted)))
    assert any("found by a search" in note for note in result.report.notes)
    assert api.verify(planted, target).ok


def test_fitness_is_the_divergence_from_the_whole_model(deep: Deep, text: Path) -> None:
    source = deep("gemma2")
    options = DepthOptions(keep=4, search="greedy", data=str(text), data_tokens=96, data_length=32)
    model = loaded(options, open_source(str(source)), False)
    assert model.measure((), model.rows) == pytest.approx(0.0, abs=1e-7)
    found = model.measure((2,), model.rows)
    ids, kept = model._ids, model._seen
    with torch.no_grad():
        whole = opened(source)(ids, use_cache=False).logits.log_softmax(-1)
        own = skipping(opened(source), (2,))(ids, use_cache=False).logits.log_softmax(-1)
    by_hand = (whole.exp() * (whole - own)).sum(-1)[kept].mean()
    assert found == pytest.approx(float(by_hand), rel=1e-5)


def test_fitness_is_the_loss(deep: Deep, text: Path) -> None:
    given = {"keep": 4, "search": "greedy", "data_tokens": 96, "data_length": 32}
    options = DepthOptions(data=str(text), fitness="loss", **given)  # type: ignore[arg-type]
    source = deep("llama")
    model = loaded(options, open_source(str(source)), False)
    ids, kept = model._ids, model._seen[:, 1:]
    with torch.no_grad():
        own = skipping(opened(source), (3,))(ids, use_cache=False).logits.log_softmax(-1)
    by_hand = -own[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][kept].mean()
    assert model.measure((3,), model.rows) == pytest.approx(float(by_hand), rel=1e-6)


def test_a_plan_searches_nothing(deep: Deep) -> None:
    report = api.plan(deep("llama"), method="depth", keep=5, search="greedy", data="none.txt")
    assert any("taken to be evenly spaced" in note for note in report.notes)


def test_a_taken_destination_is_refused_before_the_search(deep: Deep, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputConflictError):
        api.convert(
            deep("llama"),
            destination=tmp_path,
            method="depth",
            keep=5,
            search="greedy",
            data="none.txt",
        )


def test_text_that_is_not_there(deep: Deep, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        api.convert(
            deep("llama"),
            destination=tmp_path / "out",
            method="depth",
            keep=5,
            search="greedy",
            data=str(tmp_path / "none.txt"),
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "in one way"),
        ({"drop": "1", "keep": 3}, "in one way"),
        ({"drop": "1-2"}, "cannot be read"),
        ({"keep": 3, "search": "greedy"}, "--data: is missing"),
        ({"drop": "1", "search": "evolve", "data": "a"}, "looks for blocks"),
        ({"keep": 3, "data": "a"}, "does nothing"),
        ({"keep": 3, "search": "greedy", "data": "a", "generations": 3}, "does nothing"),
        ({"keep": 3, "kind": "mod"}, "does nothing with --kind mod"),
        ({"keep": 3, "kind": "drop"}, "unknown choice"),
        ({"drop": "1", "kind": "mod"}, "does nothing with --kind mod"),
        ({"drop": "1-2", "kind": "skip"}, "cannot be read"),
        ({"compute": 1.5}, "out of range"),
    ],
)
def test_options_that_do_not_fit(given: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        DepthOptions(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drop": "6"}, "blocks 0 to 5"),
        ({"drop": "1,1"}, "twice"),
        ({"drop": "0,1,2,3,4,5"}, "no block"),
        ({"keep": 1}, "first and the last stay"),
        ({"keep": 6}, "first and the last stay"),
        ({"compute": 0.99}, "no number of blocks"),
        ({"compute": 0.01}, "no number of blocks"),
    ],
)
def test_blocks_that_cannot_go(given: dict[str, object], message: str, deep: Deep) -> None:
    with pytest.raises(OptionError, match=message):
        api.plan(deep("llama"), method="depth", **given)


def test_an_encoder_is_not_searched(deep: Deep, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="predicts no next token"):
        api.convert(
            deep("bert"),
            destination=tmp_path / "out",
            method="depth",
            keep=4,
            search="greedy",
            data=str(text),
        )


def test_evolution_keeps_the_total_and_finds_the_best() -> None:
    best = (0, 3, 1, 0, 2, 0, 0, 0)
    levels = Levels(low=(0,) * 8, high=(3,) * 7 + (0,))

    def far(vector: tuple[int, ...], amount: int) -> float:
        assert sum(vector) == 6
        assert vector[-1] == 0
        return float(sum(abs(a - b) for a, b in zip(vector, best, strict=True)))

    given = {"generations": 60, "offspring": 12, "seed": 3}
    stages = (Stage(amount=1, survivors=4), Stage(amount=2, survivors=1))
    runs = [evolve((1,) * 6 + (0, 0), levels, far, stages=stages, **given) for _ in range(2)]
    assert runs[0] == runs[1]
    assert runs[0].vector == best
    assert list(runs[0].history) == sorted(runs[0].history, reverse=True)


def test_switches_stay_within_levels() -> None:
    levels = Levels(low=(1, 0, 0), high=(1, 1, 1))
    chance = random.Random(0)
    for _ in range(50):
        assert levels.switched((1, 1, 0), chance) in ((1, 1, 0), (1, 0, 1))
    assert levels.switched((1, 1, 1), chance) == (1, 1, 1)


def test_greedy_takes_the_least_loss_each_time() -> None:
    loss = (5.0, 1.0, 4.0, 2.0, 3.0)

    def total(vector: tuple[int, ...], amount: int) -> float:
        return sum(loss[n] for n, level in enumerate(vector) if level)

    levels = Levels(low=(0,) * 5, high=(0, 1, 1, 1, 0))
    found = greedy(levels.low, levels, total, steps=2, amount=1)
    assert (found.vector, found.fitness, found.history) == ((0, 1, 0, 1, 0), 3.0, (1.0, 3.0))
