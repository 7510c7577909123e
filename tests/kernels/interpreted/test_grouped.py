"""The kernels of the grouped expert feed-forward against the reference in fp64."""

from __future__ import annotations

import itertools
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels import (
    dispatch,
    grouped_steps,
    triton_grouped,
    triton_grouped_backward,
    triton_tiles,
)
from adaconvert.kernels.expert_activations import ACTIVATIONS
from adaconvert.kernels.grouped import grouped_ffn
from adaconvert.kernels.grouped_backend import kind_of
from adaconvert.kernels.plan import route_plan


def _load() -> Any:
    """Return the tests of the torch backends, for their cases and limits."""
    path = Path(__file__).resolve().parents[1] / "test_grouped_ffn.py"
    spec = spec_from_file_location("grouped_ffn_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


torch_tests = _load()
Case, error, lost, wrong = (getattr(torch_tests, n) for n in ("Case", "error", "lost", "wrong"))
#: every form of expert; for float16, which is computed as float32 is, the commonest.
FORMS = [
    *((*form, dtype) for form in torch_tests.FORMS for dtype in (torch.float32, torch.bfloat16)),
    ("silu", True, torch.float16),
]


@pytest.mark.parametrize(("activation", "glu", "dtype"), FORMS, ids=str)
@pytest.mark.usefixtures("poison")
def test_values_and_gradients(activation: str, glu: bool, dtype: torch.dtype) -> None:
    case = Case((48, 2, 5, 32, 48), dtype, activation, glu, bias=True, backend="triton")
    case.experts_of[::7, 1] = -1
    wanted, got = case.reference(), case.results()
    assert wrong(got, wanted, dtype) == []
    for name, tensor in got.items():
        assert tensor.dtype == (torch.float32 if name == "weights_of" else dtype)
    # the limits notice an output of zeros and a lost expert, in the output and every gradient
    zeros = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    assert len(wrong(zeros, wanted, dtype)) == len(got)
    assert len(wrong(case.reference(lost(case.experts_of, 3)), wanted, dtype)) == len(got)


#: every activation, and both forms.
CHECKED = [*zip(ACTIVATIONS, itertools.cycle([True, False]), strict=False), ("silu", False)]
#: sizes T, K, E, d, i around the tiles of 64 rows, 64 or 128 columns and 32 or 64 summed values.
TILED = [
    *(((80, 2, 2, 65, 130), torch.float32), ((64, 1, 1, 64, 64), torch.float32)),
    *(((65, 2, 3, 129, 65), torch.bfloat16), ((70, 2, 3, 64, 136), torch.float16)),
    *(((7, 2, 3, 5, 3), torch.float64), ((13, 3, 7, 31, 17), torch.float64)),
]


@pytest.mark.parametrize(("sizes", "dtype"), TILED, ids=str)
@pytest.mark.parametrize("glu", [True, False])
@pytest.mark.usefixtures("poison")
def test_sizes_of_tiles_and_others(sizes: Any, dtype: torch.dtype, glu: bool) -> None:
    case = Case(sizes, dtype, glu=glu, bias=True, backend="triton")
    assert wrong(case.results(), case.reference(), dtype) == []


@pytest.mark.parametrize("name", torch_tests.ODD)
@pytest.mark.usefixtures("poison")
def test_edges(name: str) -> None:
    sizes, experts_of = torch_tests.ODD[name]
    case = Case(sizes, bias=True, experts_of=experts_of, backend="triton")
    got = case.results()
    assert wrong(got, case.reference(), torch.float32) == []
    if name == "all dropped":
        assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize(("activation", "glu"), CHECKED)
def test_gradcheck(activation: str, glu: bool) -> None:
    routing = torch.tensor([[0, 2], [-1, 1], [2, 2], [3, -1], [-1, -1]])
    case = Case(
        *((5, 2, 4, 4, 3), torch.float64, activation, glu),
        **{"bias": True, "experts_of": routing, "backend": "triton"},
    )
    inputs = [case.tensors[name] for name in torch_tests.EACH]
    assert torch.autograd.gradcheck(
        lambda *given: case.run(**dict(zip(torch_tests.EACH, given, strict=True))),
        inputs,
        fast_mode=True,
        check_undefined_grad=False,
    )


@pytest.mark.usefixtures("poison")
def test_rows_that_nobody_computes_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator and in a compiled graph: they exist, and hold what they held."""
    case = Case((24, 2, 4, 16, 8), bias=True, backend="triton")
    case.experts_of[::3, 0] = -1
    case.experts_of[5:9] = 4
    monkeypatch.setattr(grouped_steps, "_rows", lambda plan, kind: plan.pairs.shape[0])
    found = []
    run = triton_grouped_backward.run

    def spy(*given: Any) -> Any:
        found.append(run(*given))
        return found[-1]

    monkeypatch.setattr(triton_grouped_backward, "run", spy)
    assert wrong(case.results(), case.reference(), torch.float32) == []
    live = int((case.experts_of.clamp(-1, 4) % 5 < 4).sum())
    assert [t.shape[0] for t in found[0]] == [48, 48, 48]
    assert all(t[live:].isnan().all() and not t[:live].isnan().any() for t in found[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_programs_gives_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((66, 2, 3, 40, 136), dtype, bias=True, backend="triton")
    case.experts_of[::5] = -1
    once, again = case.results(), case.results()
    assert all(torch.equal(once[name], again[name]) for name in once)
    seen = reverse(monkeypatch)
    turned = case.results()
    assert all(torch.equal(once[name], turned[name]) for name in once)
    assert seen == ["table", "kernel"] * 2


def reverse(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let every program run in the opposite order; return the list of what was turned."""
    seen: list[str] = []
    constants, table = triton_tiles.constants_of, triton_tiles.table_of

    def turned(*given: Any, **named: Any) -> Any:
        seen.append("kernel")
        return {**constants(*given, **named), "REVERSE": True}

    def turned_table(*given: Any) -> Any:
        seen.append("table")
        return table(*given, reverse=True)

    for module in (triton_grouped, triton_grouped_backward):
        monkeypatch.setattr(module, "constants_of", turned)
        monkeypatch.setattr(module, "table_of", turned_table)
    return seen


COUNTS = [[3, 0, 5, 1], [0, 0, 0], [16], [17, 16, 15, 0, 33], [0, 100], [1] * 37]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.usefixtures("poison")
def test_tiles_cover_every_row_once(counts: list[int]) -> None:
    ends = torch.tensor(counts).cumsum(0).int()
    tiles = triton_tiles.Tiles(rows=16, columns=16, inner=16, warps=4, stages=1)
    table = triton_tiles.table_of(ends, 100, tiles)
    made = zip(table.experts.tolist(), table.rows.tolist(), strict=True)
    found = [
        (expert, row + more)
        for expert, row in list(made)[: int(table.count)]
        for more in range(16)
        if row + more < ends[expert]
    ]
    expert_of = [expert for expert, count in enumerate(counts) for _ in range(count)]
    assert found == list(zip(expert_of, range(sum(counts)), strict=True))


def test_router_gradient_of_bfloat16_is_summed_in_float32() -> None:
    """Against float64 sums of the same bfloat16 pre-activations."""
    case = Case((40, 2, 4, 64, 256), torch.bfloat16, backend="triton")
    given = {name: tensor.detach() for name, tensor in case.tensors.items()}
    plan = route_plan(case.experts_of, 4)
    names = ("x", "weights_of", "first", "down", "first_bias", "down_bias")
    inputs = grouped_steps.Inputs(*(given.get(name) for name in names))
    kind = kind_of(inputs, "triton", "silu", glu=True, grad=True, compact=True)
    _, pre = grouped_steps.run_forward(inputs, plan, kind)
    wanted = torch.empty(40, 2, dtype=torch.float64)
    for token, slot in itertools.product(range(40), range(2)):
        gate, up = pre[plan.places[token, slot]].double().chunk(2)
        down = given["down"][case.experts_of[token, slot]].double()
        hidden = torch.nn.functional.silu(gate) * up
        wanted[token, slot] = hidden @ (case.upstream[token].double() @ down)
    assert error(case.results()["weights_of"], wanted) < 1e-3


def strided(tensor: Tensor) -> Tensor:
    """Return the values in another order of memory, with gaps."""
    wide = torch.full((*tensor.shape[:-2], tensor.shape[-1] + 3, tensor.shape[-2]), float("nan"))
    other = wide.mT[..., : tensor.shape[-1]]
    assert not other.is_contiguous()
    return other.copy_(tensor.detach()).requires_grad_()


def test_strided_inputs_give_the_same_result() -> None:
    case = Case((9, 2, 3, 20, 24), bias=True, backend="triton")
    wanted = case.results()
    plain, case.tensors = case.tensors, {n: strided(t) for n, t in case.tensors.items()}
    case.upstream = strided(case.upstream).detach()
    got = case.results()
    assert max(error(got[name], wanted[name].double()) for name in got) < 1e-6
    case.tensors, case.upstream = plain, torch.randn(1, 1).expand(9, 20)
    assert wrong(case.results(), case.reference(), torch.float32) == []


@pytest.mark.parametrize(
    ("tokens", "weights_of"),
    [
        (6, torch.tensor(0.5).expand(6, 2)),
        (6, torch.linspace(0, 1, 6)[:, None].expand(6, 2)),
        (6, torch.linspace(0, 1, 30).view(6, 5)[:, :1].expand(6, 1)),
        (1, torch.linspace(0, 1, 8).view(2, 4)[:1, ::2]),
    ],
)
def test_routing_weights_of_any_strides(tokens: int, weights_of: torch.Tensor) -> None:
    slots = weights_of.shape[1]
    found = []
    for given in (weights_of, weights_of.contiguous()):
        torch.manual_seed(0)
        case = Case((tokens, slots, 3, 8, 12), backend="triton")
        case.tensors["weights_of"] = given.detach().requires_grad_()
        found.append(case.results())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[1])


