"""The grouped expert feed-forward against the reference in float64: values and all gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels import grouped_gemm, grouped_steps, reference_grouped
from adaconvert.kernels.grouped import grouped_ffn
from adaconvert.kernels.plan import route_plan

#: relative to the norm of the float64 result: output, gradients.
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1e-2, 2e-2),
    torch.float64: (1e-13, 1e-13),
}
EACH = ("x", "weights_of", "first", "down", "first_bias", "down_bias")


@dataclass
class Case:
    """Random tensors of one call; `sizes` are T, K, E, d, i."""

    sizes: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    glu: bool = True
    bias: bool = False
    backend: str = "loop"
    experts_of: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, slots, experts, hidden, width = self.sizes
        wide = 2 * width if self.glu else width
        shapes = {
            "x": (tokens, hidden),
            "first": (experts, wide, hidden),
            "down": (experts, hidden, width),
        }
        if self.bias:
            shapes |= {"first_bias": (experts, wide), "down_bias": (experts, hidden)}
        scales = {"first": hidden**-0.5, "down": 2 * width**-0.5}
        self.tensors = {
            name: (torch.randn(shape) * scales.get(name, 1)).to(self.dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        if self.activation == "relu":
            self.leave_the_kink()
        wide_type = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.tensors["weights_of"] = torch.rand(tokens, slots, dtype=wide_type).requires_grad_()
        if self.experts_of is None:
            self.experts_of = torch.rand(tokens, experts).topk(slots).indices
        self.upstream = torch.randn(tokens, hidden).to(self.dtype)

    @torch.no_grad()
    def leave_the_kink(self) -> None:
        """Make pre-activations exact and not 0: a rounded sign would be another derivative."""
        for name in ("x", "first"):
            self.tensors[name].copy_(torch.randint(-1, 2, self.tensors[name].shape))
        self.tensors["x"][:, 0] = 0.5
        self.tensors["first"][:, :, 0] = 1
        if self.bias:
            self.tensors["first_bias"].copy_(torch.randint(-2, 3, (self.sizes[2], 1)))

    def run(self, **changed: Any) -> Tensor:
        given = {**self.tensors, **changed}
        first, plain = ("gate_up", "up") if self.glu else ("up", "gate_up")
        named = {first: given["first"], f"{first}_bias": given.get("first_bias"), plain: None}
        plan = route_plan(self.experts_of, self.sizes[2])
        return grouped_ffn(
            *(given["x"], given["weights_of"], plan),
            down=given["down"],
            down_bias=given.get("down_bias"),
            activation=self.activation,  # type: ignore[arg-type]
            glu=self.glu,
            backend=self.backend,  # type: ignore[arg-type]
            **named,
        )

    def results(self, **changed: Any) -> dict[str, Tensor]:
        """Return the output and the gradients of a random upstream gradient."""
        return self.differentiate(self.run(**changed), self.tensors, self.upstream)

    def reference(self, experts_of: Tensor | None = None) -> dict[str, Tensor]:
        wide = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        rest = dict(wide)
        out = reference_grouped.grouped_ffn(
            *(rest.pop("x"), rest.pop("weights_of")),
            self.experts_of if experts_of is None else experts_of,
            activation=self.activation,
            glu=self.glu,
            **rest,  # type: ignore[arg-type]
        )
        return self.differentiate(out, wide, self.upstream.double())

    def differentiate(
        self, out: Tensor, inputs: dict[str, Tensor], upstream: Tensor
    ) -> dict[str, Tensor]:
        names = [name for name in EACH if name in inputs]
        grads = torch.autograd.grad(out, [inputs[name] for name in names], upstream)
        return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the relative error; inf where something is not a number."""
    norm = wanted.norm()
    difference = (got.double() - wanted).norm()
    if not norm:
        return float(difference) if difference.isfinite() else float("inf")
    return float(difference / norm) if difference.isfinite() else float("inf")


