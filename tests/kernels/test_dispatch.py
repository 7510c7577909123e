"""Which kernel is chosen, how the environment overrides it, and how that is explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from adaconvert.kernels import dispatch
from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_execution
from adaconvert.modeling.adaptive_execution import ExpertWeights, run_experts


def kernel(refuses: str | None = None, loses: str | None = None) -> dispatch.Kernel:
    return dispatch.Kernel(
        backend="triton",
        call=expert_ffn,
        refuses=lambda facts: refuses,
        loses=lambda facts: loses if facts["tokens"] > 8 else None,
    )


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)


def test_without_kernels_torch_runs_and_why_says_so() -> None:
    assert dispatch.select("expert_ffn", device="cpu") is None
    assert dispatch.why("expert_ffn") == "expert_ffn: torch, because no kernel is installed for it"


def test_unknown_value_of_the_variable_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "cuda")
    with pytest.raises(ValueError, match="ADACONVERT_KERNELS is 'cuda'; expected one of auto"):
        dispatch.select("expert_ffn")
    with pytest.raises(ValueError, match="ADACONVERT_KERNELS"):
        dispatch.why("expert_ffn")


def test_unknown_operation_is_an_error() -> None:
    with pytest.raises(KeyError, match="no_such_op"):
        dispatch.select("no_such_op")


@pytest.mark.parametrize(
    ("value", "tokens", "chosen", "reason"),
    [
        ("auto", 1, True, "triton, because ADACONVERT_KERNELS=auto"),
        ("auto", 64, False, "torch, because triton: too many tokens"),
        ("triton", 64, True, "triton, because ADACONVERT_KERNELS=triton"),
        ("torch", 1, False, "torch, because ADACONVERT_KERNELS=torch"),
        ("", 1, True, "triton, because ADACONVERT_KERNELS=auto"),
    ],
)
def test_the_variable_decides_and_facts_decide_auto(
    monkeypatch: pytest.MonkeyPatch, value: str, tokens: int, chosen: bool, reason: str
) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", (kernel(loses="too many tokens"),))
    monkeypatch.setenv(dispatch.VARIABLE, value)
    found = dispatch.select("expert_ffn", tokens=tokens)
    assert (found is expert_ffn) is chosen
    assert dispatch.why("expert_ffn", tokens=tokens).startswith(f"expert_ffn: {reason}")


def test_insisting_on_a_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dispatch.KERNELS, "expert_ffn", (kernel(refuses="odd width"),))
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    with pytest.raises(
        RuntimeError, match=r"ADACONVERT_KERNELS=triton, but expert_ffn cannot: .*odd"
    ):
        dispatch.select("expert_ffn", tokens=1)
    assert "torch, because triton: odd width" in dispatch.why("expert_ffn", tokens=1)


def small() -> tuple[torch.Tensor, ExpertWeights, torch.Tensor]:
    up, down = torch.randn(8, 4), torch.randn(4, 8)
    weights = ExpertWeights(None, up, down, None, None, None, functional.relu, 2)
    mask = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    return torch.randn(3, 4), weights, mask


def test_the_runtime_asks_for_a_kernel_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weights, mask = small()
    asked: list[dict[str, Any]] = []

    def select(op: str, **facts: Any) -> Any:
        asked.append({"op": op, **facts})
        return lambda x, mask, **options: expert_ffn(
            x.new_ones(3, 4, device="cpu"), mask, **options
        )

    monkeypatch.setattr(dispatch, "select", select)
    out, pairs = run_experts(x.to("meta"), weights, mask)
    plain, _ = run_experts(torch.ones(3, 4), weights, mask, path="dense")
    assert torch.equal(out, plain)
    assert pairs == 12
    (facts,) = asked
    assert facts["op"] == "expert_ffn"
    known = ("device", "tokens", "neurons", "experts", "width", "glu")
    assert tuple(facts[name] for name in known) == ("meta", 3, 8, 4, 2, False)


def test_kernels_of_another_interface_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "API_VERSION", adaptive_execution.KERNELS_API + 1)
    monkeypatch.setattr(dispatch, "select", lambda *a, **k: pytest.fail("asked"))
    x, weights, mask = small()
    on_meta = ExpertWeights(
        *(None, weights.up.to("meta"), weights.down.to("meta"), None, None, None),
        *(functional.relu, 2),
    )
    out, pairs = run_experts(x.to("meta"), on_meta, mask.to("meta"))
    assert out.shape == (3, 4)
    assert pairs == 24
