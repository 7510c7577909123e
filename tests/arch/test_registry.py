"""Which configs are accepted, and what the refusals say."""

from __future__ import annotations

import pytest

from adaconvert.arch import registry
from adaconvert.errors import SourceError

DENSE = (
    *("bert", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral"),
    *("olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "smollm3", "vit"),
)
SPARSE = (
    *("deepseek_v2", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "granitemoe"),
    *("granitemoeshared", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"),
)
#: what has no usable default.
NO_DEFAULTS: dict[str, dict[str, object]] = {
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 6},
    # 96 heads do not divide the default size of 4096
    "glm4_moe": {"head_dim": 128},
}


def test_every_promised_family_is_supported() -> None:
    assert registry.supported() == sorted(DENSE + SPARSE)


@pytest.mark.parametrize("model_type", DENSE + SPARSE)
def test_a_config_with_nothing_but_its_model_type_is_a_model(model_type: str) -> None:
    config = {"model_type": model_type, **NO_DEFAULTS.get(model_type, {})}
    spec = registry.describe(config)
    assert spec.model_type == model_type
    assert (spec.num_experts > 0) == (spec.top_k > 0) == (model_type in SPARSE)
    names = [tensor.name for tensor in spec.tensors]
    assert len(set(names)) == len(names)
    assert {tensor.layer for tensor in spec.tensors} == {None, *range(spec.layers)}
    assert all(size > 0 for tensor in spec.tensors for size in tensor.shape)


@pytest.mark.parametrize("model_type", DENSE)
def test_every_block_of_a_dense_model_has_one_ffn(model_type: str) -> None:
    spec = registry.describe({"model_type": model_type})
    rows = spec.ffn_rows(spec.layers - 1)
    assert set(rows) == ({"gate", "up", "down"} if spec.traits.ffn == "glu" else {"up", "down"})
    if model_type != "gpt2":
        assert rows["up"].count == spec.intermediate
        assert rows["down"].count == spec.hidden


def test_an_unknown_model_type_names_the_nearest() -> None:
    with pytest.raises(SourceError, match=r"model_type 'lama' is not supported.*Nearest: llama"):
        registry.describe({"model_type": "lama"})


def test_a_model_type_like_no_other_lists_the_supported_ones() -> None:
    with pytest.raises(SourceError, match=r"'xlstm' is not supported\. Supported: bert, deep"):
        registry.describe({"model_type": "xlstm"})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["llama"]}])
def test_a_config_without_a_model_type_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(SourceError, match=r"config\.json: model_type is not usable"):
        registry.describe(config)


def test_a_hostile_model_type_is_escaped_and_cut() -> None:
    with pytest.raises(SourceError, match=r"\\x1b\[31m") as caught:
        registry.describe({"model_type": "\x1b[31m" + "a" * 10000})
    assert len(str(caught.value)) < 600


def test_a_multimodal_config_is_refused_with_a_way_out() -> None:
    config = {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}
    with pytest.raises(SourceError, match=r"'gemma3' is multimodal.*Save the language model"):
        registry.describe(config)


@pytest.mark.parametrize(
    ("model_type", "architecture", "reason"),
    [
        ("llama", "LlamaForSequenceClassification", "its head is not that of a causal language"),
        ("llama", "LlamaModel", "it has no language-model head"),
        ("qwen2", "Qwen2ForTokenClassification", "its head is not that of a causal language"),
        ("gpt2", "GPT2DoubleHeadsModel", "it has no language-model head"),
        ("bert", "BertLMHeadModel", "its tensors are not known"),
    ],
)
def test_other_heads_are_refused(model_type: str, architecture: str, reason: str) -> None:
    config = {"model_type": model_type, "architectures": [architecture]}
    with pytest.raises(SourceError, match=f"{architecture} is not supported: {reason}.*Supported"):
        registry.describe(config)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", [1], {"a": 1}])
def test_architectures_must_be_a_list_of_names(architectures: object) -> None:
    with pytest.raises(SourceError, match="architectures is not usable"):
        registry.describe({"model_type": "llama", "architectures": architectures})


@pytest.mark.parametrize("architectures", [None, []])
def test_a_config_without_architectures_means_the_usual_one(architectures: object) -> None:
    spec = registry.describe({"model_type": "llama", "architectures": architectures})
    assert spec.architecture == "LlamaForCausalLM"


def test_two_spellings_of_a_key_may_agree() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts": 4}
    assert registry.describe(config).num_experts == 4


def test_two_spellings_of_a_key_may_not_disagree() -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts": 8}
    with pytest.raises(SourceError, match="num_local_experts and num_experts mean the same and di"):
        registry.describe(config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "sees later tokens"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "cross-attention is not supported"),
        ({"model_type": "bert", "is_decoder": True}, "BERT as a decoder is not supported"),
    ],
)
def test_what_a_family_cannot_express_is_refused(config: dict[str, object], reason: str) -> None:
    with pytest.raises(SourceError, match=rf"=true: .*{reason}"):
        registry.describe(config)


def test_latent_attention_with_shared_key_heads_is_refused() -> None:
    config = {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "num_key_value_heads": 8}
    with pytest.raises(SourceError, match=r"num_key_value_heads=8, num_attention_heads=32: latent"):
        registry.describe(config)


def test_layer_masks_are_told_per_layer() -> None:
    spec = registry.describe({"model_type": "olmo3", "num_hidden_layers": 5})
    assert registry.layer_mask(spec, "sliding") == (True, True, True, False, True)
    assert registry.layer_mask(spec, "moe") == ()
    spec = registry.describe({"model_type": "smollm3", "num_hidden_layers": 4})
    assert registry.layer_mask(spec, "roped") == (True, True, True, False)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 3, "mlp_only_layers": [1]}
    assert registry.layer_mask(registry.describe(config), "moe") == (True, False, True)
