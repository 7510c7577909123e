"""Chunked losses of several heads against whole logits in float64: values and all gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adaconvert.kernels import head_losses
from adaconvert.kernels.cross_entropy import multi_head_cross_entropy, multi_head_kl

#: relative to the norm of the float64 result: losses, gradients.
LIMITS = {
    torch.float32: (1e-5, 1e-5),
    torch.bfloat16: (1e-2, 2e-2),
    torch.float16: (1e-2, 2e-2),
    torch.float64: (1e-13, 1e-13),
}
KINDS = ["cross-entropy", "kl"]


@dataclass
class Case:
    """Random tensors of one call; `sizes` are H, T, d, V."""

    sizes: tuple[int, int, int, int]
    kind: str = "cross-entropy"
    dtype: torch.dtype = torch.float32
    bias: bool = True
    ignored: Any = field(default_factory=lambda: slice(None, None, 4))
    temperature: float = 2.0
    options: dict[str, Any] = field(default_factory=lambda: {"chunk": 7})
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        heads, tokens, size, vocabulary = self.sizes
        shapes: dict[str, tuple[int, ...]] = {"weight": (vocabulary, size)}
        shapes |= {"bias": (vocabulary,)} if self.bias else {}
        shapes |= {str(at): (tokens, size) for at in range(heads)}
        self.tensors = {
            name: torch.randn(shape).to(self.dtype).requires_grad_()
            for name, shape in shapes.items()
        }
        self.teacher = torch.randn(tokens, size).to(self.dtype)
        self.targets = torch.randint(0, vocabulary, (tokens,))
        self.targets[self.ignored] = -100
        self.upstream = torch.ones(heads)

    def run(self, **changed: Any) -> Tensor:
        given = {**self.tensors, **changed}
        hiddens = [given[str(at)] for at in range(self.sizes[0])]
        rest = {"bias": given.get("bias"), **self.options}
        if self.kind == "cross-entropy":
            return multi_head_cross_entropy(hiddens, given["weight"], self.targets, **rest)
        rest = {"temperature": self.temperature, "counted": self.targets != -100, **rest}
        return multi_head_kl(hiddens, given["weight"], self.teacher, **rest)

    def results(self, **changed: Any) -> dict[str, Tensor]:
        return gradients(self.run(**changed), {**self.tensors, **changed}, self.upstream)

    def reference(self, lost: int | None = None) -> dict[str, Tensor]:
        """Return what should come out, without the token `lost`."""
        wide = {name: t.detach().double().requires_grad_() for name, t in self.tensors.items()}
        counted = self.targets != -100
        if lost is not None:
            counted[lost] = False
        weights = self.options.get("head_weights") or [1.0] * self.sizes[0]
        losses = [
            weights[at] * self.loss(self.logits(wide[str(at)], wide), wide)[counted].sum()
            for at in range(self.sizes[0])
        ]
        out = torch.stack(losses)
        if self.options.get("reduction", "mean") == "mean":
            out = out / (self.targets != -100).sum().clamp(min=1)
        return gradients(out, wide, self.upstream.double())

    def logits(self, hidden: Tensor, wide: dict[str, Tensor]) -> Tensor:
        logits = functional.linear(hidden, wide["weight"], wide.get("bias"))
        logits = logits * self.options.get("logit_scale", 1.0)
        cap = self.options.get("softcap")
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def loss(self, logits: Tensor, wide: dict[str, Tensor]) -> Tensor:
        if self.kind == "cross-entropy":
            return functional.cross_entropy(logits, self.targets.clamp(min=0), reduction="none")
        with torch.no_grad():
            teacher = self.logits(self.teacher.double(), wide) / self.temperature
            teacher = teacher.log_softmax(-1)
        student = (logits / self.temperature).log_softmax(-1)
        return self.temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def gradients(out: Tensor, inputs: dict[str, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """Differentiate the sum as such, anything else by its upstream gradient."""
    upstream = upstream.to(out.dtype)
    total = out.sum() if bool((upstream == 1).all()) else (out * upstream).sum()
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return {"out": out.detach()} | {
        name: torch.zeros_like(tensor) if grad is None else grad
        for (name, tensor), grad in zip(inputs.items(), grads, strict=True)
    }


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


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"head_weights": [0.5, 2.0]},
    "sum": {"reduction": "sum"},
    "scaled and capped": {"logit_scale": 0.5, "softcap": 3.0, "head_weights": [1.0, 0.25]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_values_and_gradients(dtype: torch.dtype, form: str, kind: str) -> None:
    case = Case((2, 40, 24, 65), kind, dtype, options={"chunk": 9, **FORMS[form]})
    wanted, got = case.reference(), case.results()
    assert wrong(got, wanted, dtype) == []
    assert all(got[name].dtype == (dtype if name != "out" else torch.float32) for name in got)
    # the limits notice zeros and, in whatever it enters, a lost token
    zeros = {name: torch.zeros_like(tensor) for name, tensor in got.items()}
    assert len(wrong(zeros, wanted, dtype)) == len(got)
    assert len(wrong(case.reference(lost=5), wanted, torch.bfloat16)) >= len(got) - 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("upstream", [[2.0, 2.0, 2.0], [1.0, 0.0, 0.0], [0.5, -2.0, 3.0]], ids=str)
def test_any_function_of_the_losses(upstream: list[float], kind: str) -> None:
    options = {"chunk": 7, "head_weights": [1.0, 0.5, 2.0]}
    case = Case((3, 23, 12, 31), kind, options=options)
    case.upstream = torch.tensor(upstream)
    assert wrong(case.results(), case.reference(), torch.float32) == []


ODD = {
    "no tokens": ((2, 0, 8, 11), {}),
    "one token": ((1, 1, 8, 11), {"ignored": slice(0)}),
    "one word": ((2, 9, 8, 1), {}),
    "one dimension": ((2, 9, 1, 11), {}),
    "no bias": ((2, 9, 8, 11), {"bias": False}),
    "nothing ignored": ((2, 15, 8, 11), {"ignored": slice(0)}),
    "everything ignored": ((2, 15, 8, 11), {"ignored": slice(None)}),
    "all but one ignored": ((2, 15, 8, 11), {"ignored": slice(1, None)}),
    "a whole chunk ignored": ((2, 20, 8, 11), {"ignored": slice(7, 14)}),
    "by default": ((2, 300, 8, 11), {"options": {}}),
    "more than there are": ((2, 9, 8, 11), {"options": {"chunk": 100}}),
    "one by one": ((2, 9, 8, 11), {"options": {"chunk": 1}}),
    "a head of no weight": ((2, 9, 8, 11), {"options": {"head_weights": [0.0, 1.0]}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ODD)
def test_edges(name: str, kind: str) -> None:
    sizes, options = ODD[name]
    case = Case(sizes, kind, **options)
    got = case.results()
    wanted = case.reference()
    if sizes[3] == 1:
        # of one word there is nothing to learn: exact zeros against rounded ones
        assert not any(tensor.any() for tensor in got.values())
    else:
        assert wrong(got, wanted, torch.float32) == []
    if name in ("everything ignored", "no tokens"):
        assert not any(tensor.any() for tensor in got.values())


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_count_for_nothing_as_on_an_accelerator(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There they are not left out, but counted 0 times."""
    case = Case((2, 23, 12, 31), kind)
    spans = head_losses._spans

    def masked(work: head_losses.Work, wide: torch.dtype) -> Any:
        for start in range(0, work.counted.shape[0], work.chunk):
            counted = work.counted[start : start + work.chunk]
            yield start, start + counted.shape[0], None, counted[:, None].to(wide)

    wanted = case.results()
    monkeypatch.setattr(head_losses, "_spans", masked)
    assert head_losses._spans is not spans
    assert wrong(case.results(), case.reference(), torch.float32) == []
    assert all(error(case.results()[name], wanted[name].double()) < 1e-6 for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True])
