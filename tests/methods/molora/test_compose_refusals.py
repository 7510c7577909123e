"""Adapters that cannot become experts, each refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adaconvert.errors import AdaconvertError, OptionError, SourceError
from adaconvert.methods.molora.compose import compose
from adaconvert.methods.molora.lora_folder import read_lora
from adaconvert.methods.sources import open_source
from adaconvert.testing.loras import change_config, make_lora, rename_tensors

Dense = Callable[..., Path]


@pytest.fixture(scope="module")
def stock(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_lora(dense("llama"), tmp_path_factory.mktemp("stock") / "stock")


@pytest.fixture
def folder(stock: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "one"))


SETTINGS: list[tuple[dict[str, object], str]] = [
    ({"use_dora": True}, "use_dora: the adapter is a DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: the adapter replaces whole modules"),
    ({"bias": "lora_only"}, "bias: the adapter changes biases.*expected none, found lora_only"),
    ({"lora_bias": True}, "lora_bias: the adapter has biases on its second factors"),
    ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters: .* no linears"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices: .* rows of the embedding"),
    ({"layer_replication": [[0, 2]]}, "layer_replication: .* layers are repeated"),
    ({"use_qalora": True}, "use_qalora: the adapter is a QA-LoRA"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: the adapter is an aLoRA"),
    ({"arrow_config": {"top_k": 2}}, "arrow_config: .* Arrow's router"),
    ({"kasa_config": {"beta": 1}}, "kasa_config: the adapter is a KaSA"),
    ({"monteclora_config": {"x": 1}}, "monteclora_config: the adapter is a Monteclora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora: the adapter is a BD-LoRA"),
    ({"velora_config": {"scale": 1}}, "velora_config: the adapter is a VeLoRA"),
    ({"megatron_config": {"x": 1}}, "megatron_config: the adapter is for Megatron"),
    ({"init_lora_weights": "pissa"}, "starts as pissa is for a base it changed"),
    ({"init_lora_weights": "pissa_niter_16"}, "starts as pissa_niter_16"),
    ({"init_lora_weights": "olora"}, "starts as olora"),
    ({"init_lora_weights": "corda"}, "starts as corda"),
    ({"init_lora_weights": "loftq"}, "starts as loftq"),
    ({"init_lora_weights": "lora_ga"}, "starts as lora_ga.*path_initial_model_for_weight"),
    ({"init_lora_weights": "novel"}, "a start this version does not know"),
    ({"peft_type": "IA3"}, "is no LoRA adapter; expected peft_type LORA, found IA3"),
    ({"peft_type": "MOLORA"}, "routed adapters already: give it as SRC"),
    ({"peft_type": None}, "is no LoRA adapter; expected peft_type LORA, found none"),
    ({"r": 0}, "r: is no rank; expected a whole number above 0, found 0"),
    ({"r": True}, "r: is no rank"),
    ({"r": "8"}, "r: is no rank"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: is no rank"),
    ({"rank_pattern": [1]}, "rank_pattern: is malformed; expected an object"),
    ({"rank_pattern": {"q_proj(": 4}}, "a pattern is no regular expression"),
    ({"lora_alpha": 0}, "lora_alpha: scales the adapter by nothing"),
    ({"lora_alpha": "x"}, "lora_alpha: is no number"),
    ({"alpha_pattern": {"q_proj": None}}, "alpha_pattern: is no number"),
    ({"use_novel": True}, "use_novel: the adapter is of a kind this version does not know"),
    ({"novel_config": {"a": 1}}, "novel_config: the adapter is of a kind"),
    ({"r": 8}, "not of the rank that adapter_config.json says; expected A of 8 rows"),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS)
def test_settings_are_refused_by_name(
    settings: dict[str, object], message: str, folder: Path
) -> None:
    change_config(folder, lambda config: config.update(settings))
    with pytest.raises(SourceError, match=message) as caught:
        read_lora(folder)
    assert str(caught.value).startswith("one/adapter_")


def test_settings_of_a_newer_peft_are_noted(folder: Path) -> None:
    change_config(folder, lambda config: config.update(novel_size=3, use_other=False, a_config={}))
    assert read_lora(folder).notes == (
        "adapter one: settings this version does not know are ignored: novel_size",
    )


@pytest.mark.parametrize("name", ["0", "12", "3.5"])
def test_bare_numbers_are_no_names(name: str, folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / name)
    with pytest.raises(OptionError, match=f"a bare number loses its tensors.*found '{name}'"):
        read_lora(moved)
    assert read_lora(moved, "task").name == "task"


def first(name: str, new: str) -> Callable[[str], str]:
    """Return what renames the first factor of the first q_proj."""
    return lambda old: new if old.endswith(f"layers.0.self_attn.q_proj.{name}.weight") else old


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TENSORS: list[tuple[str, str]] = [
    (f"{Q}.lora_magnitude_vector", "the magnitudes of a DoRA"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", "an adapter of the embedding"),
    ("base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight", "no linear"),
    (f"{Q}.lora_B.bias", "is a bias"),
    ("base_model.model.lm_head.modules_to_save.weight", "is a whole module"),
    ("base_model.model.lm_head.weight", "is no factor of a LoRA"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "is no factor of a LoRA"),
    (f"{Q}.lora_A.other.weight", "lora_A"),
]


@pytest.mark.parametrize(("name", "message"), TENSORS[:-1])
def test_other_tensors_are_refused_by_name(name: str, message: str, folder: Path) -> None:
    rename_tensors(folder, first("lora_A", name))
    with pytest.raises(SourceError, match=message) as caught:
        read_lora(folder)
    assert name in str(caught.value)


def test_names_in_memory_are_read_too(folder: Path, stock: Path) -> None:
    rename_tensors(folder, lambda name: name.replace(".weight", ".default.weight"))
    assert list(read_lora(folder).modules) == list(read_lora(stock).modules)


def test_two_adapters_in_a_file(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"{Q}.lora_A.other.weight"] = tensors[f"{Q}.lora_A.weight"].clone()
    save_file(tensors, weights)
    with pytest.raises(SourceError, match=r"holds two adapters for 'model.layers.0.self_attn.q"):
        read_lora(folder)


def test_a_factor_without_its_other(folder: Path) -> None:
    rename_tensors(folder, lambda name: None if name == f"{Q}.lora_B.weight" else name)
    with pytest.raises(SourceError, match=r"q_proj'.*has no lora_B.weight"):
        read_lora(folder)


def change_tensor(folder: Path, change: Callable[[Any], Any]) -> None:
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"{Q}.lora_A.weight"] = change(tensors[f"{Q}.lora_A.weight"])
    save_file(tensors, weights)


def test_tensors_of_other_kinds(folder: Path) -> None:
    change_tensor(folder, lambda tensor: tensor[:, :, None, None].contiguous())
    with pytest.raises(SourceError, match="is no matrix"):
        read_lora(folder)
    change_tensor(folder, lambda tensor: tensor[:, :, 0, 0].to(dtype=__import__("torch").int8))
    with pytest.raises(SourceError, match="is quantised"):
        read_lora(folder)


def test_an_adapted_head_is_called_so(dense: Dense, tmp_path: Path) -> None:
    lora = make_lora(dense("llama"), tmp_path / "lora", target_modules=["q_proj", "lm_head"])
    with pytest.raises(SourceError, match=r"an adapter of the output layer.*without the output"):
        read_lora(lora)


def test_texts_are_no_numbers(folder: Path) -> None:
    change_config(folder, lambda config: config.update(r="4"))
    with pytest.raises(SourceError, match="expected a whole number above 0, found '4'"):
        read_lora(folder)


def test_values_that_are_not_finite(dense: Dense, folder: Path) -> None:
    change_tensor(folder, lambda tensor: tensor * float("nan"))
    composed = compose([read_lora(folder)], open_source(str(dense("llama"))))
    with pytest.raises(SourceError, match=r"q_proj.lora_A.weight' holds NaN or infinity"):
        composed.stack(composed.paths[0])


def test_files_that_are_missing(folder: Path, dense: Dense, tmp_path: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError, match="the weights are a pickle, which can run code"):
        read_lora(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(SourceError, match=r"the weights are missing; expected adapter_model.safet"):
        read_lora(folder)
    with pytest.raises(SourceError, match=r"is no adapter; .* found a whole model"):
        read_lora(dense("llama"))
    with pytest.raises(SourceError, match=r"is no adapter; .* in the folders below it: one\."):
        read_lora(tmp_path, "all")
    with pytest.raises(SourceError, match="no such folder"):
        read_lora(tmp_path / "nothing")


def test_damaged_files(folder: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-5])
    with pytest.raises(SourceError, match=r"one/adapter_model.safetensors: data section 5 bytes"):
        read_lora(folder)
    weights.write_bytes(whole)
    lora = read_lora(folder)
    weights.write_bytes(whole[:-1] + b"\x00")
    with pytest.raises(SourceError, match="source changed while reading"):
        lora.read(next(iter(lora.modules)))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match=r"one/adapter_config.json: is not valid JSON"):
        read_lora(folder)


def refused(folder: Path, dense: Path) -> str:
    with pytest.raises(AdaconvertError) as caught:
        compose([read_lora(folder)], open_source(str(dense)))
    return str(caught.value)


def test_linears_the_base_lacks(folder: Path, dense: Dense) -> None:
    llama = dense("llama")
    for name, parts in {
        "model.layers.9.self_attn.q_proj": ("is for another base", "in 2 blocks"),
        "model.layers.0.self_attn.query": ("has no such linear", "expected self_attn.q_proj"),
        "model.layers.0.attn.q_projection": ("Did you mean q_proj",),
        "lm_head": ("on a head, outside the blocks",),
        "model.embed_tokens": ("on a module that is no linear",),
    }.items():
        other = Path(shutil.copytree(folder, folder.parent / f"with {name}"))
        rename_tensors(
            other, lambda old, new=name: old.replace("model.layers.0.self_attn.q_proj", new)
        )
        message = refused(other, llama)
        for part in parts:
            assert part in message


def test_another_size(folder: Path, dense: Dense, tmp_path: Path) -> None:
    message = refused(folder, dense("gpt2"))
    assert "is for another base: gpt2-0 has no such linear" in message
    config = json.loads((dense("llama") / "config.json").read_text())
    assert config["hidden_size"] == 32
    wide = make_wide(dense("llama"), tmp_path / "wide")
    message = refused(folder, wide)
    assert "q_proj': the adapter is for another base than wide" in message
    assert "expected factors of 48 inputs and 48 outputs, found 32 inputs and 32 outputs" in message


def make_wide(llama: Path, folder: Path) -> Path:
    """Return a model of the same family with other sizes."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(llama)
    config.hidden_size, config.head_dim = 48, 12
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_no_adapter(dense: Dense) -> None:
    with pytest.raises(OptionError, match="name one adapter or more"):
        compose([], open_source(str(dense("llama"))))
