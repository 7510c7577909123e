"""Calls of stock experts that our kernels leave to transformers, and exported graphs, which do not.

Each refusal is of a call that would raise.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adaconvert.kernels import experts
from adaconvert.modeling import stock_experts

SMALL: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2},
    **{"num_local_experts": 4, "pad_token_id": 0, "head_dim": 8, "use_cache": False},
}
stock_experts.register()
CALL = (torch.randn(6, 16), torch.rand(6, 4).topk(2).indices, torch.rand(6, 2))


def config_of(implementation: str) -> Any:
    config = transformers.MixtralConfig(**SMALL)
    config._experts_implementation = implementation
    return config


def module_of(dtype: torch.dtype = torch.float32) -> Any:
    module = MixtralExperts(config_of("adaconvert"))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def by(implementation: str, module: Any, *call: Tensor) -> Tensor:
    """Return what the module answers by an implementation."""
    before = module.config._experts_implementation
    module.config._experts_implementation = implementation
    try:
        out: Tensor = module(*call)
    finally:
        module.config._experts_implementation = before
    return out


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


def ours(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that grows at each call of our experts."""
    seen: list[str] = []
    real = experts.experts_forward

    def spy(module: Any, *call: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return real(module, *call)

    monkeypatch.setattr(experts, "experts_forward", spy)
    return seen


def with_biases(module: Any, first: Tensor, down: Tensor) -> Any:
    module.has_bias = True
    module.gate_up_proj_bias, module.down_proj_bias = nn.Parameter(first), nn.Parameter(down)
    return module


def test_weights_of_different_dtypes_run_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of()
    module.down_proj.data = module.down_proj.data.bfloat16()
    reason = "the weights are of torch.float32 and of torch.bfloat16"
    assert experts.refuses(module, *CALL) == reason
    seen = ours(monkeypatch)
    assert torch.equal(module(*CALL), by("grouped_mm", module, *CALL))
    assert not seen
    assert experts.refuses_grouped_mm(module) is None
    module.gate_up_proj.data = module.gate_up_proj.data.double()
    assert "torch.float64" in str(experts.refuses_grouped_mm(module))


def test_biases_that_do_not_fit_are_refused() -> None:
    wide, hidden = torch.zeros(4, 48), torch.zeros(4, 16)
    assert experts.refuses(with_biases(module_of(), wide, hidden), *CALL) is None
    for module, reason in (
        (with_biases(module_of(), wide.double(), hidden), "torch.float32 and of torch.float64"),
        (with_biases(module_of(), wide, hidden[:, 1:]), "the biases are [4, 48] and [4, 15]"),
    ):
        assert reason in str(experts.refuses(module, *CALL))
    module = module_of()
    module.has_bias = True
    assert experts.refuses(module, *CALL) == "the module has no gate_up_proj_bias"


def test_matrices_that_are_missing_or_packed_are_refused() -> None:
    for name in ("gate_up_proj", "down_proj"):
        module = module_of()
        setattr(module, name, None)
        assert experts.refuses(module, *CALL) == f"the module has no {name}"
        delattr(module, name)
        assert experts.refuses(module, *CALL) == f"the module has no {name}"
        assert experts.refuses_grouped_mm(module) is not None
    for transposed in (False, True):
        module = module_of()
        module.is_transposed = transposed
        module.down_proj = nn.Parameter(torch.zeros(4, 16 * 24))
        reason = "the matrices are [4, 48, 16] and [4, 384]"
        assert experts.refuses(module, *CALL) == reason
        assert experts.refuses_grouped_mm(module) == reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_slots_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    call = (CALL[0], CALL[1].to(dtype), CALL[2])
    assert experts.refuses(module_of(), *call) == f"the experts of the slots are {dtype}"
    assert experts.refuses(module_of(), CALL[0], CALL[1].int(), CALL[2]) is None


def model_of(implementation: str) -> Any:
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL)).eval()
    model.set_experts_implementation(implementation)
    return model


@pytest.mark.parametrize("strict", [False, True])
def test_exported_models_hold_our_operators(strict: bool) -> None:
    model = model_of("adaconvert")
    ids, longer = torch.arange(16).view(2, 8), torch.arange(24).view(2, 12)
    sizes = {"input_ids": {1: torch.export.Dim("length", min=2, max=60)}}
    program = torch.export.export(
        model, (), {"input_ids": ids}, strict=strict, dynamic_shapes=sizes
    )
    called = [str(node.target) for node in program.graph.nodes]
    for op in ("grouped_ffn", "route_plan"):
        assert called.count(f"adaconvert.{op}.default") == 2
    assert not any("grouped_mm" in op for op in called)
    for inputs in (ids, longer):
        wanted = model(input_ids=inputs).logits
        assert error(program.module()(input_ids=inputs).logits, wanted) < 1e-6