def test_gradcheck(mixed: bool, kind: str) -> None:
    options = {"chunk": 2, "head_weights": [1.0, 0.5], "logit_scale": 0.7, "softcap": 2.0}
    case = Case((2, 5, 3, 7), kind, torch.float64, options=options)
    if kind == "kl":
        # the teacher's matrix is the students', and moves with it where it is not given
        weight, bias = (case.tensors[name].detach().clone() for name in ("weight", "bias"))
        case.options |= {"teacher_weight": weight, "teacher_bias": bias}
    names = list(case.tensors)

    def call(*given: Tensor) -> Tensor:
        out = case.run(**dict(zip(names, given, strict=True)))
        return out if mixed else out.sum()

    assert torch.autograd.gradcheck(call, list(case.tensors.values()))


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_can_be_differentiated_again(kind: str) -> None:
    case = Case((2, 20, 8, 31), kind)
    inputs = list(case.tensors.values())
    total = case.run().sum()
    once, again, third = (
        torch.autograd.grad(total, inputs, retain_graph=True, grad_outputs=torch.tensor(factor))
        for factor in (1.0, 1.0, 3.0)
    )
    for one, two, three in zip(once, again, third, strict=True):
        assert torch.equal(one, two)
        assert error(three, 3 * one.double()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_every_time(kind: str) -> None:
    case = Case((3, 40, 24, 65), kind, torch.bfloat16)
    once, again = case.results(), case.results()
    assert all(torch.equal(once[name], again[name]) for name in once)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_allocated_is_written(kind: str) -> None:
    case = Case((2, 20, 8, 31), kind)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        got = case.results()
    finally:
        torch.use_deterministic_algorithms(False)
    assert wrong(got, case.reference(), torch.float32) == []


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.numel())
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_logits_exist_a_chunk_at_a_time_and_are_not_kept(kind: str) -> None:
    case = Case((3, 256, 4, 500), kind, ignored=slice(0), options={"chunk": 16})
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Largest() as seen:
        out = case.run()
        grads = torch.autograd.grad(out.sum(), list(case.tensors.values()))
    assert len(grads) == 5
    assert seen.numbers == 16 * 500
    # matrix, bias and hidden states themselves
    assert sum(kept.values()) <= 4 * (500 * 4 + 500 + 3 * 256 * 4)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_differentiated_where_nobody_asks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case((2, 20, 8, 31), kind)
    wanted = case.run().detach()
    added: list[int] = []
    add = head_losses._add
    monkeypatch.setattr(head_losses, "_add", lambda *given: (added.append(1), add(*given)))
    with torch.no_grad():
        assert torch.equal(case.run(), wanted)
    frozen = {name: tensor.detach() for name, tensor in case.tensors.items()}
    assert torch.equal(case.run(**frozen), wanted)
    assert added == []
    case.run(**{**frozen, "0": case.tensors["0"]})
    assert added


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight", "bias", "0", "1"])
def test_only_what_needs_a_gradient_gets_one(name: str, kind: str) -> None:
    case = Case((2, 20, 8, 31), kind)
    whole = case.results()
    frozen = {each: tensor.detach() for each, tensor in case.tensors.items()}
    frozen[name].requires_grad_()
    case.run(**frozen).sum().backward()
    assert torch.equal(frozen[name].grad, whole[name])  # type: ignore[arg-type]


