"""Taking tokens out and adding to them, against a loop over tokens in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels.token_rows import gather_rows, scatter_add_rows

#: relative to the norm of the float64 result: output, gradients.
LIMITS = {
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1e-2, 2e-2),
    torch.float64: (1e-14, 1e-14),
}


def chosen(sequences: int, tokens: int, places: int) -> Tensor:
    return torch.rand(sequences, tokens).topk(places).indices.sort(-1).values


def made(
    indices: Tensor, tokens: int, width: int, dtype: torch.dtype, gate: torch.dtype | None
) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(*indices.shape[:-1], tokens, width).to(dtype).requires_grad_(),
        "rows": torch.randn(*indices.shape, width).to(dtype).requires_grad_(),
    }
    if gate is not None:
        tensors["gate"] = torch.rand(indices.shape).to(gate).requires_grad_()
    return tensors


def one_by_one(given: dict[str, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `gather_rows` and `scatter_add_rows` return."""
    x, rows = given["x"], given["rows"]
    tokens, width = x.shape[-2:]
    # of everything given, even where no token is chosen
    none = sum(0 * tensor.sum() for tensor in given.values())
    taken, out = torch.zeros_like(rows) + none, x + none
    flat = indices.reshape(x.shape[:-2].numel(), indices.shape[-1])
    for sequence, mine in enumerate(flat.tolist()):
        for place, token in enumerate(mine):
            if 0 <= token < tokens:
                at = (sequence, place)
                row = rows.view(*flat.shape, width)[at]
                if "gate" in given:
                    row = row * given["gate"].view(flat.shape)[at]
                taken.view(*flat.shape, width)[at] = x.view(-1, tokens, width)[sequence, token]
                out.view(-1, tokens, width)[sequence, token] += row
    return taken, out


