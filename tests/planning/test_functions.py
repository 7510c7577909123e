"""The functions plans apply to weights: what they promise, on small arrays."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adaconvert.planning.functions import FUNCTIONS, LOGIT_STD_RANGE, drop_indices, orthogonal


def call(name: str, *args: np.ndarray, seed: int = 0, **params: object) -> np.ndarray:
    return FUNCTIONS[name](list(args), params, seed)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def test_every_function_keeps_float32() -> None:
    x = random(8, 6)
    assert call("scale", x, factor=2.0).dtype == np.float32
    assert call("plus_one", x).dtype == np.float32
    assert call("center_rows", x).dtype == np.float32
    assert call("center_out", x).dtype == np.float32
    assert call("mean", x, x).dtype == np.float32
    assert call("noise", x, std=0.5).dtype == np.float32
    assert call("drop", x, axis=0, ratio=0.5, index_seed=1).dtype == np.float32
    assert call("router", rows=4, columns=6, repeat=1, kind="small").dtype == np.float32


def test_centring_makes_outputs_mean_free() -> None:
    x = random(8, 6)
    assert np.abs(call("center_rows", x).mean(axis=1)).max() < 1e-6
    assert np.abs(call("center_out", x).mean(axis=0)).max() < 1e-6


def test_interleaving_moves_pair_i_of_each_head_to_rows_2i_and_2i_plus_1() -> None:
    x = np.arange(2 * 4, dtype=np.float32).reshape(
        8, 1
    )  # 2 heads of 4: halves (0 1 | 2 3), (4 5 | 6 7)
    assert call("interleave_rope", x, heads=2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_mean_is_taken_in_float32() -> None:
    a, b = np.float32(1.0) * np.ones(3), np.float32(1.0009765625) * np.ones(3)
    assert call("mean", a.astype(np.float32), b.astype(np.float32))[0] == np.float32(1.00048828125)


def test_noise_has_the_asked_share_of_the_matrix_deviation() -> None:
    x = random(200, 300) * 3
    moved = call("noise", x, std=0.1, seed=5) - x
    assert moved.std() == pytest.approx(0.3, rel=0.02)
    assert np.array_equal(call("noise", x, std=0.1, seed=5) - x, moved)
    assert not np.array_equal(call("noise", x, std=0.1, seed=6) - x, moved)


@pytest.mark.parametrize("axis", [0, 1])
def test_drop_redraws_exactly_the_share_and_keeps_the_rest_bitwise(axis: int) -> None:
    x = random(64, 64) + 2
    got = call("drop", x, axis=axis, ratio=0.5, index_seed=3, seed=4)
    lost = drop_indices(64, 0.5, 3)
    kept = np.setdiff1d(np.arange(64), lost)
    assert len(lost) == 32
    assert np.array_equal(np.take(got, kept, axis), np.take(x, kept, axis))
    redrawn, old = np.take(got, lost, axis), np.take(x, lost, axis)
    assert not np.isin(redrawn, old).any()
    assert redrawn.mean() == pytest.approx(
        float(old.mean()), abs=float(5 * old.std() / math.sqrt(old.size))
    )
    assert redrawn.std() == pytest.approx(float(old.std()), rel=0.1)


def test_drop_of_nothing_is_the_input() -> None:
    x = random(8, 8)
    assert np.array_equal(call("drop", x, axis=0, ratio=0.1, index_seed=0), x)


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 4), (8, 8)])
def test_orthogonal_rows(rows: int, columns: int) -> None:
    q = orthogonal(rows, columns, 1).astype(np.float64)
    small = q @ q.T if rows <= columns else q.T @ q
    # each entry is a sum of products of values rounded to float32
    assert np.abs(small - np.eye(min(rows, columns))).max() <= 2 * np.finfo(np.float32).eps


@pytest.mark.parametrize("kind", ["small", "orthogonal"])
@pytest.mark.parametrize("norm", [1e-3, 1.0, 50.0])
def test_router_logits_neither_tie_nor_saturate(kind: str, norm: float) -> None:
    weight = np.full(64, norm, dtype=np.float32)
    router = call("router", weight, rows=8, columns=64, repeat=1, kind=kind, seed=2)
    x = random(2000, 64)
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True))
    std = ((x * weight) @ router.T).std()
    low, high = LOGIT_STD_RANGE
    assert low * 0.7 <= std <= high * 1.3


def test_router_rows_repeat_inside_groups() -> None:
    router = call("router", rows=8, columns=16, repeat=4, kind="small", seed=2)
    assert all(np.array_equal(router[4 * g + i], router[4 * g]) for g in range(2) for i in range(4))
    assert not np.array_equal(router[0], router[4])