def test_a_frozen_matrix_takes_any_upstream_gradient_without_computing_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case((2, 20, 8, 31), bias=False)
    case.tensors["weight"].requires_grad_(False)
    out = case.run()
    monkeypatch.setattr(head_losses, "_run", None)
    hiddens = [case.tensors["0"], case.tensors["1"]]
    got = torch.autograd.grad(out, hiddens, torch.tensor([0.5, -2.0]))
    monkeypatch.undo()
    once = torch.autograd.grad(case.run().sum(), hiddens)
    for factor, mixed, plain in zip((0.5, -2.0), got, once, strict=True):
        assert error(mixed, factor * plain.double()) < 1e-6


def test_layouts_of_inputs() -> None:
    for kind in KINDS:
        case = Case((2, 20, 8, 31), kind)
        strided = {
            name: t.detach().t().contiguous().t().requires_grad_() if t.dim() == 2 else t
            for name, t in case.tensors.items()
        }
        assert wrong(case.results(**strided), case.reference(), torch.float32) == []


def test_words_that_are_ruled_out_by_the_bias() -> None:
    for kind in KINDS:
        case = Case((2, 20, 8, 31), kind)
        with torch.no_grad():
            case.tensors["bias"][17:] = -torch.inf
        case.targets = torch.where(case.targets > 0, case.targets % 17, case.targets)
        got = case.results()
        assert all(tensor.isfinite().all() for tensor in got.values())
        small = {
            name: (t[:17] if name in ("weight", "bias") else t).detach().requires_grad_()
            for name, t in case.tensors.items()
        }
        wanted = case.results(**small)
        assert error(got["out"], wanted["out"].double()) < 1e-6
        assert error(got["weight"][:17], wanted["weight"].double()) < 1e-5


def test_autocast_computes_in_its_dtype() -> None:
    for kind in KINDS:
        case = Case((2, 40, 24, 65), kind)
        with torch.autocast("cpu", torch.bfloat16):
            out = case.run()
        got = gradients(out, case.tensors, case.upstream)
        wanted = case.reference()
        assert wrong(got, wanted, torch.bfloat16) == []
        assert error(got["weight"], wanted["weight"]) > 1e-4
        assert all(tensor.dtype == torch.float32 for tensor in got.values())


def test_a_compiled_caller_gets_the_same() -> None:
    for kind in KINDS:
        case = Case((2, 20, 8, 31), kind)
        wanted = case.results()

        def call(case: Case, given: dict[str, Tensor]) -> Tensor:
            return case.run(**given)

        compiled = torch.compile(call, backend="aot_eager")
        got = gradients(compiled(case, case.tensors), case.tensors, case.upstream)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_many_tokens_do_not_wear_out_the_gradient_of_a_bfloat16_matrix() -> None:
    """It is summed in float32: with 64 chunks as good as with one."""
    case = Case((1, 256, 16, 40), dtype=torch.bfloat16, bias=False, options={"chunk": 4})
    many = error(case.results()["weight"], case.reference()["weight"])
    case.options = {"chunk": 256}
    assert many < 1.5 * error(case.results()["weight"], case.reference()["weight"])
