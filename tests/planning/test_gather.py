"""Reordering stored tensors: bit for bit, in any dtype, in parts or whole, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from adaconvert.io.reader import read_numpy
from adaconvert.io.source import Source
from adaconvert.planning import gather
from adaconvert.planning.accounting import PlanError, check_plan, pieces_of
from adaconvert.planning.evaluate import evaluate, stored_parts
from adaconvert.planning.ops import (
    Apply,
    Bytes,
    Exactness,
    Fitted,
    Gather,
    Piece,
    Plan,
    TargetTensor,
)

N = 6
ORDER = np.array([3, 0, 5, 1, 4, 2])


def source_of(folder: Path, tensor: torch.Tensor, order: torch.Tensor | None = None) -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"x": tensor.contiguous()}
    if order is not None:
        tensors["order"] = order
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Source.open(folder)


def stored(source: Source, name: str = "x") -> Bytes:
    ref = source.tensors[name]
    piece = Piece(source=0, tensor=name, start=0, nbytes=ref.nbytes)
    return Bytes(dtype=ref.dtype, shape=ref.shape, pieces=(piece,))


def node(source: Source, **changes: object) -> Gather:
    arg = stored(source)
    order = Fitted(key="order", shape=(N,), digest="")
    return replace(Gather(arg=arg, shape=arg.shape, order=order), **changes)  # type: ignore[arg-type]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    made.view(-1)[0] = float("nan")
    return made


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("shape", "axis"), [((N, 5), 0), ((5, N), 1), ((N,), 0)])
def test_elements_move_as_bits(
    dtype: str, shape: tuple[int, ...], axis: int, tmp_path: Path
) -> None:
    source = source_of(tmp_path, values(getattr(torch, dtype), *shape))
    bits = read_numpy(source, source.tensors["x"])
    found = gather.gathered(node(source, axis=axis), [source], {"order": ORDER})
    assert found.dtype == bits.dtype
    assert found.tobytes() == bits.take(ORDER, axis=axis).tobytes()
    back = gather.gathered(node(source, axis=axis, inverse=True), [source], {"order": ORDER})
    assert back.take(ORDER, axis=axis).tobytes() == bits.tobytes()


def test_runs_are_reordered_alike(tmp_path: Path) -> None:
    source = source_of(tmp_path, values(torch.float32, 2 * N, 3))
    bits = read_numpy(source, source.tensors["x"])
    found = gather.gathered(node(source, runs=2), [source], {"order": ORDER})
    wanted = np.concatenate([bits[:N][ORDER], bits[N:][ORDER]])
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_some_positions_can_be_taken(axis: int, tmp_path: Path) -> None:
    source = source_of(tmp_path, values(torch.float32, N, N))
    bits = read_numpy(source, source.tensors["x"])
    shape = (2, N) if axis == 0 else (N, 2)
    found = gather.gathered(
        node(source, axis=axis, first=3, shape=shape), [source], {"order": ORDER}
    )
    assert found.tobytes() == bits.take(ORDER[3:5], axis=axis).tobytes()


def test_few_rows_of_many_are_read_alone(tmp_path: Path) -> None:
    source = source_of(tmp_path, values(torch.float32, 64, 2))
    order = np.random.default_rng(0).permutation(64)
    arg = stored(source)
    fitted = Fitted(key="order", shape=(64,), digest="")
    expr = Gather(arg=arg, shape=(4, 2), order=fitted, first=8)
    bits = read_numpy(source, source.tensors["x"])
    found = gather.gathered(expr, [source], {"order": order})
    assert found.tobytes() == bits[order[8:12]].tobytes()


def test_parts_are_small_and_make_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(tmp_path, values(torch.bfloat16, 8, N))
    expr = node(source, axis=1)
    whole = gather.gathered(expr, [source], {"order": ORDER})
    monkeypatch.setattr(gather, "BLOCK", 2 * N * 2)
    parts = list(gather.gathered_parts(expr, [source], {"order": ORDER}))
    assert [part.shape for part in parts] == [(2, N)] * 4
    assert np.concatenate(parts).tobytes() == whole.tobytes()


def test_a_stored_order_is_used_and_accounted_for(tmp_path: Path) -> None:
    order = torch.from_numpy(ORDER).to(torch.int32)
    source = source_of(tmp_path, values(torch.float32, N, 2), order)
    expr = node(source, order=stored(source, "order"), inverse=True)
    assert [piece.tensor for piece in pieces_of(expr)] == ["x", "order"]
    bits = read_numpy(source, source.tensors["x"])
    found = gather.gathered(expr, [source], {})
    assert found[ORDER].tobytes() == bits.tobytes()


def test_fitted_integers_are_stored_as_integers(tmp_path: Path) -> None:
    target = TargetTensor(
        name="o",
        dtype="I32",
        shape=(N,),
        expr=Fitted(key="order", shape=(N,), digest=""),
        group="",
    )
    (found,) = stored_parts(target, [], {"order": ORDER})
    assert found.dtype == np.int32
    assert found.tolist() == ORDER.tolist()


def test_reordered_values_can_be_computed_with(tmp_path: Path) -> None:
    source = source_of(tmp_path, torch.arange(2.0 * N).reshape(N, 2).to(torch.bfloat16))
    expr = Apply(fn="scale", shape=(N, 2), args=(node(source),), params=(("factor", 2.0),))
    found = evaluate(expr, [source], {"order": ORDER})
    assert found.tolist() == (2 * np.arange(2.0 * N).reshape(N, 2)[ORDER]).tolist()


@pytest.mark.parametrize("order", [[0, 0, 1, 2, 3, 4], [-1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 6]])
def test_no_permutation_is_no_order(order: list[int], tmp_path: Path) -> None:
    source = source_of(tmp_path, values(torch.float32, N, 2))
    with pytest.raises(PlanError, match="order: no permutation"):
        gather.gathered(node(source), [source], {"order": np.array(order)})


@pytest.mark.parametrize(
    "changes",
    [
        {"runs": 4},
        {"first": 1},
        {"shape": (N + 1, 2)},
        {"shape": (N, 3)},
        {"shape": (2, 2), "inverse": True},
        {"order": Fitted(key="order", shape=(N + 1,), digest="")},
    ],
)
def test_the_plan_is_held_to_shapes(changes: dict[str, object], tmp_path: Path) -> None:
    source = source_of(tmp_path, values(torch.float32, N, 2))
    expr = node(source, **changes)
    target = TargetTensor(name="x", dtype="F32", shape=expr.shape, expr=expr, group="")
    plan = Plan(
        method="m",
        options={},
        sources=("",),
        targets=(target,),
        drops=(),
        config={},
        exactness=Exactness(kind="exact", why=""),
    )
    with pytest.raises(PlanError, match="the order does not fit the tensor it reorders"):
        check_plan(plan, [source.tensors])


@given(order=st.permutations(range(9)))
@settings(max_examples=50, deadline=None)
def test_inverse_undoes(order: list[int]) -> None:
    array = np.array(order)
    assert gather.is_permutation(array, 9)
    assert array[gather.inverse(array)].tolist() == list(range(9))
