"""Routed low-rank adapters against a loop over adapters in float64: values and all gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels import lora_steps
from adaconvert.kernels.lora import grouped_lora
from adaconvert.kernels.plan import route_plan

#: relative to the norm of the float64 result: output, gradients.
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1e-2, 2e-2),
    torch.float64: (1e-13, 1e-13),
}
EACH = ("x", "weights_of", "a", "b", "base")
#: form, backend.
WAYS = [("sorted", "loop"), ("sorted", "grouped_mm"), ("all", "auto")]
IDS = ["-".join(way) for way in WAYS]


@dataclass
class Case:
    """Random tensors of one call; `sizes` are T, K, E, r, n, m."""

    sizes: tuple[int, int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    way: tuple[str, str] = ("auto", "auto")
    base: bool = True
    scaling: Any = 1.5
    experts_of: Tensor | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, slots, experts, rank, width, outputs = self.sizes
        shapes = {
            **{"x": (tokens, width), "a": (experts, rank, width), "b": (experts, outputs, rank)},
            **({"base": (tokens, outputs)} if self.base else {}),
        }
        self.tensors = {
            name: torch.randn(shape).to(self.dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.tensors["weights_of"] = torch.rand(tokens, slots, dtype=wide).requires_grad_()
        if self.experts_of is None:
            self.experts_of = torch.rand(tokens, experts).topk(slots).indices
        self.upstream = torch.randn(tokens, outputs).to(self.dtype)

    def run(self, **changed: Any) -> Tensor:
        given = {**self.tensors, **changed}
        plan = route_plan(self.experts_of, self.sizes[2])
        form, backend = self.way
        return grouped_lora(
            *(given["x"], given.get("base"), plan, given["weights_of"]),
            a=given["a"],
            b=given["b"],
            scaling=self.scaling,
            form=form,  # type: ignore[arg-type]
            backend=backend,  # type: ignore[arg-type]
        )

    def results(self, **changed: Any) -> dict[str, Tensor]:
        """Return the output and the gradients of a random upstream gradient."""
        return gradients(self.run(**changed), {**self.tensors, **changed}, self.upstream)

    def reference(self, experts_of: Tensor | None = None) -> dict[str, Tensor]:
        wide = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        experts_of = self.experts_of if experts_of is None else experts_of
        out = adapter_by_adapter(wide, experts_of, self.scaling)
        return gradients(out, wide, self.upstream.double())


def adapter_by_adapter(given: dict[str, Tensor], experts_of: Tensor, scaling: Any) -> Tensor:
    out = given["x"].new_zeros(given["x"].shape[0], given["b"].shape[1])
    out = out + given["base"] if "base" in given else out
    for expert in range(given["a"].shape[0]):
        share = (given["weights_of"] * (experts_of == expert)).sum(-1, keepdim=True)
        each = scaling[expert].double() if isinstance(scaling, Tensor) else scaling
        out = out + share * each * (given["x"] @ given["a"][expert].t() @ given["b"][expert].t())
    return out


def gradients(out: Tensor, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, way: Any) -> None:
    case = Case((48, 2, 5, 8, 32, 48), dtype, way)
    case.experts_of[::7, 1] = -1
    wanted, got = case.reference(), case.results()
    assert wrong(got, wanted, dtype) == []
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if name == "weights_of" else dtype)
    # the limits notice zeros and a lost adapter, everywhere but in the gradient of the base
    zeros = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    assert len(wrong(zeros, wanted, dtype)) == len(got)
    lost = torch.where(case.experts_of == 3, -1, case.experts_of)
    assert len(wrong(case.reference(lost), wanted, dtype)) == len(got) - 1


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_router_gradient_of_bfloat16_is_summed_in_float32(way: Any) -> None:
    """Against float64 sums of the same rounded low-rank values and their rounded gradients."""
    case = Case((40, 2, 4, 64, 32, 24), torch.bfloat16, way, base=False, scaling=1.0)
    x, a, b = (case.tensors[name].detach().double() for name in ("x", "a", "b"))
    wanted = torch.empty(40, 2, dtype=torch.float64)
    for token, slot in itertools.product(range(40), range(2)):
        expert = int(case.experts_of[token, slot])
        low = (a[expert] @ x[token]).bfloat16().double()
        wanted[token, slot] = low @ (case.upstream[token].double() @ b[expert]).bfloat16().double()
    assert error(case.results()["weights_of"], wanted) < 1e-3


ODD = {
    "no tokens": ((0, 2, 3, 4, 8, 12), None),
    "no slots": ((3, 0, 3, 4, 8, 12), None),
    "one token": ((1, 2, 3, 4, 8, 12), None),
    "one adapter": ((9, 1, 1, 4, 8, 12), None),
    "every adapter": ((9, 5, 5, 4, 8, 12), None),
    "empty adapters": ((3, 2, 11, 4, 8, 12), None),
    "all on one": ((9, 2, 4, 4, 8, 12), torch.full((9, 2), 2)),
    "all dropped": ((5, 2, 4, 4, 8, 12), torch.full((5, 2), -1)),
    "beyond E": ((4, 2, 4, 4, 8, 12), torch.tensor([[4, 0], [1, 9], [4, 4], [-1, 3]])),
    "one token dropped": ((3, 2, 4, 4, 8, 12), torch.tensor([[1, 0], [-1, -1], [3, 2]])),
    "duplicates": ((3, 3, 4, 4, 8, 12), torch.tensor([[1, 1, 1], [0, 0, 2], [3, 3, 0]])),
    "rank 1": ((9, 2, 4, 1, 8, 12), None),
    "rank 3": ((9, 2, 4, 3, 8, 12), None),
    "rank 13": ((9, 2, 4, 13, 8, 12), None),
}


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("name", ODD)
def test_edges(name: str, way: Any) -> None:
    sizes, experts_of = ODD[name]
    case = Case(sizes, way=way, experts_of=experts_of)
    got = case.results()
    assert wrong(got, case.reference(), torch.float32) == []
    if name == "all dropped":
        assert torch.equal(got["out"], case.tensors["base"])
        assert not any(got[each].any() for each in ("x", "weights_of", "a", "b"))


SIZES = [
    *((sizes, torch.bfloat16) for sizes in [(29, 2, 5, 7, 19, 11), (13, 3, 7, 9, 31, 17)]),
    *((sizes, torch.float32) for sizes in [(7, 2, 3, 5, 5, 3), (70, 3, 4, 9, 31, 17)]),
    *((sizes, torch.float64) for sizes in [(7, 2, 3, 5, 5, 3), (65, 1, 2, 1, 33, 1)]),
]


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(("sizes", "dtype"), SIZES)
def test_any_size_runs_by_default(sizes: Any, dtype: torch.dtype, base: bool) -> None:
    case = Case(sizes, dtype, base=base)
    assert wrong(case.results(), case.reference(), dtype) == []


@pytest.mark.parametrize("form", lora_steps.FORMS)
def test_gradcheck(form: str) -> None:
    routing = torch.tensor([[0, 2], [-1, 1], [2, 2], [3, -1], [-1, -1]])
    case = Case((5, 2, 4, 3, 4, 3), torch.float64, (form, "loop"), experts_of=routing)
    inputs = [case.tensors[name] for name in EACH]
    assert torch.autograd.gradcheck(
        lambda *given: case.run(**dict(zip(EACH, given, strict=True))), inputs
    )


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_scaling_of_each_adapter(way: Any) -> None:
    case = Case((24, 2, 4, 8, 16, 24), way=way, scaling=torch.tensor([1.0, 0.5, 3.0, 0.0]))
    case.experts_of[::3, 0] = -1
    assert wrong(case.results(), case.reference(), torch.float32) == []


def test_without_its_second_matrix_an_adapter_changes_no_bit() -> None:
    for way in WAYS:
        case = Case((24, 2, 4, 8, 16, 24), way=way)
        assert torch.equal(case.run(b=torch.zeros(4, 24, 8)), case.tensors["base"])


def test_one_adapter_is_plain_lora() -> None:
    case = Case((24, 1, 1, 8, 16, 24), scaling=2.0)
    x, a, b, base = (case.tensors[name] for name in ("x", "a", "b", "base"))
    plain = base.double() + 2 * x.double() @ a[0].double().t() @ b[0].double().t()
    got = case.run(weights_of=torch.ones(24, 1))
    assert error(got.detach(), plain.detach()) < 1e-6


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_every_time(dtype: torch.dtype, way: Any) -> None:
    case = Case((64, 4, 8, 16, 32, 64), dtype, way)
    once, again = case.results(), case.results()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_everything_allocated_is_written(way: Any) -> None:
    case = Case((24, 2, 4, 3, 16, 8), way=way)
    case.experts_of[::3] = -1
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        got = case.results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong(got, case.reference(), torch.float32) == []


@pytest.mark.parametrize("way", WAYS[:2], ids=IDS[:2])
def test_rows_that_nobody_computes_do_not_show(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, where the rows of dropped pairs exist and hold anything."""
    case = Case((24, 2, 4, 8, 16, 8), way=way)
    case.experts_of[::3, 0] = -1
    case.experts_of[5:9] = 4
    times = lora_steps.grouped_gemm.times

    def poisoned(backend: Any, rows: Tensor, ends: Tensor, weights: Tensor) -> Tensor:
        assert rows.shape[0] == 48
        out = times(backend, rows, ends, weights)
        out[int(ends[-1]) :] = float("nan")
        return out

    def every_row(inputs: Any, plan: Any) -> tuple[Tensor, Tensor]:
        return plan.tokens, inputs.weights_of.reshape(-1)[plan.pairs][:, None]

    monkeypatch.setattr(lora_steps.grouped_gemm, "times", poisoned)
    monkeypatch.setattr(lora_steps, "_rows", every_row)
    assert wrong(case.results(), case.reference(), torch.float32) == []


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_keeps_its_inputs_and_the_low_rank_values_alone(way: Any) -> None:
    case = Case((512, 2, 8, 16, 96, 128), way=way)
    plan = route_plan(case.experts_of, 8)
    inputs = {t.untyped_storage().data_ptr() for t in case.tensors.values()}
    inputs |= {t.untyped_storage().data_ptr() for t in (plan.pairs, plan.tokens, plan.places)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = case.tensors
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = grouped_lora(
            *(given["x"], given["base"], plan, given["weights_of"]),
            a=given["a"],
            b=given["b"],
            scaling=1.0,
            form=way[0],
            backend=way[1],
        )
    assert out.requires_grad
    rows = 512 * 2 if way[0] == "sorted" else 512 * 8
    # weights times the scaling, ends and the mask of live pairs are the rest
    assert sum(kept.values()) <= rows * 16 * 4 + 512 * 2 * 4 + 8 * 4 + 512 * 2
    # one gathered copy of x or of the output would be more
    assert way[0] == "all" or sum(kept.values()) < 512 * 2 * 96 * 4 / 3


@pytest.mark.parametrize("way", WAYS, ids=IDS)
@pytest.mark.parametrize("name", EACH)
def test_only_what_needs_a_gradient_gets_one(name: str, way: Any) -> None:
    case = Case((24, 2, 4, 8, 16, 24), way=way)
    whole = case.results()
    frozen = {each: tensor.detach() for each, tensor in case.tensors.items()}
    frozen[name].requires_grad_()
    case.run(**frozen).backward(case.upstream)
    assert torch.equal(frozen[name].grad, whole[name])  # type: ignore[arg-type]
    assert all(frozen[each].grad is None for each in EACH if each != name)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_layouts_of_inputs_and_upstream_gradients(way: Any) -> None:
    case = Case((24, 2, 4, 8, 16, 24), way=way)
    strided = {
        name: t.detach().mT.contiguous().mT.requires_grad_() for name, t in case.tensors.items()
    }
    case.upstream = torch.randn(1, 1).expand(24, 24)
    assert wrong(case.results(**strided), case.reference(), torch.float32) == []


def test_one_first_matrix_for_all_adapters() -> None:
    for way in WAYS:
        case = Case((24, 2, 4, 8, 16, 24), way=way)
        shared = torch.randn(1, 8, 16, requires_grad=True)
        case.run(a=shared.expand(4, 8, 16)).backward(case.upstream)
        each = shared.detach().expand(4, 8, 16).clone().requires_grad_()
        case.run(a=each).backward(case.upstream)
        assert error(shared.grad[0], each.grad.double().sum(0)) < 1e-6


def test_adapters_of_another_dtype_keep_theirs() -> None:
    case = Case((24, 2, 4, 8, 16, 24), torch.bfloat16)
    a, b = (case.tensors[name].detach().float().requires_grad_() for name in ("a", "b"))
    got = case.results(a=a, b=b)
    assert (got["out"].dtype, got["a"].dtype, got["b"].dtype) == (
        *(torch.bfloat16, torch.float32, torch.float32),
    )
    assert wrong(got, case.reference(), torch.bfloat16) == []


def test_autocast_computes_in_its_dtype_and_returns_that_of_the_base() -> None:
    case = Case((24, 2, 4, 8, 16, 24))
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
        alone = Case((24, 2, 4, 8, 16, 24), base=False).run()
    assert (got.dtype, alone.dtype) == (torch.float32, torch.float32)
    found = gradients(got, case.tensors, case.upstream)
    assert wrong(found, case.reference(), torch.bfloat16) == []
    assert found["out"].dtype == found["x"].dtype == torch.float32
    assert error(got.detach(), case.reference()["out"]) > 1e-4


def together(*given: Any) -> Tensor:
    x, base, weights_of, a, b, experts_of, form, backend = given
    plan = route_plan(experts_of, a.shape[0])
    return grouped_lora(
        *(x, base, plan, weights_of), a=a, b=b, scaling=2.0, form=form, backend=backend
    )


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("way", [*WAYS, ("auto", "auto")], ids=[*IDS, "auto"])
def test_compiled_whole_it_gives_the_same_bits(way: Any, base: bool) -> None:
    case = Case((24, 2, 4, 3, 16, 24), way=way, base=base, scaling=2.0)
    case.experts_of[::3, 0] = -1
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager")
    given = case.tensors
    names = (given["x"], given.get("base"), given["weights_of"], given["a"], given["b"])
    out = compiled(*names, case.experts_of, *way)
    got = gradients(out, given, case.upstream)
    wanted = case.results()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_the_operation_is_registered_well(way: Any) -> None:
    case = Case((9, 2, 4, 3, 8, 12), way=way)
    case.experts_of[::3, 0] = -1
    plan, given = route_plan(case.experts_of, 4), case.tensors
    order = (plan.pairs, plan.tokens, plan.ends, plan.places, plan.live, plan.slots, plan.dropped)
    tensors = (given["x"], given["weights_of"], given["a"], given["b"], given["base"])
    operation = torch.ops.adaconvert.grouped_lora.default
    torch.library.opcheck(operation, (*tensors, *order, *way))
    without = tuple(tensor.detach() for tensor in tensors[:4])
    torch.library.opcheck(operation, (*without, None, *order, *way))
