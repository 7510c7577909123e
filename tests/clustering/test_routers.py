"""Router tensors are what their definitions say, neuron by neuron."""

from __future__ import annotations

import numpy as np
import pytest

from adaconvert.clustering import routers
from adaconvert.errors import OptionError, SourceError

SHARED, EXPERTS, WIDTH, HIDDEN = 3, 4, 5, 6
GENERATOR = np.random.default_rng(0)
SIZE = SHARED + EXPERTS * WIDTH
GATE = GENERATOR.standard_normal((SIZE, HIDDEN)).astype(np.float32) * 3
UP = GENERATOR.standard_normal((SIZE, HIDDEN)).astype(np.float32)
ORDER = GENERATOR.permutation(SIZE)
MEMBERS = [ORDER[SHARED + e * WIDTH : SHARED + (e + 1) * WIDTH] for e in range(EXPERTS)]
# float32 sums of at most 23 numbers of order 1
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


def test_param_center_is_the_mean_of_unit_rows() -> None:
    tensors = routers.param_center(GATE, ORDER, EXPERTS, SHARED)
    assert list(tensors) == ["weight"]
    assert tensors["weight"].dtype == np.float32
    expected = [np.mean([unit(GATE[neuron]) for neuron in expert], axis=0) for expert in MEMBERS]
    np.testing.assert_allclose(tensors["weight"], expected, **CLOSE)


def test_similarity_is_the_direction_of_the_mean_row() -> None:
    tensors = routers.similarity(GATE, ORDER, EXPERTS, SHARED)
    assert list(tensors) == ["weight"]
    assert tensors["weight"].dtype == np.float32
    expected = [unit(GATE[expert].mean(axis=0)) for expert in MEMBERS]
    np.testing.assert_allclose(tensors["weight"], expected, **CLOSE)


def test_analytic_takes_the_rows_of_the_representatives() -> None:
    stand = np.array([expert[1] for expert in MEMBERS])
    tensors = routers.analytic(GATE, UP, ORDER, EXPERTS, SHARED, representatives=stand)
    assert {name: array.dtype for name, array in tensors.items()} == dict.fromkeys(
        ("gate", "up", "bias"), np.dtype(np.float32)
    )
    np.testing.assert_allclose(tensors["gate"], [unit(GATE[j]) for j in stand], **CLOSE)
    np.testing.assert_allclose(tensors["up"], [unit(UP[j]) for j in stand], **CLOSE)
    assert tensors["bias"].tolist() == [0] * EXPERTS


def test_without_representatives_the_most_central_neuron_stands_for_its_expert() -> None:
    tensors = routers.analytic(GATE, UP, ORDER, EXPERTS, SHARED)
    for row, expert in zip(tensors["gate"], MEMBERS, strict=True):
        rows = np.array([unit(GATE[neuron]) for neuron in expert])
        central = rows[np.argmax(rows @ rows.mean(axis=0))]
        np.testing.assert_allclose(row, central, **CLOSE)


def test_a_plain_layer_has_no_gate() -> None:
    tensors = routers.analytic(None, UP, ORDER, EXPERTS, SHARED)
    assert sorted(tensors) == ["bias", "up"]
    assert tensors["up"].shape == (EXPERTS, HIDDEN)


def test_experts_of_one_neuron_keep_its_row() -> None:
    order = np.arange(SIZE)
    for make in (routers.param_center, routers.similarity):
        np.testing.assert_allclose(
            make(UP, order, SIZE)["weight"], [unit(row) for row in UP], **CLOSE
        )


def test_rows_of_zeros_stay_zero() -> None:
    rows = np.zeros((4, 3), dtype=np.float32)
    for make in (routers.param_center, routers.similarity):
        assert make(rows, np.arange(4), 2)["weight"].tolist() == [[0, 0, 0]] * 2


def test_what_makes_no_router_is_refused() -> None:
    with pytest.raises(OptionError, match="expected a divisor of 20, found 3"):
        routers.param_center(GATE, ORDER, 3, SHARED)
    with pytest.raises(OptionError, match=r"shared neurons: .* found 23"):
        routers.similarity(GATE, ORDER, EXPERTS, SIZE)
    broken = GATE.copy()
    broken[2, 1] = np.inf
    with pytest.raises(SourceError, match="weights of the router: NaN or infinity in 1 of 23 rows"):
        routers.analytic(broken, UP, ORDER, EXPERTS, SHARED)
