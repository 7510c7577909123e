"""What the layout and the config of a host hold."""

from __future__ import annotations

from typing import Any

import pytest

from adaconvert.arch import registry
from adaconvert.arch.host import HOSTS, exact_hosts
from adaconvert.arch.layout import METHOD_ROLES
from adaconvert.testing.hosts_asked import ask, describe, layout
from adaconvert.testing.tiny_models import config_values

SHARED: dict[str, Any] = {"shared_kind": "neutral", "shared_width": 64}


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_is_a_known_family(host: str) -> None:
    assert HOSTS[host].architecture in registry.FAMILIES[host].architectures


SOURCES = ["llama", "qwen2", "qwen3", "olmo", "olmo2", "phi3", "granite", "gemma"]


@pytest.mark.parametrize("family", SOURCES)
def test_layouts_are_complete(family: str) -> None:
    """Every tensor the target's family has is there, filled by the method or carried over."""
    spec = describe(family)
    for host in exact_hosts(spec, ask(spec)):
        found = host.layout(spec, ask(spec), "bfloat16")
        described = registry.describe(found.config)
        tied = described.traits.tied
        wanted = [t.name for t in described.tensors if not (t.role == "head" and tied)]
        assert [tensor.name for tensor in found.tensors] == wanted
        for tensor in found.tensors:
            assert (tensor.carry is not None) or tensor.role in METHOD_ROLES
        assert described.num_experts == 4
        assert described.top_k == 2


@pytest.mark.parametrize("family", SOURCES)
def test_layouts_use_every_source_tensor_outside_the_ffn(family: str) -> None:
    spec = describe(family)
    for host in exact_hosts(spec, ask(spec)):
        found = host.layout(spec, ask(spec), "bfloat16")
        used = {tensor.carry.tensor for tensor in found.tensors if tensor.carry}
        ffn = {"gate", "up", "down", "gate_up"}
        left = [t.name for t in spec.tensors if t.role not in ffn and not t.optional]
        assert set(left) <= used


@pytest.mark.parametrize("host", HOSTS)
def test_every_config_speaks_old_and_new(host: str) -> None:
    family = next(f for f in SOURCES if not HOSTS[host].reasons(describe(f), ask(describe(f))))
    config = layout(family, host).config
    assert config["architectures"] == [HOSTS[host].architecture]
    assert config["num_experts"] == config["num_local_experts"] == 4
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert config["norm_topk_prob"] is True
    assert config["output_router_logits"] is False
    assert config["router_aux_loss_coef"] == 0.01
    parameters = config["rope_parameters"]
    assert isinstance(parameters, dict)
    assert parameters["rope_theta"] == config["rope_theta"]
    assert config["rope_scaling"] is None
    assert isinstance(config["head_dim"], int)


def test_the_sigmoid_hosts_neither_scale_nor_group() -> None:
    for host, family in (("glm4_moe", "llama"), ("dots1", "qwen3")):
        found = layout(family, host)
        keys = ("routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace")
        assert [found.config[key] for key in keys] == [1.0, 1, 1, 0]
        assert found.combine == "sigmoid"
        biases = [tensor.carry for tensor in found.tensors if tensor.role == "score_bias"]
        assert len(biases) == 4
        assert all(c and c.fn == "constant" and dict(c.params) == {"value": 0.0} for c in biases)


def test_keys_with_harmful_defaults_are_always_written() -> None:
    config = layout("llama", "glm4_moe").config
    assert config["partial_rotary_factor"] == 1.0
    assert config["num_nextn_predict_layers"] == config["num_mtp_layers"] == 0
    assert layout("llama", "ernie4_5_moe").config["moe_layer_start_index"] == 0
    assert layout("olmo2", "flex_olmo", pad_token_id=None).config["pad_token_id"] is None
    assert layout("llama", "mixtral").config["sliding_window"] is None


def test_unknown_keys_of_the_source_are_not_carried() -> None:
    config = layout(
        "llama",
        "mixtral",
        auto_map={"AutoModelForCausalLM": "evil.Model"},
        quantization_config={"quant_method": "gptq"},
        pretraining_tp=2,
        router_jitter_noise=0.5,
    ).config
    assert not {"auto_map", "quantization_config", "pretraining_tp"} & set(config)
    assert config["router_jitter_noise"] == 0.0


def test_special_tokens_are_those_the_source_means() -> None:
    keys = ("pad_token_id", "bos_token_id", "eos_token_id")
    assert [layout("llama", "mixtral").config[key] for key in keys] == [0, 0, 2]
    listed = layout("llama", "mixtral", eos_token_id=[2, 5]).config
    assert listed["eos_token_id"] == [2, 5]
    silent = {
        key: value
        for key, value in {"model_type": "llama", **config_values("llama")}.items()
        if key not in keys
    }
    spec = registry.describe(silent)
    config = HOSTS["mixtral"].layout(spec, ask(spec), "F32").config
    assert [config[key] for key in keys] == [None, 1, 2]
    assert config["dtype"] == "float32"


