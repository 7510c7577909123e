"""How the grouped expert feed-forward is called: memory, layouts, autocast, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adaconvert.kernels import grouped_gemm
from adaconvert.kernels.grouped import choose_backend, grouped_ffn
from adaconvert.kernels.plan import RoutePlan, route_plan

T, K, E, D, WIDTH = 32, 2, 4, 16, 24


def made(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": torch.randn(T, D).to(dtype).requires_grad_(),
        "weights_of": torch.rand(T, K).requires_grad_(),
        "gate_up": (torch.randn(E, 2 * WIDTH, D) / 4).to(dtype).requires_grad_(),
        "down": (torch.randn(E, D, WIDTH) / 5).to(dtype).requires_grad_(),
    }


def plan_of(experts: int = E, tokens: int = T) -> RoutePlan:
    return route_plan(torch.rand(tokens, experts).topk(K).indices, experts)


def run(tensors: dict[str, Any], plan: RoutePlan, **options: Any) -> Tensor:
    rest = {"activation": "silu", "glu": True, **tensors, **options}
    return grouped_ffn(rest.pop("x"), rest.pop("weights_of"), plan, **rest)


def gradients(out: Tensor, tensors: dict[str, Tensor], upstream: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, list(tensors.values()), upstream))


def saved_bytes(call: Any, *, leave_out: set[int]) -> int:
    """Return the bytes kept for the backward, each storage once, without those of parameters."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in leave_out:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_most_half_of_what_transformers_keeps(
    dtype: torch.dtype, autocast: bool, backend: str
) -> None:
    config = MixtralConfig(
        hidden_size=96, intermediate_size=256, num_local_experts=8, num_experts_per_tok=2
    )
    config._experts_implementation = "grouped_mm"
    experts: Any = MixtralExperts(config).to(dtype)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.1)
    torch.nn.init.normal_(experts.down_proj, std=0.1)
    x = torch.randn(512, 96).to(dtype).requires_grad_()
    weights_of = torch.rand(512, 2).requires_grad_()
    experts_of = torch.rand(512, 8).topk(2).indices
    weights = {"gate_up": experts.gate_up_proj, "down": experts.down_proj}
    parameters = {tensor.untyped_storage().data_ptr() for tensor in weights.values()}

    def ours() -> Tensor:
        tensors = {"x": x, "weights_of": weights_of, **weights}
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(tensors, route_plan(experts_of, 8), backend=backend)

    def stock() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return experts(x, experts_of, weights_of.to(dtype))

    torch.testing.assert_close(ours(), stock(), rtol=0.05, atol=0.05)
    kept = saved_bytes(ours, leave_out=parameters), saved_bytes(stock, leave_out=parameters)
    assert kept[0] <= 0.5 * kept[1]


def test_expanded_upstream_gradients() -> None:
    for backend in ("loop", "grouped_mm"):
        tensors, plan = made(), plan_of()
        expanded = torch.randn(1, 1).expand(T, D)
        got = gradients(run(tensors, plan, backend=backend), tensors, expanded)
        whole = gradients(run(tensors, plan, backend=backend), tensors, expanded.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, whole, strict=True))


def test_strided_inputs_give_the_same_result() -> None:
    tensors, plan = made(), plan_of()
    strided = {
        "x": tensors["x"].detach().t().contiguous().t().requires_grad_(),
        "weights_of": tensors["weights_of"].detach().t().contiguous().t().requires_grad_(),
        "gate_up": tensors["gate_up"].detach().mT.contiguous().mT.requires_grad_(),
        "down": tensors["down"].detach().mT.contiguous().mT.requires_grad_(),
    }
    upstream = torch.randn(D, T).t()
    for backend in ("loop", "grouped_mm"):
        out, plain = (run(given, plan, backend=backend) for given in (strided, tensors))
        torch.testing.assert_close(out, plain)
        pairs = zip(
            gradients(out, strided, upstream), gradients(plain, tensors, upstream), strict=True
        )
        for got, wanted in pairs:
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["x", "weights_of", "gate_up", "down"])
def test_only_what_needs_a_gradient_gets_one(name: str) -> None:
    tensors, plan, upstream = made(), plan_of(), torch.randn(T, D)
    everything = dict(zip(tensors, gradients(run(tensors, plan), tensors, upstream), strict=True))
    frozen = {key: tensor.detach() for key, tensor in tensors.items()}
    frozen[name].requires_grad_()
    run(frozen, plan).backward(upstream)
    assert torch.equal(frozen[name].grad, everything[name])
    assert all(tensor.grad is None for key, tensor in frozen.items() if key != name)


def test_routing_weights_of_another_dtype_get_their_gradient_in_it() -> None:
    tensors = made(torch.bfloat16)
    tensors["weights_of"] = tensors["weights_of"].detach().bfloat16().requires_grad_()
    out = run(tensors, plan_of())
    assert out.dtype == torch.bfloat16
    assert gradients(out, tensors, torch.randn(T, D).bfloat16())[1].dtype == torch.bfloat16


