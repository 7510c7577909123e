"""Stock mixture-of-experts models run by our kernels: equal to transformers' eager loop."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from adaconvert import auto
from adaconvert.kernels import experts
from adaconvert.modeling import stock_experts

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
#: class -> what its configuration needs on top; the widths are no multiples of 4 on purpose.
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"intermediate_size": 22, "num_local_experts": 5},
    "Qwen2Moe": {
        **{"moe_intermediate_size": 22, "shared_expert_intermediate_size": 20},
        **{"num_experts": 5, "intermediate_size": 24},
    },
    "Qwen3Moe": {"moe_intermediate_size": 22, "num_experts": 5, "head_dim": 8},
    "Olmoe": {"intermediate_size": 22, "num_experts": 5},
    "GraniteMoe": {"intermediate_size": 22, "num_local_experts": 5},
    "DeepseekV3": {
        **{"moe_intermediate_size": 22, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
        **{"v_head_dim": 8, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        **{"intermediate_size": 24},
    },
}


def made(name: str, **changed: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name], **changed})
    config.pad_token_id = 0
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def calls_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the list that grows by a name at each call of our experts."""
    seen: list[str] = []
    real = experts.experts_forward

    def spy(module: Any, *call: Tensor) -> Tensor:
        seen.append(type(module).__name__)
        return real(module, *call)

    monkeypatch.setattr(experts, "experts_forward", spy)
    return seen


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).detach().norm() / wanted.detach().norm())


def step(model: Any, implementation: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the gradients of a random upstream gradient."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids = torch.arange(40).view(2, 20) % 64
    logits = model(input_ids=ids).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(5)))
    named = model.named_parameters()
    return logits, {key: p.grad.clone() for key, p in named if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_eager(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    wanted, wanted_grads = step(model, "eager")
    seen = calls_of(monkeypatch)
    got, grads = step(model, "adaconvert")
    assert seen == [f"{name}Experts"] * len(seen)
    assert len(seen) == (1 if name == "DeepseekV3" else 2)
    assert error(got, wanted) < 1e-5
    assert grads.keys() == wanted_grads.keys()
    wrong = {key: error(grads[key], grad) for key, grad in wanted_grads.items() if grad.any()}
    assert max(wrong.values()) < 1e-5
    assert any("experts" in key for key in wrong)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_generation_and_loading(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(name).save_pretrained(tmp_path)
    kind = transformers.AutoModelForCausalLM
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    eager = kind.from_pretrained(tmp_path, experts_implementation="eager")
    wanted = eager.generate(ids, **options)
    seen = calls_of(monkeypatch)
    ours = kind.from_pretrained(tmp_path, experts_implementation="adaconvert")
    assert torch.equal(ours.generate(ids, **options), wanted)
    assert len(seen) == 12
    ours.save_pretrained(tmp_path / "again")
    assert "adaconvert" not in (tmp_path / "again" / "config.json").read_text()


def test_training_with_checkpointing_and_frozen_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("Mixtral")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("experts" not in key)
    wanted, wanted_grads = step(model, "eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    seen = calls_of(monkeypatch)
    got, grads = step(model, "adaconvert")
    assert len(seen) == 4
    assert error(got, wanted) < 1e-5
    assert not any("experts" in key for key in grads)
    assert max(error(grads[key], grad) for key, grad in wanted_grads.items()) < 1e-5


class Experts(nn.Module):
    """Experts in every layout of the decorator; the decorated classes are made below."""

    gated, biased, transposed = True, False, False

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, hidden, width = 4, 8, 12
        wide = 2 * width if self.gated else width
        first, down = (4, wide, hidden), (4, hidden, width)
        if self.transposed:
            first, down = (4, hidden, wide), (4, width, hidden)
        name = "gate_up_proj" if self.gated else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.randn(first)))
        self.down_proj = nn.Parameter(torch.randn(down))
        if self.biased:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(4, wide)))
            self.down_proj_bias = nn.Parameter(torch.randn(4, hidden))
        self.act_fn = transformers.activations.ACT2FN[config.hidden_act]
        self.post_expert_norm = nn.LayerNorm(hidden)

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        name = "gate_up_proj" if self.gated else "up_proj"
        out = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            first, down = getattr(self, name)[expert], self.down_proj[expert]
            if self.transposed:
                first, down = first.mT, down.mT
            pre = hidden_states @ first.mT
            if self.biased:
                pre = pre + getattr(self, f"{name}_bias")[expert]
            hidden = self._apply_gate(pre) if self.gated else self.act_fn(pre)
            result = hidden @ down.mT
            if self.biased:
                result = result + self.down_proj_bias[expert]
            if getattr(self, "has_post_expert_norm", False):
                result = self.post_expert_norm(result)
            out = out + (weights * (index == expert)).sum(1, keepdim=True) * result
        return out


