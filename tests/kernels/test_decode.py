"""`dynk_decode` by torch, its operator, and what is said of its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.kernels import decode, decode_steps, dispatch, reference_decode
from adaconvert.kernels.decode import Neurons, dynk_decode
from adaconvert.kernels.decode_steps import Call
from adaconvert.kernels.reference import expert_ffn

LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
TOKENS, SLOTS, EXPERTS, WIDTH, HIDDEN, SHARED = 3, 4, 6, 8, 32, 5


def arguments(*, glu: bool, extras: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """Return the arguments of `dynk_decode`, by name."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    first, rows = ("gate_up", 2 * WIDTH) if glu else ("up", WIDTH)
    found: dict[str, Any] = {
        "x": draw(TOKENS, HIDDEN),
        "ids": torch.stack([torch.randperm(EXPERTS)[:SLOTS] for _ in range(TOKENS)]),
        "counts": torch.tensor([4, 1, 2]),
        first: draw(EXPERTS, rows, HIDDEN),
        "down_rows": draw(EXPERTS, WIDTH, HIDDEN),
        "activation": "silu",
        "glu": glu,
    }
    if extras:
        one = (SHARED, HIDDEN)
        found |= {
            f"{first}_bias": draw(EXPERTS, rows),
            "down_bias": draw(EXPERTS, HIDDEN),
            "out_bias": draw(HIDDEN),
            "weights_of": torch.rand(TOKENS, SLOTS) + 0.5,
            "shared": Neurons(
                up=draw(*one),
                down_rows=draw(*one),
                gate=draw(*one) if glu else None,
                up_bias=draw(SHARED),
                gate_bias=draw(SHARED) if glu else None,
            ),
        }
    return found


def definition(given: dict[str, Any]) -> Tensor:
    """Return the output in fp64, one neuron at a time."""

    def at(name: str, *index: int) -> Tensor:
        value = given.get(name)
        return torch.zeros((), dtype=torch.float64) if value is None else value[index].double()

    def neuron(
        x: Tensor, gate: Tensor | None, gate_bias: Tensor, up: Tensor, up_bias: Tensor
    ) -> Tensor:
        value = up.double() @ x + up_bias
        if gate is None:
            return functional.silu(value)
        return functional.silu(gate.double() @ x + gate_bias) * value

    glu, rows = given["glu"], []
    first = "gate_up" if glu else "up"
    for token, x in enumerate(given["x"].double()):
        out = at("out_bias") + torch.zeros(HIDDEN, dtype=torch.float64)
        shared = given.get("shared")
        for c in range(SHARED if shared is not None else 0):
            gates = (shared.gate[c], shared.gate_bias[c]) if glu else (None, torch.zeros(()))
            value = neuron(x, *gates, shared.up[c], shared.up_bias[c])
            out = out + value * shared.down_rows[c].double()
        for slot in range(int(given["counts"][token])):
            e = int(given["ids"][token, slot])
            part = at("down_bias", e)
            for s in range(WIDTH):
                gates = (given[first][e, s], at(f"{first}_bias", e, s)) if glu else (None, part)
                row = WIDTH + s if glu else s
                value = neuron(x, *gates, given[first][e, row], at(f"{first}_bias", e, row))
                part = part + value * given["down_rows"][e, s].double()
            weight = 1 if given.get("weights_of") is None else at("weights_of", token, slot)
            out = out + weight * part
        rows.append(out)
    return torch.stack(rows)


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_torch_and_the_reference_are_the_definition(
    dtype: torch.dtype, glu: bool, extras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(glu=glu, extras=extras, dtype=dtype)
    true = definition(given)
    found = dynk_decode(**given)
    assert found.dtype == dtype
    assert error(found, true) < LIMITS[dtype]
    assert error(torch.zeros_like(found), true) > 0.5
    fewer = given | {"counts": given["counts"] - 1}
    assert error(dynk_decode(**fewer), true) > 0.05
    monkeypatch.setattr(decode_steps, "by_torch", reference_decode.dynk_decode)
    assert error(dynk_decode(**given), true) < LIMITS[dtype]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_ids_that_are_no_expert_add_nothing(index: torch.dtype) -> None:
    given = arguments(glu=True)
    given["ids"] = torch.tensor([[-1, 2, 6, 0], [-1, 1, 1, 1], [2**31 - 1, 5, 9, 9]]).to(index)
    kept = given | {"ids": torch.tensor([[2, 0, 0, 0], [0, 1, 1, 1], [5, 5, 9, 9]])}
    kept["counts"] = torch.tensor([2, 0, 1])
    assert error(dynk_decode(**given), definition(kept)) < 1e-13
    assert not dynk_decode(**given)[1].any()


def test_weights_of_other_experts_may_be_anything() -> None:
    given = arguments(glu=True)
    given["ids"] = torch.tensor([[0, 2, 4, 1]]).expand(TOKENS, -1)
    given["counts"] = torch.tensor([3, 0, 2])
    before = dynk_decode(**given)
    given["gate_up"][[1, 3, 5]] = torch.inf
    assert torch.equal(dynk_decode(**given), before)
    assert not before[1].any()


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"up": torch.ones(1)}, ValueError, "with a gate need gate_up"),
        ({"gate_up": None}, ValueError, "with a gate need gate_up"),
        ({"glu": False}, ValueError, "without a gate need up"),
        ({"activation": "sin"}, ValueError, "activation 'sin'; expected one of silu"),
        ({"counts": torch.ones(2).long()}, ValueError, r"counts is \[2\]; expected \[B\] = \[3\]"),
        ({"down_rows": torch.ones(6, 8, 31).double()}, ValueError, r"\[E, S, D\] = \[6, 8, 32\]"),
        ({"ids": torch.ones(3, 4)}, TypeError, "ids is torch.float32; expected int32 or int64"),
        ({"x": torch.ones(3, 32)}, TypeError, "torch.float64, x is torch.float32"),
        ({"x": torch.ones(3, 32).double().requires_grad_()}, RuntimeError, "has no gradients"),
        (
            {"shared": Neurons(torch.ones(5, 32).double(), torch.ones(5, 32).double())},
            ValueError,
            "a gate of shared neurons",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(
    changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        dynk_decode(**arguments(glu=True) | changes)


def test_parameters_run_where_no_gradient_is_recorded() -> None:
    given = arguments(glu=True)
    given["gate_up"].requires_grad_()
    with torch.no_grad():
        assert not dynk_decode(**given).requires_grad


@pytest.mark.parametrize("glu", [True, False])
def test_the_operator_is_sound(glu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    with monkeypatch.context() as patch:
        patch.setattr(decode_steps, "run", calls.append)
        dynk_decode(**arguments(glu=glu, extras=True))
        dynk_decode(**arguments(glu=glu))
    for call in calls:
        torch.library.opcheck(torch.ops.adaconvert.dynk_decode.default, tuple(call))


def test_compiled_it_is_the_same_in_one_graph() -> None:
    given = arguments(glu=True, extras=True, dtype=torch.float32)

    def twice(x: Tensor) -> Tensor:
        return dynk_decode(**given | {"x": 2 * x})

    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given["x"]), twice(given["x"]))


# -- when kernels run

FACTS: dict[str, Any] = {
    **{"device": "cuda", "capability": (9, 0), "dtype": torch.bfloat16, "grad": False},
    **{"tokens": 1, "hidden": 2048, "neurons": 8192, "experts": 256, "width": 32, "shared": 0},
    **{"glu": True},
}


@pytest.fixture
def _triton_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("adaconvert.kernels.triton_support.available", lambda: None)


@pytest.mark.usefixtures("_triton_is_there")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "not measured for these sizes on this device"),
        ({"selected": 64}, "not measured for these sizes on this device"),
        ({"selected": 180}, "torch is faster where share is 0.7 or more (derived"),
        ({"neurons": 1536, "hidden": 576}, "torch is faster where bytes is up to 5e+07 (derived"),
    ],
)
def test_torch_runs_where_nothing_says_that_kernels_are_faster(
    changes: dict[str, Any], said: str
) -> None:
    for op in ("expert_ffn", "dynk_decode"):
        assert said in dispatch.why(op, **FACTS | changes)
        assert dispatch.select(op, **FACTS | changes) is None