def wrong(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Return what is beyond the limits of the dtype."""
    at_most = {"out": LIMITS[dtype][0]}
    return [
        f"{name}: {found:.2e}"
        for name, tensor in wanted.items()
        if (found := error(got[name], tensor)) > at_most.get(name, LIMITS[dtype][1])
    ]


def lost(experts_of: Tensor, expert: int) -> Tensor:
    """Return the routing without one expert."""
    return torch.where(experts_of == expert, -1, experts_of)


FORMS = list(itertools.product(["silu", "gelu", "gelu_tanh", "relu", "relu2"], [True, False]))
BACKENDS = ["loop", "grouped_mm"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("activation", "glu"), FORMS)
def test_values_and_gradients(activation: str, glu: bool, dtype: torch.dtype, backend: str) -> None:
    case = Case((48, 2, 5, 32, 48), dtype, activation, glu, bias=True, backend=backend)
    case.experts_of[::7, 1] = -1
    wanted, got = case.reference(), case.results()
    assert wrong(got, wanted, dtype) == []
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if name == "weights_of" else dtype)
    # the limits notice an output of zeros and a lost expert, in the output and every gradient
    zeros = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    assert len(wrong(zeros, wanted, dtype)) == len(got)
    assert len(wrong(case.reference(lost(case.experts_of, 3)), wanted, dtype)) == len(got)


@pytest.mark.parametrize("backend", BACKENDS)
def test_router_gradient_of_bfloat16_is_summed_in_float32(backend: str) -> None:
    """Against float64 sums of the same bfloat16 pre-activations and hidden gradients."""
    case = Case((40, 2, 4, 64, 256), torch.bfloat16, backend=backend)
    x, first, down = (case.tensors[name].detach().double() for name in ("x", "first", "down"))
    wanted = torch.empty(40, 2, dtype=torch.float64)
    for token, slot in itertools.product(range(40), range(2)):
        expert = int(case.experts_of[token, slot])
        gate, up = (first[expert] @ x[token]).bfloat16().double().chunk(2)
        at_hidden = (case.upstream[token].double() @ down[expert]).bfloat16().double()
        wanted[token, slot] = (torch.nn.functional.silu(gate) * up) @ at_hidden
    assert error(case.results()["weights_of"], wanted) < 1e-3


ODD = {
    "no tokens": ((0, 2, 3, 8, 12), None),
    "no slots": ((3, 0, 3, 8, 12), None),
    "one token": ((1, 2, 3, 8, 12), None),
    "one expert": ((9, 1, 1, 8, 12), None),
    "every expert": ((9, 5, 5, 8, 12), None),
    "empty experts": ((3, 2, 11, 8, 12), None),
    "all on one": ((9, 2, 4, 8, 12), torch.full((9, 2), 2)),
    "all dropped": ((5, 2, 4, 8, 12), torch.full((5, 2), -1)),
    "beyond E": ((4, 2, 4, 8, 12), torch.tensor([[4, 0], [1, 9], [4, 4], [-1, 3]])),
    "one token dropped": ((3, 2, 4, 8, 12), torch.tensor([[1, 0], [-1, -1], [3, 2]])),
    "duplicates": ((4, 3, 4, 8, 12), torch.tensor([[1, 1, 1], [0, 0, 2], [3, 3, 0], [2, 2, 2]])),
    "many slots": ((6, 9, 16, 8, 12), None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ODD)
def test_edges(name: str, backend: str) -> None:
    sizes, experts_of = ODD[name]
    case = Case(sizes, bias=True, experts_of=experts_of, backend=backend)
    got = case.results()
    assert wrong(got, case.reference(), torch.float32) == []
    if name == "all dropped":
        assert not any(tensor.any() for tensor in got.values())


#: in bfloat16 large enough that no tensor is a handful of sums that cancel.
SIZES = [
    *((sizes, torch.bfloat16) for sizes in [(29, 2, 5, 19, 11), (13, 3, 7, 31, 17)]),
    *((sizes, torch.float32) for sizes in [(7, 2, 3, 5, 3), (13, 3, 7, 31, 17)]),
    *((sizes, torch.float64) for sizes in [(7, 2, 3, 5, 3), (65, 1, 2, 33, 1)]),
]


@pytest.mark.parametrize(("sizes", "dtype"), SIZES)
def test_any_size_runs_by_default(sizes: Any, dtype: torch.dtype) -> None:
    case = Case(sizes, dtype, bias=True, backend="auto")
    assert wrong(case.results(), case.reference(), dtype) == []


@pytest.mark.parametrize(("activation", "glu"), FORMS)
def test_gradcheck(activation: str, glu: bool) -> None:
    routing = torch.tensor([[0, 2], [-1, 1], [2, 2], [3, -1], [-1, -1]])
    case = Case((5, 2, 4, 4, 3), torch.float64, activation, glu, bias=True, experts_of=routing)
    inputs = [case.tensors[name] for name in EACH]
    assert torch.autograd.gradcheck(
        lambda *given: case.run(**dict(zip(EACH, given, strict=True))), inputs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nobody_computes_do_not_show(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, where the rows of dropped pairs exist and hold anything."""
    case = Case((24, 2, 4, 16, 8), bias=True, backend=backend)
    case.experts_of[::3, 0] = -1
    case.experts_of[5:9] = 4
    times = grouped_gemm.times

    def poisoned(backend: Any, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        assert rows.shape[0] == 48
        out = times(backend, rows, ends, weights)
        out[int(ends[-1]) :] = float("nan")
        return out

    monkeypatch.setattr(grouped_gemm, "times", poisoned)
    monkeypatch.setattr(grouped_steps, "_rows", lambda plan, kind: plan.pairs.shape[0])
    assert wrong(case.results(), case.reference(), torch.float32) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drop", [True, False])
def test_everything_allocated_is_written(backend: str, drop: bool) -> None:
    case = Case((24, 2, 4, 16, 8), bias=True, backend=backend)
    if drop:
        case.experts_of[::3] = -1
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(4).isnan().all()
        got = case.results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong(got, case.reference(), torch.float32) == []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype: torch.dtype, backend: str) -> None:
    case = Case((64, 4, 8, 32, 64), dtype, backend=backend)
    once, again = case.results(), case.results()
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((50, 2, 3, 16, 24), torch.bfloat16, bias=True)
    whole = case.results()
    monkeypatch.setitem(grouped_steps.expert_activations._BLOCK, "cpu", 7 * 48)
    blocks = case.results()
    assert all(torch.equal(whole[name], blocks[name]) for name in whole)


def test_nan_of_a_token_stays_its_own() -> None:
    case = Case((6, 2, 3, 8, 12))
    with torch.no_grad():
        case.tensors["x"][2] = float("nan")
    assert case.run().isnan().any(1).tolist() == [token == 2 for token in range(6)]


def test_saving_for_backward_changes_no_value_and_no_input() -> None:
    case = Case((20, 2, 4, 16, 8), bias=True)
    before = {name: tensor.clone() for name, tensor in case.tensors.items()}
    upstream = case.upstream.clone()
    out = case.run()
    once = torch.autograd.grad(out, case.tensors["x"], case.upstream, retain_graph=True)[0]
    again = torch.autograd.grad(out, case.tensors["x"], case.upstream)[0]
    assert torch.equal(once, again)
    with torch.no_grad():
        assert torch.equal(case.run(), out)
    assert all(torch.equal(case.tensors[name], tensor) for name, tensor in before.items())
    assert torch.equal(case.upstream, upstream)