def module_of(activation: str = "silu", dtype: Any = torch.float32, **layout: bool) -> Any:
    kind = type("MyExperts", (Experts,), {"forward": Experts.forward})
    kind.gated, kind.biased = layout.get("has_gate", True), layout.get("has_bias", False)
    kind.transposed = layout.get("is_transposed", False)
    decorated = use_experts_implementation(**layout)(kind)  # type: ignore[arg-type]
    config = transformers.MixtralConfig(hidden_act=activation)
    config._experts_implementation = "adaconvert"
    return decorated(config).to(dtype)


def both(module: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return output and gradients of our implementation and of the eager one."""
    dtype = module.down_proj.dtype
    x = torch.randn(6, 8, dtype=dtype, requires_grad=True)
    weights = torch.rand(6, 2, dtype=dtype, requires_grad=True)
    index = torch.rand(6, 4).topk(2).indices
    found = []
    for implementation in ("adaconvert", "eager"):
        module.config._experts_implementation = implementation
        out = module(x, index, weights)
        inputs = [x, weights, *(p for key, p in module.named_parameters() if "norm" not in key)]
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out).cumsum(0))])
    return found[0], found[1]


@pytest.mark.parametrize("has_gate", [True, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_transposed", [True, False])
def test_layouts(
    has_gate: bool, has_bias: bool, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of(monkeypatch)
    module = module_of(has_gate=has_gate, has_bias=has_bias, is_transposed=is_transposed)
    got, wanted = both(module)
    assert len(seen) == 1
    assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


KNOWN = (
    *("silu", "swish", "gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate"),
    *("gelu_pytorch_tanh", "gelu_python_tanh", "relu", "relu2"),
)


#: those with parameters of their own have no gradient in `both`.
OTHERS = sorted(transformers.activations.ACT2CLS.keys() - {"prelu", "xielu"})


@pytest.mark.parametrize("activation", OTHERS)
def test_every_activation_is_run_or_left_to_transformers(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls_of(monkeypatch)
    got, wanted = both(module_of(activation))
    assert len(seen) == (activation in KNOWN)
    assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


def hooked(module: Any) -> None:
    module.act_fn.register_forward_hook(lambda module, args, out: out * 2)


def own_gate(module: Any) -> None:
    def gate(self: Any, pre: Tensor) -> Tensor:
        first, second = pre.chunk(2, -1)
        return self.act_fn(first.clamp(max=0.5)) * (second + 1)

    type(module)._apply_gate = gate


class Subclass(Tensor):
    """A tensor that is more than a tensor, as DTensor and quantised weights are."""


def of_a_subclass(module: Any) -> None:
    module.down_proj = nn.Parameter(module.down_proj.detach().as_subclass(Subclass))


#: float32 runs by transformers' grouped_mm, float64 by its eager loop.
LEFT = [
    (hooked, torch.float32, "the activation SiLUActivation is hooked"),
    (hooked, torch.float64, "the activation SiLUActivation is hooked"),
    (own_gate, torch.float32, "MyExperts has a gate of its own"),
    (own_gate, torch.float64, "MyExperts has a gate of its own"),
    (of_a_subclass, torch.float32, "tensors are not plain tensors"),
]


@pytest.mark.parametrize(("change", "dtype", "reason"), LEFT)
def test_what_is_not_known_is_left_to_transformers(
    change: Any, dtype: Any, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    stock_experts._tell.cache_clear()
    seen = calls_of(monkeypatch)
    module = module_of(dtype=dtype)
    change(module)
    with caplog.at_level(logging.WARNING):
        got, wanted = both(module)
        both(module)
    assert not seen
    said = [
        record.getMessage() for record in caplog.records if record.name == stock_experts.__name__
    ]
    assert said == [f"MyExperts runs by transformers' own experts implementation: {reason}"]
    assert max(error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


def test_layouts_that_are_refused() -> None:
    module = module_of()
    call = (torch.zeros(6, 8), torch.zeros(6, 2, dtype=torch.int64), torch.zeros(6, 2))
    assert experts.refuses(module, *call) is None
    for change, reason in {
        ("is_concatenated", False): "gate and up are interleaved",
        ("has_post_expert_norm", True): "experts end in a norm",
        ("num_experts", 3): "the matrices are [4, 24, 8] and [4, 8, 12]",
    }.items():
        other = copy.copy(module)
        setattr(other, *change)
        assert experts.refuses(other, *call) == reason
    other = copy.copy(module)
    other._apply_gate = module._apply_gate
    assert experts.refuses(other, *call) == "MyExperts has a gate of its own"
    assert "[T, d], [T, K]" in str(experts.refuses(module, call[0][None], *call[1:]))
    assert experts.refuses(module.to(torch.complex64), *call) == "tensors are not of floats"
    assert experts.refuses(nn.Linear(2, 2), *call) == "the module has no num_experts"


def test_slots_without_an_expert() -> None:
    module = module_of()
    module._is_expert_parallel = True
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    index = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 4], [-1, 2]])
    got = module(x, index, weights)
    module.config._experts_implementation = "eager"
    assert error(got, module(x, index, weights)) < 1e-5
    assert not got[1].any()


def test_autocast_and_mixed_dtypes() -> None:
    module = module_of().bfloat16()
    x, weights = torch.randn(5, 8), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [2, 3], [1, 2], [3, 0], [1, 3]])
    out = module(x, index, weights)
    assert out.dtype == torch.float32
    wide = module.float()
    wanted = wide(x, index, weights)
    assert error(out, wanted) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        cast = wide(x, index, weights)
    assert cast.dtype == torch.float32
    assert torch.equal(cast, out)


def graphs_of(function: Any) -> tuple[Any, list[str]]:
    """Return the function compiled as one graph, and the list of the operators of its graphs."""
    called: list[str] = []

    def keep(graph: Any, inputs: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    return torch.compile(function, backend=backend, fullgraph=True), called


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_compiled_models_run_our_operators(name: str) -> None:
    model = made(name)
    wanted, wanted_grads = step(model, "adaconvert")
    stock, stock_grads = step(model, "eager")
    model.set_experts_implementation("adaconvert")
    forward, called = model.forward, None
    model.forward, called = graphs_of(forward)
    try:
        got, grads = step(model, "adaconvert")
    finally:
        model.forward = forward
    for op in ("grouped_ffn", "grouped_ffn_backward", "route_plan"):
        assert called.count(f"adaconvert.{op}.default") == 2
    assert not any("grouped_mm" in op for op in called)
    assert error(got, wanted) < 1e-6
    assert error(got, stock) < 1e-5
    assert grads.keys() == wanted_grads.keys()
    assert max(error(grads[key], grad) for key, grad in wanted_grads.items() if grad.any()) < 1e-6
    assert max(error(grads[key], grad) for key, grad in stock_grads.items() if grad.any()) < 1e-5


@pytest.mark.parametrize("change", [hooked, own_gate, of_a_subclass])
def test_compiled_modules_that_are_not_known_are_left_to_transformers(change: Any) -> None:
    module = module_of()
    change(module)
    x, weights = torch.randn(6, 8), torch.rand(6, 2)
    index = torch.rand(6, 4).topk(2).indices
    wanted = module(x, index, weights)
    compiled, called = graphs_of(module)
    assert error(compiled(x, index, weights), wanted) < 1e-5
    assert not any("adaconvert" in op for op in called)
    assert any("grouped_mm" in op for op in called)


def test_registered_once_and_again() -> None:
    auto.register()
    assert ALL_EXPERTS_FUNCTIONS[auto.EXPERTS] is stock_experts.experts_forward
    with pytest.raises(ValueError, match="adaconvertt"):
        made("Mixtral").set_experts_implementation("adaconvertt")