@pytest.mark.usefixtures("_triton_is_there")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experts": 0}, "0 experts; it lists 1 to 4096"),
        ({"experts": 40000}, "40000 experts; it lists 1 to 4096"),
        ({"activation": torch.sin}, "it does not know the activation"),
        ({"device": "cpu"}, "it runs on cuda, not on cpu"),
        ({"capability": (7, 5)}, "compute capability 7.5 is below 8.0"),
        ({"dtype": torch.float64}, "it does not compute torch.float64"),
    ],
)
def test_what_the_kernels_refuse(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said in str(dispatch.refuses("expert_ffn", **FACTS | changes))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(RuntimeError, match=said.partition(";")[0]):
        dispatch.select("expert_ffn", **FACTS | changes)


@pytest.mark.usefixtures("_triton_is_there")
def test_autocast_runs_by_torch() -> None:
    assert dispatch.refuses("expert_ffn", **FACTS) is None
    # torch.autocast leaves it off where there is no GPU
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert "autocast is on" in str(dispatch.refuses("expert_ffn", **FACTS))
    finally:
        torch.set_autocast_enabled("cuda", before)


class _Odd(Tensor):
    """A subclass, as quantised weights are."""


def test_subclasses_run_by_torch() -> None:
    up, down, x = torch.randn(8, 4), torch.randn(4, 8), torch.randn(2, 4)
    mask = torch.ones(2, 4, dtype=torch.bool)
    options: dict[str, Any] = {"width": 2, "activation": functional.silu}
    found = decode.expert_ffn(x, mask, up=up.as_subclass(_Odd), down=down, **options)
    assert torch.equal(found, expert_ffn(x, mask, up=up, down=down, **options))


@pytest.mark.usefixtures("_triton_is_there")
@pytest.mark.parametrize(
    ("changes", "said"),
    [({"tokens": 9}, "9 tokens; it takes up to 8"), ({"grad": True}, "it has no gradients")],
)
def test_what_is_no_decoding_runs_by_torch_even_where_kernels_are_insisted_on(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    for op in ("expert_ffn", "dynk_decode"):
        assert dispatch.select(op, **FACTS | changes) is None
        assert said in dispatch.why(op, **FACTS | changes)
        assert said in str(dispatch.refuses(op, **FACTS | changes))


@pytest.mark.usefixtures("_triton_is_there")
@pytest.mark.parametrize("activation", [nn.SiLU(), functional.silu, functional.relu, None])
def test_insisting_gets_the_kernel(activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    known = {} if activation is None else {"activation": activation}
    assert dispatch.select("expert_ffn", **FACTS | known) is not None