def test_float32_is_rounded_to_tf32_only_where_torch_is_told_to() -> None:
    kind = grouped_steps.Kind(activation="silu", glu=True, backend="loop", triton=True)
    tiles = triton_tiles.tiles_of(torch.float32, (9, 0), inner=8, columns=12, matrices=2)
    matmul, x = torch.backends.cuda.matmul, torch.zeros(6, 8)
    before = matmul.fp32_precision
    try:
        for setting, expected in (("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")):
            matmul.fp32_precision = setting
            found = triton_tiles.constants_of(tiles, x, hidden=8, width=12, kind=kind)
            assert found["PRECISION"] == expected
    finally:
        matmul.fp32_precision = before


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name, module in (("forward", triton_grouped), ("backward", triton_grouped_backward)):

        def spy(*given: Any, run: Any = module.run, name: str = name) -> Any:
            seen.append(name)
            return run(*given)

        monkeypatch.setattr(module, "run", spy)
    return seen


def test_who_asks_for_the_kernels_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_runs(monkeypatch)
    case = Case((9, 2, 3, 8, 12), backend="auto")
    case.results()
    assert seen == []
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert wrong(case.results(), case.reference(), torch.float32) == []
    assert seen == ["forward", "backward"]
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    case.results()
    assert len(seen) == 2
    case.backend = "triton"
    case.results()
    assert len(seen) == 4


def test_too_many_experts_are_refused() -> None:
    plan = route_plan(torch.zeros(2, 1, dtype=torch.int64), 4097)
    down, up = torch.zeros(4097, 1, 1), torch.zeros(4097, 1, 1)
    given = (torch.zeros(2, 1), torch.zeros(2, 1), plan)
    with pytest.raises(ValueError, match="triton cannot run this: 4097 experts"):
        grouped_ffn(*given, down=down, up=up, activation="relu", glu=False, backend="triton")


@pytest.mark.usefixtures("poison")
def test_in_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_runs(monkeypatch)
    case = Case((24, 2, 4, 16, 8), bias=True, backend="triton")
    case.experts_of[::3, 0] = -1
    wanted = case.reference()
    case.run = torch.compile(case.run, backend="aot_eager", fullgraph=True)
    assert wrong(case.results(), wanted, torch.float32) == []
    assert seen == ["forward", "backward"]