def run(given: dict[str, Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
    out = scatter_add_rows(given["x"], given["rows"], indices, given.get("gate"))
    return gather_rows(given["x"], indices), out


def results(call: Any, given: dict[str, Tensor], ups: tuple[Tensor, ...]) -> dict[str, Tensor]:
    taken, out = call(given)
    wide = [up.to(out.dtype) for up in ups]
    (of_taken,) = torch.autograd.grad(taken, given["x"], wide[0], retain_graph=True)
    grads = torch.autograd.grad(out, list(given.values()), wide[1])
    named = {f"grad {name}": grad for name, grad in zip(given, grads, strict=True)}
    return {"taken": taken.detach(), "out": out.detach(), "grad taken": of_taken, **named}


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the relative error; inf where something is not a number."""
    norm = wanted.norm()
    difference = (got.double() - wanted).norm()
    if not norm:
        return float(difference) if difference.isfinite() else float("inf")
    return float(difference / norm) if difference.isfinite() else float("inf")


def wrong(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> list[str]:
    """Return what is beyond the limits of the dtype."""
    return [
        f"{name}: {found:.2e}"
        for name, tensor in wanted.items()
        if (found := error(got[name], tensor)) > LIMITS[dtype][name.startswith("grad")]
    ]


def check(
    indices: Tensor, tokens: int, width: int, dtype: torch.dtype, gate: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what came out and what should; they agree."""
    given = made(indices, tokens, width, dtype, gate)
    wide = {name: t.detach().double().requires_grad_() for name, t in given.items()}
    ups = torch.randn(given["rows"].shape), torch.randn(given["x"].shape)
    ups = tuple(up.to(dtype).double() for up in ups)  # type: ignore[assignment]
    got = results(lambda given: run(given, indices), given, ups)
    wanted = results(lambda given: one_by_one(given, indices), wide, ups)
    assert wrong(got, wanted, dtype) == []
    for name, tensor in got.items():
        assert tensor.dtype == (gate if name == "grad gate" else dtype)
    return got, wanted


GATES = [
    *((dtype, gate) for dtype in LIMITS for gate in (None, dtype)),
    *((dtype, torch.float32) for dtype in (torch.bfloat16, torch.float16)),
]


@pytest.mark.parametrize(("dtype", "gate"), GATES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, gate: torch.dtype | None) -> None:
    indices = chosen(3, 40, 9)
    indices[0, :2] = -1
    indices[1, -3:] = 40
    got, wanted = check(indices, 40, 24, dtype, gate)
    # the limits notice zeros
    zeros = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    assert len(wrong(zeros, wanted, dtype)) == len(got)


def test_the_limits_notice_a_lost_token() -> None:
    indices = chosen(2, 20, 6)
    less = indices.clone()
    less[1, 4] = 20
    given = made(indices, 20, 8, torch.float64, torch.float64)
    ups = torch.randn(2, 6, 8).double(), torch.randn(2, 20, 8).double()
    got = results(lambda given: run(given, less), given, ups)
    wanted = results(lambda given: one_by_one(given, indices), given, ups)
    # the gradient of x by the sum is that of the sum, whatever is chosen
    assert len(wrong(got, wanted, torch.float32)) == len(got) - 1


NONE = torch.full((2, 3), -1)
ODD = {
    "no tokens": (torch.full((2, 3), 0), 0),
    "no places": (torch.zeros(2, 0, dtype=torch.long), 7),
    "no sequences": (torch.zeros(0, 3, dtype=torch.long), 7),
    "one token": (torch.zeros(1, 1, dtype=torch.long), 1),
    "all tokens": (torch.arange(9).expand(2, 9), 9),
    "none": (NONE, 5),
    "none in one": (torch.stack([torch.tensor([0, 2, 4]), torch.tensor([-1, 9, 5])]), 5),
    "last is chosen and some are none": (torch.tensor([[-1, 1, 4], [-1, -1, 4]]), 5),
    "only the last": (torch.tensor([[4, 5, 5]]), 5),
    "between others": (torch.tensor([[0, -1, 3], [1, 7, 2]]), 5),
    "one sequence alone": (torch.tensor([1, 3, 4]), 5),
    "two leading dimensions": (chosen(6, 11, 4).view(2, 3, 4), 11),
    "int32": (chosen(3, 11, 4).int(), 11),
}


@pytest.mark.parametrize("gate", [None, torch.float32], ids=str)
@pytest.mark.parametrize("name", ODD)
def test_edges(name: str, gate: torch.dtype | None) -> None:
    indices, tokens = ODD[name]
    check(indices, tokens, 5, torch.float32, gate)


def test_gradcheck() -> None:
    indices = torch.tensor([[0, 2, -1], [1, 3, 4]])
    given = made(indices, 5, 3, torch.float64, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, rows, gate: run({"x": x, "rows": rows, "gate": gate}, indices),
        list(given.values()),
    )


def test_the_same_bits_every_time_and_no_input_is_changed() -> None:
    indices = chosen(4, 64, 16)
    indices[2, 5:] = 64
    given = made(indices, 64, 32, torch.bfloat16, torch.float32)
    before = {name: tensor.clone() for name, tensor in given.items()}
    ups = torch.randn(4, 16, 32), torch.randn(4, 64, 32)
    once, again = (results(lambda given: run(given, indices), given, ups) for _ in range(2))
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_everything_allocated_is_written_and_rows_of_no_token_do_not_show() -> None:
    indices = chosen(3, 20, 6)
    indices[1, 3:], indices[2] = 20, -1
    given = made(indices, 20, 8, torch.float32, torch.float32)
    with torch.no_grad():
        given["rows"][1, 3:], given["gate"][2] = float("nan"), float("inf")
    torch.use_deterministic_algorithms(True)
    try:
        taken, out = run(given, indices)
        (grad,) = torch.autograd.grad(out.sum() + taken.sum(), given["x"])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(tensor.isfinite().all() for tensor in (taken, out, grad))
    assert not taken[2].any()
    assert torch.equal(out[2], given["x"][2])


@pytest.mark.parametrize("name", ["rows", "gate"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_what_is_at_places_of_no_token_reaches_no_gradient(bad: float, name: str) -> None:
    indices = chosen(3, 20, 6)
    indices[1, 3:], indices[2] = 20, -1
    given = made(indices, 20, 8, torch.float32, torch.float32)
    ups = torch.randn(3, 6, 8), torch.randn(3, 20, 8)
    wanted = results(lambda given: run(given, indices), given, ups)
    with torch.no_grad():
        given[name][1, 3:], given[name][2] = bad, bad
    got = results(lambda given: run(given, indices), given, ups)
    assert all(torch.equal(got[each], wanted[each]) for each in wanted)
    lost = torch.zeros(3, 6, dtype=torch.bool)
    lost[1, 3:], lost[2] = True, True
    assert not got["grad rows"][lost].any()
    assert not got["grad gate"][lost].any()


def test_rows_of_no_numbers() -> None:
    for gate in (None, torch.float32):
        indices = torch.tensor([[0, 2, -1], [1, 3, 4]])
        given = made(indices, 5, 0, torch.float32, gate)
        taken, out = run(given, indices)
        assert (taken.shape, out.shape) == ((2, 3, 0), (2, 5, 0))
        (taken.sum() + out.sum()).backward()
        assert all(tensor.grad.shape == tensor.shape for tensor in given.values())  # type: ignore[union-attr]
        assert gate is None or not given["gate"].grad.any()  # type: ignore[union-attr]


def test_full_capacity_is_the_block_itself() -> None:
    x, block = torch.randn(2, 9, 4), torch.nn.Linear(4, 4)
    everyone = torch.arange(9).expand(2, 9)
    rows = gather_rows(x, everyone)
    assert torch.equal(rows, x)
    assert torch.equal(scatter_add_rows(x, block(rows), everyone), x + block(x))


def test_layouts_of_inputs_and_upstream_gradients() -> None:
    indices = chosen(2, 12, 6)
    given = made(indices, 12, 6, torch.float32, torch.float32)
    strided = {
        name: tensor.detach().mT.contiguous().mT.requires_grad_() for name, tensor in given.items()
    }
    ups = torch.randn(1, 1, 1).expand(2, 6, 6), torch.randn(1, 1, 1).expand(2, 12, 6)
    apart = indices.t().contiguous().t()
    got = results(lambda given: run(given, apart), strided, ups)
    wanted = results(lambda given: run(given, indices), given, ups)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_result_may_be_changed_in_place() -> None:
    indices = torch.tensor([[0, 2, -1], [1, 3, 4]])
    given = made(indices, 5, 3, torch.float32, None)
    taken, out = run(given, indices)
    (taken.mul_(2).sum() + out.mul_(3).sum()).backward()
    assert torch.equal(given["rows"].grad[1], torch.full((3, 3), 3.0))  # type: ignore[index]


def test_keeps_no_copy_of_x() -> None:
    indices = chosen(2, 64, 8)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for gate, most in ((None, 2 * 8), (torch.float32, 2 * 8 * 16)):
        given = made(indices, 64, 16, torch.float32, gate)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            taken, out = run(given, indices)
        assert taken.requires_grad
        assert out.requires_grad
        assert max(kept) == most


@pytest.mark.parametrize("gate", [None, torch.float32], ids=str)
def test_compiled_whole_it_gives_the_same_bits(gate: torch.dtype | None) -> None:
    indices = chosen(3, 20, 6)
    indices[1, 3:] = 20
    given = made(indices, 20, 8, torch.float32, gate)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ups = torch.randn(3, 6, 8), torch.randn(3, 20, 8)
    got = results(lambda given: compiled(given, indices), given, ups)
    wanted = results(lambda given: run(given, indices), given, ups)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_what_does_not_fit_is_refused() -> None:
    x, indices = torch.randn(2, 5, 3), torch.tensor([[0, 1], [2, 4]])
    for unordered in ([[1, 0], [2, 4]], [[0, 1], [2, 2]], [[0, 1], [4, 3]]):
        with pytest.raises(ValueError, match="do not rise, or one is there twice"):
            gather_rows(x, torch.tensor(unordered))
    with pytest.raises(ValueError, match="do not rise"):
        gather_rows(x, torch.tensor([[3, -1, 2], [0, 1, 2]]))
    with pytest.raises(TypeError, match=r"torch\.float32; expected integers"):
        gather_rows(x, indices.float())
    with pytest.raises(ValueError, match=r"indices \[1, 2\] are not those of x \[2, 5, 3\]"):
        gather_rows(x, indices[:1])
    with pytest.raises(ValueError, match=r"rows are \[2, 3, 3\]; expected \[2, 2, 3\]"):
        scatter_add_rows(x, torch.randn(2, 3, 3), indices)
    with pytest.raises(TypeError, match=r"rows are torch\.float64, x is torch\.float32"):
        scatter_add_rows(x, torch.randn(2, 2, 3).double(), indices)
    with pytest.raises(ValueError, match=r"gate is \[2\]; expected \[2, 2\]"):
        scatter_add_rows(x, torch.randn(2, 2, 3), indices, torch.ones(2))
