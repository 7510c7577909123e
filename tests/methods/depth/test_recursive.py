"""Checkpoints whose blocks share matrices, as they are converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert import api
from adaconvert.arch.registry import describe
from adaconvert.errors import OptionError, SourceError
from adaconvert.methods.depth.config import FULL, SHARINGS, STARTS, DepthOptions
from adaconvert.modeling.adaptive_recursion_schema import FULL as RUNTIME_FULL
from adaconvert.modeling.adaptive_recursion_schema import SHARINGS as RUNTIME_SHARINGS
from adaconvert.modeling.adaptive_recursion_schema import STARTS as RUNTIME_STARTS
from adaconvert.modeling.loading import load_model
from adaconvert.planning.functions import FUNCTIONS
from adaconvert.testing.depth_by_hand import FAMILIES
from adaconvert.testing.stored import tensors_of

from .conftest import logits_of, opened

Deep = Callable[..., Path]
Made = Callable[..., Path]


@pytest.fixture
def recursive(deep: Deep, tmp_path: Path) -> Made:
    """Return what makes a recursive checkpoint of a family, two loops unless told otherwise."""

    def make(family: str = "llama", name: str = "out", **options: Any) -> Path:
        given = {"method": "depth", "kind": "recursive", "loops": 2, **options}
        api.convert(deep(family), destination=tmp_path / name, **given)
        return tmp_path / name

    return make


def distance(model: Any, expected: torch.Tensor) -> float:
    return float((logits_of(model) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_gives_back_the_source(family: str, deep: Deep, recursive: Made) -> None:
    made = recursive(family, rank="full")
    model = load_model(made, dtype="float32")
    assert distance(model, logits_of(opened(deep(family)))) < 1e-5
    assert api.verify(deep(family), made).ok
    ids = model.generate(torch.arange(5, 12)[None], max_new_tokens=4, min_new_tokens=4)
    assert ids.shape == (1, 11)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("start", STARTS)
def test_every_way_of_sharing_gives_back_the_source_at_full_rank(
    sharing: str, start: str, deep: Deep, recursive: Made
) -> None:
    made = recursive(sharing=sharing, start=start, rank="full")
    assert distance(load_model(made), logits_of(opened(deep("llama")))) < 1e-5


@pytest.mark.parametrize("start", ["average", "lower"])
def test_what_is_lost_falls_with_the_rank_and_nothing_is_stored_twice(
    start: str, deep: Deep, recursive: Made
) -> None:
    expected = logits_of(opened(deep("llama")))
    found = []
    for rank in (0, 4, 16, 24, "full"):
        made = recursive(name=f"rank-{rank}", rank=rank, start=start)
        model = load_model(made)
        found.append(distance(model, expected))
        stored = sum(tensor.numel() for tensor in tensors_of(made).values())
        assert stored == sum(parameter.numel() for parameter in model.parameters())
        if rank == 0:
            blocks = model.model.layers
            for one, other in ((0, 3), (1, 4), (2, 5)):
                pointers = [blocks[at].mlp.up_proj.weight.data_ptr() for at in (one, other)]
                assert pointers[0] == pointers[1]
    assert found[-1] < 1e-5 < found[-2] < found[0]
    assert found[2] < found[0]


@pytest.mark.parametrize("loops", [2, 3, 6])
def test_parameters_are_those_of_the_formula(loops: int, deep: Deep, recursive: Made) -> None:
    rank, hidden, ffn, keys = 4, 32, 64, 16
    source = tensors_of(deep("llama"))
    made = tensors_of(recursive(rank=rank, loops=loops))
    shapes = [
        *[(hidden, hidden)] * 2,
        *[(keys, hidden)] * 2,
        *[(ffn, hidden)] * 2,
        (hidden, ffn),
    ]
    matrices = sum(m * n for m, n in shapes)
    residuals = 6 * rank * sum(m + n for m, n in shapes)
    before = sum(tensor.numel() for tensor in source.values())
    after = sum(tensor.numel() for tensor in made.values())
    assert after == before - (6 - 6 // loops) * matrices + residuals
    # said before anything is written
    plan = api.plan(deep("llama"), method="depth", kind="recursive", loops=loops, rank=rank)
    text = "\n".join(plan.lines())
    assert f"{after:,} parameters in place of {before:,}" in text
    assert f"{residuals:,} of residuals" in text


def test_norms_and_biases_stay_each_depths_own(deep: Deep, recursive: Made) -> None:
    source, made = tensors_of(deep("qwen2")), tensors_of(recursive("qwen2", rank=2))
    kept = [name for name in source if "norm" in name or name.endswith("bias")]
    assert kept
    assert all(torch.equal(source[name], made[name]) for name in kept)


def test_one_loop_changes_nothing(deep: Deep, recursive: Made) -> None:
    source, made = tensors_of(deep("llama")), tensors_of(recursive(loops=1))
    assert set(source) == set(made)
    assert all(torch.equal(source[name], made[name]) for name in source)


def test_what_is_saved_again_is_the_same(recursive: Made, tmp_path: Path) -> None:
    made = recursive(rank=4)
    model = load_model(made)
    model.save_pretrained(tmp_path / "again")
    first, again = tensors_of(made), tensors_of(tmp_path / "again")
    assert set(first) == set(again)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_it_is_inspected_trained_and_measured(deep: Deep, recursive: Made, tmp_path: Path) -> None:
    made = recursive(rank=4)
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat and slept. " * 200)
    said = "\n".join(api.inspect(made).lines())
    assert "blocks share matrices (0 and 3; 1 and 4; 2 and 5), with residuals of rank 4" in said
    card = (made / "README.md").read_text()
    assert "blocks that share matrices, each run 2 times" in card
    result = api.finetune(
        made,
        tmp_path / "tuned",
        **{"data": [str(text)], "steps": 8, "seq_len": 32, "batch_size": 4, "lr": 3e-3},
        **{"distill": 1.0, "teacher": str(deep("llama")), "save_every": 0},
    )
    assert result.summary["last"]["lm"] < result.summary["first"]["lm"]
    assert set(tensors_of(tmp_path / "tuned")) == set(tensors_of(made))
    # every depth runs its matrices, so compute is the source's and a little more
    costs, whole = api.inspect(made).costs, api.inspect(deep("llama")).costs
    assert costs is not None
    assert whole is not None
    rank, ends = 4, 6 * (2 * 64 + 2 * 48 + 3 * 96)
    assert costs.flops == whole.flops + 2 * rank * ends
    assert costs.total_params < whole.total_params


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loops": 4}, "does not divide the 6 blocks"),
        ({"loops": 3, "sharing": "middle-cycle"}, "does not divide the 4 blocks between"),
        ({"loops": None}, "--loops: is missing"),
        ({"rank": "half"}, "is no rank"),
        ({"rank": -1}, "is no rank"),
        ({"start": "random"}, "unknown choice"),
        ({"sharing": "all"}, "unknown choice"),
        ({"kv": "skip"}, "does nothing with --kind recursive"),
        ({"drop": "3"}, "does nothing with --kind recursive"),
        ({"seed": 1}, "does nothing with --kind recursive"),
        ({"kind": "skip"}, "does nothing with --kind skip"),
        ({"kind": "layer-drop", "keep": 4}, "does nothing with --kind layer-drop"),
    ],
)
def test_what_cannot_be(given: dict[str, Any], message: str, recursive: Made) -> None:
    with pytest.raises(OptionError, match=message):
        recursive(**given)


def test_divisors_are_named_and_other_parts_come_before(
    deep: Deep, recursive: Made, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="2 or 3 or 6"):
        recursive(loops=4)
    made = recursive()
    for method, options in {
        "depth": {"kind": "skip"},
        "early-exit": {"exits": "3"},
        "moefy": {"num_experts": 4},
    }.items():
        with pytest.raises(SourceError):
            api.plan(made, method=method, **options)
    split = tmp_path / "split"
    api.convert(deep("llama"), destination=split, method="moefy", num_experts=4)
    with pytest.raises(SourceError, match="is adaptive"):
        api.plan(split, method="depth", kind="recursive", loops=2)


def test_names_are_those_of_the_runtime() -> None:
    assert SHARINGS == RUNTIME_SHARINGS
    assert STARTS == RUNTIME_STARTS
    assert FULL == RUNTIME_FULL
    assert DepthOptions(kind="recursive", loops=2, rank=8).own_rank == 8


@pytest.mark.parametrize("shape", [(8, 20), (20, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_residuals_are_the_best_of_their_rank(shape: tuple[int, int], transposed: bool) -> None:
    rng = numpy.random.default_rng(0)
    own, shared = (rng.standard_normal(shape).astype("float32") for _ in "ab")
    left, sizes, right = numpy.linalg.svd((own - shared).astype("float64"), full_matrices=False)
    for rank in (1, 5, 8):
        given = [matrix.T if transposed else matrix for matrix in (own, shared)]
        both = FUNCTIONS["residual"](given, {"rank": rank, "transposed": transposed}, 0)
        up = both[: shape[0] * rank].reshape(shape[0], rank)
        down = both[up.size :].reshape(rank, shape[1])
        best = (left[:, :rank] * sizes[:rank]) @ right[:rank]
        # the factors are stored in float32
        close = 1e-6 * numpy.abs(best).max()
        numpy.testing.assert_allclose(up.astype("float64") @ down, best, rtol=0, atol=close)


@pytest.mark.parametrize(
    ("key", "value"), [("base", [0, 1, 2, 0, 1, -1]), ("linears", "abc"), ("rank", -1)]
)
def test_a_damaged_description_is_refused(key: str, value: Any, recursive: Made) -> None:
    made = recursive(rank=2)
    config = json.loads((made / "config.json").read_text())
    config["adaptive"]["model"]["recursion"][key] = value
    with pytest.raises(SourceError, match="recursion is not usable"):
        describe(config)
