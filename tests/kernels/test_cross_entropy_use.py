"""How the chunked losses of several heads are called: teachers, chunks, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels.cross_entropy import (
    default_chunk,
    multi_head_cross_entropy,
    multi_head_kl,
)


def made() -> tuple[list[Tensor], Tensor]:
    return (
        [torch.randn(20, 8, requires_grad=True) for _ in range(2)],
        torch.randn(31, 8, requires_grad=True),
    )


def test_a_teacher_is_hidden_states_with_a_matrix_of_their_own_or_a_function() -> None:
    hiddens, weight = made()
    own, bias, hidden = torch.randn(31, 5), torch.randn(31), torch.randn(20, 5)
    logits = 3 * torch.tanh(functional.linear(hidden, own, bias) / 3)
    asked = []

    def source(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return logits[start:stop]

    by_function = multi_head_kl(hiddens, weight, source, chunk=6, softcap=3.0)
    assert asked == [(0, 6), (6, 12), (12, 18), (18, 20)]
    by_matrix = multi_head_kl(
        *(hiddens, weight, hidden),
        teacher_weight=own,
        teacher_bias=bias,
        chunk=6,
        softcap=3.0,
    )
    assert (by_matrix - by_function).norm() < 1e-5 * by_function.norm()
    pairs = zip(
        torch.autograd.grad(by_matrix.sum(), [*hiddens, weight]),
        torch.autograd.grad(by_function.sum(), [*hiddens, weight]),
        strict=True,
    )
    assert all((one - two).norm() < 1e-5 * two.norm() for one, two in pairs)


def test_no_gradient_reaches_the_teacher_and_equal_heads_have_no_loss() -> None:
    hiddens, weight = made()
    teacher = hiddens[1].detach().clone().requires_grad_()
    out = multi_head_kl(hiddens, weight, teacher)
    assert out[0] > 0.1
    assert abs(out[1]) < 1e-5
    out.sum().backward()
    assert teacher.grad is None
    first, second = (each.grad for each in hiddens)
    assert second.norm() < 1e-5 * first.norm()  # type: ignore[union-attr]


def test_gradients_are_kept_only_until_they_are_used() -> None:
    hiddens, weight = made()
    out = multi_head_cross_entropy(hiddens, weight, torch.zeros(20, dtype=torch.long))
    node: Any = out.grad_fn
    assert node.found.weight.shape == (31, 8)
    out.sum().backward()
    assert node.found is None


def test_chunks_by_default() -> None:
    assert default_chunk(0, 100) == default_chunk(2048, 49152) == 128
    assert default_chunk(16384, 49152) == 1024
    assert default_chunk(4096, 49152) == 256
    assert default_chunk(2**20, 128256) == 1024
    assert default_chunk(2**20, 2**20) == 256


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.zeros(6).long()

    def refused(error: Any, words: str, *given: Any, **options: Any) -> None:
        missing = ([hidden], weight, targets)[len(given) :]
        with pytest.raises(error, match=words):
            multi_head_cross_entropy(*given, *missing, **options)

    refused(ValueError, "no heads", [])
    refused(ValueError, r"head 1: \[5, 4\]; expected \[6, 4\]", [hidden, hidden[:5]])
    refused(TypeError, r"head 0: torch\.float64, the matrix", [hidden.double()])
    refused(ValueError, r"the matrix is \[9\]", [hidden], weight[:, 0])
    refused(ValueError, r"the tokens: \[5\]", [hidden], weight, targets[:5])
    refused(ValueError, r"targets are \[6, 1\]", [hidden], weight, targets[:, None])
    refused(TypeError, r"targets are torch\.int32", [hidden], weight, targets.int())
    refused(ValueError, r"bias: \[8\]", bias=torch.ones(8))
    refused(ValueError, "2 head weights for 1 heads", head_weights=[1.0, 1.0])
    refused(ValueError, "chunk is 0", chunk=0)
    refused(ValueError, "softcap is 0", softcap=0.0)
    refused(ValueError, "reduction 'none'", reduction="none")
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        multi_head_cross_entropy([hidden], weight, targets + 9)
    for words, options in {
        "temperature is 0": {"temperature": 0.0},
        "the teacher is": {"teacher_weight": torch.randn(9, 5)},
        "the tokens:": {"counted": torch.ones(5, dtype=torch.bool)},
    }.items():
        with pytest.raises(ValueError, match=words):
            multi_head_kl([hidden], weight, hidden, **options)
    with pytest.raises(TypeError, match="counted is"):
        multi_head_kl([hidden], weight, hidden, counted=torch.ones(6))
    with pytest.raises(ValueError, match="for a teacher of hidden states"):
        multi_head_kl([hidden], weight, lambda a, b: hidden[a:b] @ weight.t(), teacher_bias=weight)
    with pytest.raises(ValueError, match="expected one row of logits each"):
        multi_head_kl([hidden], weight, lambda start, stop: torch.randn(1, 9))
    with pytest.raises(ValueError, match="a vocabulary of 9, the teacher has 8"):
        multi_head_kl([hidden], weight, lambda start, stop: torch.randn(stop - start, 8))


Called = Callable[[list[Tensor], Tensor, Any], Tensor]
CALLS: dict[str, Called] = {
    "cross-entropy": lambda hiddens, weight, _: multi_head_cross_entropy(
        hiddens, weight, torch.arange(20), chunk=6
    ),
    "kl": lambda hiddens, weight, teacher: multi_head_kl(hiddens, weight, teacher, chunk=6),
}


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("narrow", ["hiddens", "weight", "second hidden"])
def test_autocast_casts_before_dtypes_are_compared(narrow: str, kind: str) -> None:
    hiddens, weight = made()
    teacher = torch.randn(20, 8)
    with torch.no_grad():
        for each in (*hiddens, weight, teacher):
            each.copy_(each.bfloat16())
    given = {"hiddens": hiddens, "weight": weight}
    if narrow == "weight":
        given["weight"] = weight.detach().bfloat16().requires_grad_()
    else:
        first = 1 if narrow == "second hidden" else 0
        cast = [each.detach().bfloat16().requires_grad_() for each in hiddens[first:]]
        given["hiddens"] = [*hiddens[:first], *cast]

    def results(hiddens: list[Tensor], weight: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            out = CALLS[kind](hiddens, weight, teacher)
        return [out.detach(), *torch.autograd.grad(out.sum(), [*hiddens, weight])]

    # all numbers are of bfloat16 already, so what was cast by whom changes no bit
    got, wanted = results(**given), results(hiddens, weight)  # type: ignore[arg-type]
    assert all(torch.equal(one.float(), two) for one, two in zip(got, wanted, strict=True))
    for one, tensor in zip(got[1:], [*given["hiddens"], given["weight"]], strict=True):
        assert one.dtype == tensor.dtype
    with pytest.raises(TypeError, match="matrix is"):
        CALLS[kind](given["hiddens"], given["weight"], teacher)  # type: ignore[arg-type]


def test_the_teacher_is_computed_under_the_autocast_of_the_call() -> None:
    hiddens, weight = made()
    hidden, own, bias = torch.randn(20, 5), torch.randn(31, 5, requires_grad=True), torch.randn(31)
    seen = []

    def source(start: int, stop: int) -> Tensor:
        seen.append(functional.linear(hidden[start:stop], own, bias))
        return seen[-1]

    def by_matrix(hidden: Tensor, own: Tensor, bias: Tensor) -> Tensor:
        return multi_head_kl(
            *(hiddens, weight, hidden), teacher_weight=own, teacher_bias=bias, chunk=6
        )

    with torch.autocast("cpu", torch.bfloat16):
        by_function = multi_head_kl(hiddens, weight, source, chunk=6)
        wanted = by_matrix(hidden, own, bias)
        mixed = by_matrix(hidden.bfloat16(), own, bias.bfloat16())
        assert functional.linear(hidden, own).requires_grad
    assert torch.equal(by_function, wanted)
    assert torch.equal(mixed, wanted)
    # losses of different upstream gradients are computed again, out of reach of the caller's
    forward = len(seen)
    by_function.backward(torch.tensor([1.0, 2.0]))
    assert len(seen) == 2 * forward
    assert {each.dtype for each in seen} == {torch.bfloat16}
    assert own.grad is None


def test_a_teacher_of_two_dtypes_is_refused() -> None:
    hiddens, weight = made()
    teacher = torch.randn(20, 8)
    with pytest.raises(TypeError, match=r"the teacher: torch\.bfloat16, its matrix is torch\.floa"):
        multi_head_kl(hiddens, weight, teacher.bfloat16())
    with pytest.raises(TypeError, match=r"the teacher's bias: torch\.float64, its matrix"):
        multi_head_kl(
            *(hiddens, weight, teacher),
            teacher_weight=weight,
            teacher_bias=torch.randn(31).double(),
        )


@pytest.mark.parametrize("kind", CALLS)
def test_the_sum_of_a_chunk_may_leave_float16_where_the_mean_does_not(kind: str) -> None:
    hidden = torch.full((1024, 4), 80.0, dtype=torch.float16)
    hidden[:, 1] = 2.0**-10
    hidden[:, 2] = -80
    weight = torch.zeros(50, 4, dtype=torch.float16, requires_grad=True)
    logits = torch.zeros(1024, 50).index_fill_(1, torch.tensor(3), 30.0)
    if kind == "kl":
        out = multi_head_kl([hidden], weight, lambda start, stop: logits[start:stop], chunk=1024)
    else:
        targets = torch.full((1024,), 3)
        out = multi_head_cross_entropy([hidden], weight, targets, chunk=1024)
    out.sum().backward()
    wide = weight.detach().double().requires_grad_()
    found = functional.linear(hidden.double(), wide).log_softmax(-1)
    (-(logits.double().softmax(-1) * found).sum(-1).mean()).backward()
    assert weight.grad is not None
    assert wide.grad is not None
    for column in range(4):
        apart = (weight.grad[:, column].double() - wide.grad[:, column]).norm()
        assert apart < 2e-2 * wide.grad[:, column].norm()