def test_autocast_computes_in_its_dtype() -> None:
    tensors, plan, upstream = made(), plan_of(), torch.randn(T, D)
    with torch.autocast("cpu", torch.bfloat16):
        out = run(tensors, plan)
        got = gradients(out, tensors, upstream)
    assert out.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in got)
    low = {
        key: tensor if key == "weights_of" else tensor.bfloat16() for key, tensor in tensors.items()
    }
    by_hand = run(low, plan)
    assert torch.equal(out, by_hand.float())
    wanted = gradients(by_hand, tensors, upstream.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert torch.equal(run(tensors, plan), run(tensors, plan))
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        assert run(wide, plan).dtype == torch.float64


def test_checkpointing_gives_the_same_gradients() -> None:
    tensors, plan, upstream = made(), plan_of(), torch.randn(T, D)
    wanted = gradients(run(tensors, plan), tensors, upstream)
    again: Any = torch.utils.checkpoint.checkpoint(run, tensors, plan, use_reentrant=False)
    got = gradients(again, tensors, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_second_derivative_is_refused() -> None:
    tensors = made()
    upstream = torch.randn(T, D, requires_grad=True)
    (first,) = torch.autograd.grad(
        run(tensors, plan_of()), tensors["x"], upstream, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_the_backend_and_why() -> None:
    x, weights = torch.empty(4, 16), (torch.empty(3, 16, 16), torch.empty(3, 16, 8))
    backend, reason = choose_backend(x, *weights)
    assert backend == "loop"
    assert "as fast as grouped_mm" in reason
    on_meta = [tensor.to("meta") for tensor in (x, *weights)]
    assert choose_backend(*on_meta) == ("loop", "no grouped_mm for torch.float32 on meta")


def test_off_the_cpu_grouped_mm_runs_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(grouped_gemm._DTYPES, "meta", (torch.bfloat16,))
    x = torch.empty(4, 16, dtype=torch.bfloat16, device="meta")
    weights = x.new_empty(3, 16, 16), x.new_empty(3, 16, 8)
    assert choose_backend(x, *weights)[0] == "grouped_mm"
    assert choose_backend(x, weights[0], weights[1][:, :, :4])[0] == "loop"


def test_what_grouped_mm_refuses() -> None:
    x = torch.empty(4, 12)
    aligned = torch.empty(2, 8, 12)
    assert grouped_gemm.refuses(x, aligned, aligned.mT) is None
    flat = torch.empty(2 * 8 * 12 + 1)
    for weight, reason in {
        torch.empty(2, 7, 12): r"sizes [7, 12] are not multiples of 4",
        flat[1:].view(2, 8, 12): "the weights do not start at multiples of 16 bytes",
        torch.empty(2, 8, 13)[:, :, :12]: "the weights do not start at multiples of 16 bytes",
        torch.empty(2, 8, 24)[:, :, ::2]: "strides [24, 2] are not those of a matrix",
        torch.empty(2, 1, 12).expand(2, 8, 12): "strides [0, 1] are not those of a matrix",
    }.items():
        assert grouped_gemm.refuses(x, aligned, weight) == reason
    assert grouped_gemm.refuses(x.double(), aligned) == "no grouped_mm for torch.float64 on cpu"
    assert "multiples of 8" in str(grouped_gemm.refuses(x.bfloat16(), aligned.bfloat16()))


@pytest.mark.parametrize(
    ("changed", "error", "match"),
    [
        ({"gate_up": None}, ValueError, "with a gate need gate_up and take no up"),
        ({"glu": False}, ValueError, "without a gate need up and take no gate_up"),
        ({"up_bias": torch.zeros(E, WIDTH)}, ValueError, "take no up"),
        ({"activation": "mish"}, ValueError, "'mish'; expected one of silu, gelu"),
        ({"backend": "cuda"}, ValueError, "'cuda'; expected one of auto, loop, grouped_mm, triton"),
        ({"gate_up": torch.zeros(E, WIDTH, D)}, ValueError, r"first is \[4, 24, 16\]; expected"),
        ({"down": torch.zeros(E + 1, D, WIDTH)}, ValueError, r"down is \[5, 16, 24\]"),
        ({"weights_of": torch.zeros(K, T)}, ValueError, r"weights_of is \[2, 32\]"),
        ({"down_bias": torch.zeros(E, WIDTH)}, ValueError, r"down_bias is \[4, 24\]"),
        ({"x": torch.zeros(T, D).half()}, TypeError, r"first is torch\.float32, x is torch\.f"),
    ],
)
def test_refused(changed: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        run({**made(), **changed}, plan_of())


def test_asking_for_grouped_mm_where_it_cannot_run_says_why() -> None:
    wide = {key: tensor.double() for key, tensor in made().items()}
    with pytest.raises(ValueError, match=r"cannot run this: no grouped_mm for torch\.float64"):
        run(wide, plan_of(), backend="grouped_mm")
