"""How routed low-rank adapters are called: refusals, and which form runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels.lora import choose_form, grouped_lora
from adaconvert.kernels.plan import route_plan


def run(width: int = 16, **changed: Any) -> Tensor:
    given = {
        **{"x": torch.randn(6, width), "weights_of": torch.rand(6, 2)},
        **{"a": torch.randn(4, 8, width), "b": torch.randn(4, 24, 8)},
        **{"base_out": None, "scaling": 1.0},
        **changed,
    }
    plan = route_plan(torch.rand(6, 4).topk(2).indices, 4)
    first = (given.pop("x"), given.pop("base_out"), plan, given.pop("weights_of"))
    return grouped_lora(*first, **given)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x", (6, 15)), ("weights_of", (6, 3)), ("a", (3, 8, 16)), ("b", (4, 24, 7))],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"{name} is \[{', '.join(map(str, shape))}\]; expected"):
        run(**{name: torch.randn(shape)})


def test_what_does_not_fit_is_refused() -> None:
    assert run().shape == (6, 24)
    for words, changed in {
        "base_out is": {"base_out": torch.randn(6, 23)},
        "scaling is": {"scaling": torch.ones(3)},
        "one matrix per adapter": {"a": torch.randn(8, 16)},
        "a is of rank 0": {"a": torch.randn(4, 0, 16), "b": torch.randn(4, 24, 0)},
        "form 'some'": {"form": "some"},
        "backend 'some'": {"backend": "some"},
        "grouped_mm cannot run this: sizes": {
            **{"width": 15, "form": "sorted", "backend": "grouped_mm"}
        },
    }.items():
        with pytest.raises(ValueError, match=words):
            run(**changed)  # type: ignore[arg-type]


def test_forms_by_what_is_selected() -> None:
    def chosen(
        tokens: int, slots: int, experts: int, rank: int, outputs: int = 64, **kind: Any
    ) -> str:
        plan = route_plan(torch.zeros(tokens, slots, dtype=torch.long), experts)
        a, b = torch.empty(experts, rank, 8), torch.empty(experts, outputs, rank)
        form, reason = choose_form(plan, torch.empty(tokens, 8, **kind), a, b)
        assert f"{slots} of {experts}" in reason
        return form

    assert chosen(512, 2, 8, 16) == chosen(512, 2, 64, 16) == chosen(1, 8, 8, 16) == "sorted"
    assert chosen(512, 4, 8, 16) == chosen(512, 8, 8, 16) == chosen(512, 1, 4, 4) == "all"
    # the same adapters on outputs that leave the cache
    assert (chosen(2048, 2, 8, 16, 1536), chosen(2048, 2, 8, 16, 8192)) == ("sorted", "all")
    assert chosen(2048, 2, 64, 16, 8192) == "sorted"
    low: dict[str, Any] = {"dtype": torch.bfloat16}
    assert chosen(512, 2, 8, 16, **low) == chosen(512, 2, 32, 16, **low) == "all"
    assert chosen(512, 2, 64, 16, **low) == chosen(1, 2, 8, 16, **low) == "sorted"


@pytest.mark.parametrize("form", ["sorted", "all", "auto"])
def test_an_overflow_of_an_adapter_that_is_not_selected_does_not_show(form: Any) -> None:
    """Its low-rank values leave float16, and so do the gradients of another's."""
    x = torch.full((6, 16), 16.0, dtype=torch.float16, requires_grad=True)
    a = torch.full((4, 1, 16), 2.0**-8, dtype=torch.float16)
    b = torch.full((4, 24, 1), 2.0**-8, dtype=torch.float16)
    a[1], b[2] = 6e4, 6e4
    a.requires_grad_(), b.requires_grad_()
    weights_of = torch.full((6, 2), 0.5, requires_grad=True)
    experts_of = torch.tensor([[0, 3]]).repeat(6, 1)
    experts_of[2:4, 1] = -1
    plan = route_plan(experts_of, 4)
    out = grouped_lora(x, None, plan, weights_of, a=a, b=b, scaling=1.0, form=form)
    live = (experts_of >= 0).sum(1, keepdim=True)
    assert torch.equal(out, (live * 2.0**-9).half().expand(6, 24))
    out.backward(torch.full_like(out, 8.0))
    assert all(each.grad.isfinite().all() for each in (x, weights_of, a, b))  # type: ignore[union-attr]
    assert not a.grad[1:3].any()  # type: ignore[index]
    assert not b.grad[1:3].any()  # type: ignore[index]
    # 24 outputs of 8 * 2^-8 each, times 2^-8 and the weight 0.5
    assert torch.equal(x.grad, (live * 0.75 * 2.0**-9).half().expand(6, 16))
    assert torch.equal(weights_of.grad, torch.where(experts_of >= 0, 0.75, 0.0))


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("form", ["sorted", "all", "auto"])
def test_shapes_follow_on_the_meta_device(form: Any, base: bool) -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

    x, a, b = empty(6, 16), empty(4, 8, 16), empty(4, 24, 8)
    weights_of = empty(6, 2, dtype=torch.float32)
    plan = route_plan(torch.zeros(6, 2, dtype=torch.long, device="meta"), 4)
    onto = empty(6, 24, dtype=torch.float32) if base else None
    out = grouped_lora(x, onto, plan, weights_of, a=a, b=b, scaling=1.0, form=form)
    assert (out.shape, out.device.type) == ((6, 24), "meta")
    assert out.dtype == (torch.float32 if base else torch.bfloat16)
    out.sum().backward()
    for each in (x, a, b, weights_of):
        assert each.grad is not None
        assert (each.grad.shape, each.grad.dtype) == (each.shape, each.dtype)