def test_layers_are_written_the_way_each_host_reads_them() -> None:
    spec = describe("qwen3")
    mixed = HOSTS["qwen3_moe"].layout(spec, ask(spec, moe_layers=frozenset({0, 2})), "F32")
    assert mixed.config["mlp_only_layers"] == [1, 3]
    last = HOSTS["glm4_moe"].layout(spec, ask(spec, moe_layers=frozenset({2, 3})), "F32")
    assert last.config["first_k_dense_replace"] == 2
    llama = describe("llama")
    run = HOSTS["ernie4_5_moe"].layout(llama, ask(llama, moe_layers=frozenset({1, 2})), "F32")
    assert (run.config["moe_layer_start_index"], run.config["moe_layer_end_index"]) == (1, 2)
    assert {t.layer for t in run.tensors if t.role == "router"} == {1, 2}
    dense = {t.layer: t.carry for t in run.tensors if t.role == "down"}
    assert {layer: carry and carry.tensor for layer, carry in dense.items()} == {
        0: "model.layers.0.mlp.down_proj.weight",
        3: "model.layers.3.mlp.down_proj.weight",
    }


def test_windows_are_written_the_way_each_host_reads_them() -> None:
    half = layout("qwen2-sliding", "qwen2_moe", max_window_layers=2).config
    assert half["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert (half["use_sliding_window"], half["sliding_window"], half["max_window_layers"]) == (
        True,
        8,
        2,
    )
    none = layout("qwen2", "qwen2_moe").config
    assert (none["use_sliding_window"], none["sliding_window"], none["max_window_layers"]) == (
        False,
        None,
        4,
    )
    listed = ["sliding_attention", "full_attention"] * 2
    assert layout("qwen2-sliding", "qwen2_moe", layer_types=listed).config["layer_types"] == listed


def test_fused_source_tensors_are_cut_by_rows() -> None:
    found = {t.name: t.carry for t in layout("phi3", "mixtral", head_dim=8).tensors}
    rows = {}
    for part in "qkv":
        carry = found[f"model.layers.1.self_attn.{part}_proj.weight"]
        assert carry is not None
        assert carry.tensor == "model.layers.1.self_attn.qkv_proj.weight"
        rows[part] = carry.rows
    assert rows == {"q": (0, 32), "k": (32, 16), "v": (48, 16)}
    output = found["model.layers.1.self_attn.o_proj.weight"]
    assert output is not None
    assert output.rows is None


@pytest.mark.parametrize(
    ("family", "host", "rounds"),
    [
        ("llama", "mixtral", False),
        ("llama", "ernie4_5_moe", False),
        ("qwen2", "granitemoe", False),
        ("phi3", "mixtral", False),
        ("granite", "granitemoe", False),
        ("gemma", "mixtral", True),
        ("gemma", "granitemoe", True),
        ("olmo", "mixtral", True),
    ],
)
def test_a_layout_says_whether_it_computes(family: str, host: str, rounds: bool) -> None:
    assert layout(family, host).rounds is rounds


def test_olmo_is_centred_and_its_down_matrices_are_too() -> None:
    found = layout("olmo", "mixtral")
    functions = {t.role: t.carry.fn for t in found.tensors if t.carry}
    assert functions["embed"] == "center_rows"
    assert functions["o"] == "center_out"
    assert functions["attn_norm"] == functions["ffn_norm"] == functions["norm_final"] == "constant"
    assert found.down_fn == "center_out"
    assert found.config["rms_norm_eps"] == 1e-5


def test_gemma_keeps_one_embedding_where_the_host_can_scale_it() -> None:
    tied = layout("gemma", "granitemoe")
    assert tied.config["tie_word_embeddings"] is True
    assert tied.config["embedding_multiplier"] == pytest.approx(32**0.5)
    assert not any(tensor.role == "head" for tensor in tied.tensors)
    apart = layout("gemma", "mixtral")
    assert apart.config["tie_word_embeddings"] is False
    carries = {t.role: t.carry for t in apart.tensors if t.role in {"embed", "head"}}
    embed, head = carries["embed"], carries["head"]
    assert embed is not None
    assert head is not None
    assert (embed.tensor, embed.fn) == ("model.embed_tokens.weight", "scale")
    assert (head.tensor, head.fn) == ("model.embed_tokens.weight", None)
    assert any("stored apart" in note for note in apart.notes)


def test_a_shared_expert_nobody_asked_for_is_neutral_and_named() -> None:
    found = layout("llama", "qwen2_moe", intermediate_size=128)
    assert found.config["shared_expert_intermediate_size"] == 64
    assert found.shared_gated
    carries = {t.role: t.carry for t in found.tensors if t.role.startswith("shared_")}
    gate, down = carries["shared_gate"], carries["shared_down"]
    assert gate is not None
    assert down is not None
    assert gate.rows == (0, 64)
    assert (down.tensor, down.fn) == (None, "constant")
    assert found.notes == (
        "qwen2_moe cannot do without a shared expert: one of 64 neurons that contributes nothing "
        "is added to each MoE block.",
    )
    assert layout("llama", "glm4_moe").config["n_shared_experts"] == 1
    assert layout("llama", "ernie4_5_moe").config["moe_num_shared_experts"] == 0


def test_a_shared_expert_that_was_asked_for_is_left_to_the_method() -> None:
    spec = describe("llama")
    found = HOSTS["granitemoeshared"].layout(spec, ask(spec, **SHARED), "F32")
    roles = {t.role for t in found.tensors if t.carry is None}
    assert roles == {
        "router",
        "expert_gate_up",
        "expert_downs",
        "shared_gate_up",
        "shared_down",
    }
    assert not found.shared_gated