def test_fake_tensors_outside_of_an_export_are_refused() -> None:
    module = module_of()
    with FakeTensorMode():
        call = (torch.zeros(6, 16), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2))
        assert experts.refuses(module, *CALL) == "a mode of fake tensors runs the call"
    assert experts.refuses(module, *call) == "tensors are not plain tensors"


def traced(module: Any) -> Tensor:
    out: Tensor = torch.jit.trace(module, CALL, check_trace=False)(*CALL)
    return out


def functional_gradient(module: Any) -> Tensor:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, CALL).square().sum()

    return torch.func.grad(loss)(dict(module.named_parameters()))["down_proj"]


def mapped(module: Any) -> Tensor:
    x, *others = CALL
    return torch.func.vmap(lambda x: module(x, *others))(torch.stack([x, 2 * x]))


def made_into_a_graph(module: Any) -> Tensor:
    out: Tensor = make_fx(module)(*CALL)(*CALL)
    return out


def made_into_a_graph_early(module: Any) -> Tensor:
    out: Tensor = make_fx(module, pre_dispatch=True)(*CALL)(*CALL)
    return out


def forward_derivative(module: Any) -> Tensor:
    x, *others = CALL
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, x), *others)).tangent
    assert isinstance(tangent, Tensor)
    return tangent


WATCHED = {
    traced: "torch.jit.trace records the call",
    functional_gradient: "a transform of torch.func runs the call",
    mapped: "a transform of torch.func runs the call",
    made_into_a_graph: "make_fx records the call",
    made_into_a_graph_early: "make_fx records the call",
    forward_derivative: "forward derivatives are taken",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("watch", WATCHED, ids=lambda watch: watch.__name__)
def test_watched_calls_run_by_transformers(
    watch: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock_experts._tell.cache_clear()
    module = module_of()
    seen = ours(monkeypatch)
    with caplog.at_level(logging.WARNING):
        got = watch(module)
    assert not seen
    assert [r.getMessage() for r in caplog.records if r.name == stock_experts.__name__] == [
        f"MixtralExperts runs by transformers' own experts implementation: {WATCHED[watch]}"
    ]
    # grouped_mm has no forward derivatives
    other = "eager" if watch is forward_derivative else "grouped_mm"
    module.config._experts_implementation = other
    assert error(got, watch(module)) < 1e-5
    module.config._experts_implementation = "adaconvert"
    module(*CALL)
    assert len(seen) == 1


def test_counted_calls_run_by_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = module_of(), ours(monkeypatch)
    with FlopCounterMode(display=False) as counted:
        module(*CALL)
    assert len(seen) == 1
    assert counted.get_total_flops() == 2 * 12 * (48 * 16 + 24 * 16)


def meta_gpt_oss(dtype: torch.dtype) -> Any:
    sizes = {**SMALL, "layer_types": ["full_attention"] * 2}
    with torch.device("meta"):
        return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes)).to(dtype)


def test_refused_classes_run_by_grouped_mm_on_meta() -> None:
    model = meta_gpt_oss(torch.bfloat16)
    stock_experts.use(model)
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    assert model(input_ids=ids).logits.shape == (1, 8, 64)
    module = model.model.layers[0].mlp.experts
    assert experts.refuses_grouped_mm(module) is None
    assert "torch.float32 on meta" in str(experts.refuses_grouped_mm(module.float()))


def test_only_models_that_hold_experts_are_changed() -> None:
    dense = {key: SMALL[key] for key in SMALL if "expert" not in key}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**dense))
    before = llama.config._experts_implementation
    stock_experts.use(llama)
    assert llama.config._experts_implementation == before != "adaconvert"
    for model in (model_of("eager"), meta_gpt_oss(torch.bfloat16)):
        stock_experts.use(model)
        assert model.config._experts_implementation == "adaconvert"


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooked_activations_are_refused_as_such(kind: str) -> None:
    module = module_of()
    register = getattr(module.act_fn, f"register_{kind}_hook")
    handle = register(lambda *given: None)
    assert experts.refuses(module, *CALL) == "the activation SiLUActivation is hooked"
    handle.remove()
    assert experts.refuses(module, *CALL) is None
    module.act_fn = nn.Tanh()
    assert experts.refuses(module, *CALL) == "the activation Tanh is not known"
