"""Blocks that share their matrices, against the models they were made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from adaconvert.modeling.adaptive_recursion import Residual, residuals
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import CODE_FILES, code_folder, load_model
from adaconvert.testing.exits_by_hand import PLACES
from adaconvert.testing.recursion_by_hand import by_hand, linears_of
from adaconvert.testing.tiny_models import make

LAYERS = 4
BASE = [0, 1, 0, 1]
CLASSIFIERS = {"bert": "BertForSequenceClassification", "vit": None}
DECODERS = sorted(set(PLACES) - set(CLASSIFIERS))
LLAMA = [
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
]

Made = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return a function that gives (recursive model, dense model) of a family, in float64."""
    root = tmp_path_factory.mktemp("recursion")

    def load(
        family: str, rank: int | str = "full", base: list[int] | None = None, **options: Any
    ) -> tuple[Any, Any]:
        base = BASE if base is None else base
        dense = root / family / "dense"
        if not dense.exists():
            make(family, dense, layers=LAYERS, architecture=CLASSIFIERS.get(family))
        folder = root / family / f"{rank}-{''.join(map(str, base))}"
        if not folder.exists():
            by_hand(dense, folder, rank, base)
        options = {**in_float64(family), **options}
        return load_model(folder, **options), load_model(dense, **options)

    return load


def in_float64(family: str) -> dict[str, str]:
    """Return how a model is loaded; the grouped product of experts knows no float64."""
    more = {"experts_implementation": "eager"} if family == "mixtral" else {}
    return {"dtype": "float64", **more}


def inputs_of(family: str, model: Any) -> dict[str, Tensor]:
    torch.manual_seed(3)
    if family == "vit":
        side = model.config.image_size
        pixels = torch.randn(3, 3, side, side, dtype=torch.float64)
        return {"pixel_values": pixels.to(model.dtype)}
    return {"input_ids": torch.randint(5, 60, (2, 12))}


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model(**inputs).logits
    return found


def apart(model: Any, dense: Any, inputs: dict[str, Any]) -> float:
    """Return the largest difference of a logit as a share of the largest logit."""
    expected = logits(dense, inputs)
    return float((logits(model, inputs) - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("family", sorted(PLACES))
def test_full_rank_is_the_dense_model(made: Made, family: str) -> None:
    model, dense = made(family)
    assert apart(model, dense, inputs_of(family, model)) < 1e-12
    model, dense = made(family, dtype="float32")
    assert apart(model, dense, inputs_of(family, model)) < 1e-5


@pytest.mark.parametrize("rank", [0, 3, "full"])
@pytest.mark.parametrize("family", sorted(PLACES))
def test_depths_of_a_group_share_storage_and_nothing_else(
    made: Made, family: str, rank: int | str
) -> None:
    model, dense = made(family, rank)
    blocks, stock = (m.get_submodule(PLACES[family][0]) for m in (model, dense))
    names = linears_of(stock)
    for name in names:
        places = [block.get_submodule(name).weight.data_ptr() for block in blocks]
        assert places[0] == places[2]
        assert places[1] == places[3]
        assert places[0] != places[1]
    of = {id(p) for name in names for b in blocks for p in [b.get_submodule(name).weight]}
    assert len(of) == 2 * len(names)
    shared = sum(2 * stock[0].get_submodule(name).weight.numel() for name in names)
    added = sum(p.numel() for _, residual in residuals(model) for p in residual.parameters())
    assert bool(added) == bool(rank)
    assert model.num_parameters() == dense.num_parameters() - shared + added


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_error_falls_with_rank(made: Made, family: str) -> None:
    found = [apart(*made(family, rank), inputs_of(family, made(family)[0])) for rank in (0, 8, 24)]
    found.append(apart(*made(family), inputs_of(family, made(family)[0])))
    assert found == sorted(found, reverse=True)
    assert found[0] > 100 * found[-1]


def test_one_loop_is_the_dense_model_tensor_for_tensor(made: Made) -> None:
    model, dense = made("llama", "full", [0, 1, 2, 3])
    assert list(model.state_dict()) == list(dense.state_dict())
    inputs = inputs_of("llama", model)
    assert torch.equal(logits(model, inputs), logits(dense, inputs))


def test_a_depth_alone_in_its_group_has_no_residual(made: Made) -> None:
    model, dense = made("llama", "full", [0, 1, 1, 3])
    assert {path.split(".")[2] for path, _ in residuals(model)} == {"1", "2"}
    assert apart(model, dense, inputs_of("llama", model)) < 1e-12


@pytest.mark.parametrize("family", DECODERS)
def test_cached_decoding_is_the_full_pass(made: Made, family: str) -> None:
    model, _ = made(family, 3)
    ids = inputs_of(family, model)["input_ids"]
    whole = logits(model, {"input_ids": ids, "use_cache": False})
    cache, steps = None, []
    with torch.no_grad():
        for at in range(ids.shape[1]):
            out = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert cache is not None
    # a place in the cache for every depth
    assert len(cache.layers) == LAYERS
    assert torch.allclose(torch.cat(steps, 1), whole, rtol=0, atol=1e-11 * float(whole.abs().max()))


def test_generation_is_that_of_the_dense_model(made: Made) -> None:
    model, dense = made("llama")
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    ids = inputs_of("llama", model)["input_ids"]
    assert torch.equal(model.generate(ids, **asked), dense.generate(ids, **asked))


@pytest.mark.parametrize("family", sorted(PLACES))
def test_stock_saving_writes_each_shared_tensor_once(
    made: Made, family: str, tmp_path: Path
) -> None:
    model, _ = made(family, 3)
    model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
    names: list[str] = []
    for path in (tmp_path / "again").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += file.keys()
    shared = len(model.adaptive_tied)
    untied = len([name for name in model.all_tied_weights_keys if name not in model.adaptive_tied])
    assert len(names) == len(set(names))
    # files of mixtures hold every expert by itself
    if family != "mixtral":
        assert len(names) == len(model.state_dict()) - shared - untied
    again = load_model(tmp_path / "again", **in_float64(family))
    inputs = inputs_of(family, model)
    assert apart(again, model, inputs) <= 1e-12
    assert all(a is b for a, b in zip(*_tied(again), strict=True))


def _tied(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the parameters that are others', and those."""
    return (
        [model.get_parameter(name) for name in model.adaptive_tied],
        [model.get_parameter(name) for name in model.adaptive_tied.values()],
    )


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half", "ties", "empty"])
def test_sharing_survives(made: Made, how: str) -> None:
    model, _ = made("llama", 3)
    inputs = inputs_of("llama", model)
    before = logits(model, inputs)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    elif how == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif how == "half":
        model = model.bfloat16().double()
    elif how == "ties":
        model.resize_token_embeddings(model.config.vocab_size)
        model.tie_weights()
    else:
        state = model.state_dict()
        model = model.to("meta").to_empty(device="cpu")
        model.tie_weights()
        model.load_state_dict(state)
        for buffer in [b for name, b in model.named_buffers() if "inv_freq" in name]:
            buffer.copy_(made("llama", 3)[0].model.rotary_emb.inv_freq)
    assert all(a is b for a, b in zip(*_tied(model), strict=True))
    if how != "half":
        assert torch.equal(logits(model, inputs), before)


def test_the_backbone_alone_shares_too(made: Made, tmp_path: Path) -> None:
    from adaconvert.modeling.modeling_adaptive import (  # type: ignore[attr-defined]
        AdaptiveLlamaModel,
    )

    model, _ = made("llama", 3)
    ids = inputs_of("llama", model)["input_ids"]
    with torch.no_grad():
        expected = model.model(ids).last_hidden_state
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "inside")
    bare = AdaptiveLlamaModel.from_pretrained(tmp_path / "whole", dtype=torch.float64).eval()
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, expected)
    assert all(a is b for a, b in zip(*_tied(bare), strict=True))
    bare.save_pretrained(tmp_path / "bare")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("inside", "bare")]
    assert abs(sizes[0] - sizes[1]) < 1024


def test_gradients_reach_what_is_shared_and_what_is_not(made: Made) -> None:
    model, _ = made("llama", 3)
    ids = inputs_of("llama", model)["input_ids"]
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    # the matrix of a group has the sum of what all its depths ask for
    first = model.model.layers[0].mlp.up_proj.weight
    whole = first.grad.clone()
    parts = []
    for kept in (0, 2):
        again = copy.deepcopy(model)
        again.zero_grad()
        linear = again.model.layers[2 - kept].mlp.up_proj
        linear.weight = nn.Parameter(linear.weight.detach().clone())
        again(ids, labels=ids).loss.backward()
        parts.append(again.model.layers[kept].mlp.up_proj.weight.grad)
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(made: Made) -> None:
    model, _ = made("llama", 3)
    ids = inputs_of("llama", model)["input_ids"]
    found = []
    for on in (False, True):
        again = copy.deepcopy(model).train()
        if on:
            again.gradient_checkpointing_enable({"use_reentrant": False})
        again(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in again.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_adapters_of_peft_are_each_depths_own(made: Made, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = made("llama", 3)
    inputs = inputs_of("llama", model)
    before = logits(model, inputs)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    assert torch.equal(logits(adapted, inputs), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name and ".layers.2." in name:
            nn.init.normal_(parameter, std=0.2)
    after = logits(adapted, inputs)
    assert not torch.allclose(after, before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted, inputs), before)
    adapted.save_pretrained(tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(made("llama", 3)[0], tmp_path / "lora").eval()
    assert torch.allclose(logits(again, inputs), after, rtol=0, atol=1e-6)


def test_loads_where_adaconvert_is_not_installed(
    made: Made, tmp_path: Path, elsewhere: Any
) -> None:
    made("llama", 3)
    model, _ = made("llama", 3, dtype="float32")
    model.save_pretrained(tmp_path / "model")
    for name in CODE_FILES:
        (tmp_path / "model" / name).write_bytes((code_folder() / name).read_bytes())
    found = elsewhere(tmp_path / "model", "account()")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(found["full"], logits(model, {"input_ids": ids}))
    asked = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(found["grown"], model.generate(ids, **asked))


def _config(made: Made, **changed: Any) -> Any:
    config = copy.deepcopy(made("llama", 3)[0].config)
    config.adaptive["model"]["recursion"].update(changed)
    return config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"base": [0, 1, 0]}, "is of 3 blocks, this model has 4"),
        ({"base": [0, 2, 0, 1]}, r"base\[1\] is 2, expected 0 to 1"),
        ({"base": [0, 0, 1, 0]}, r"base\[2\] is 1, a depth that itself uses the matrices of 0"),
        ({"base": []}, "expected one number for each depth"),
        ({"rank": -1}, "rank is -1, expected 0 or more"),
        ({"rank": True}, "rank is True"),
        ({"linears": []}, "expected paths of linears"),
        ({"linears": ["mlp.up_proj", "mlp.up_proj"]}, "names a linear twice"),
        ({"linears": ["mlp"]}, "mlp is no linear"),
        ({"linears": ["mlp.none"]}, "names 'model.layers.0.mlp.none', which .* lacks"),
        ({"blocks": "model.blocks"}, "names 'model.blocks'"),
        ({"blocks": ""}, "blocks names a module"),
        ({"sharing": "loops"}, "sharing is 'loops', known: cycle, sequence"),
        ({"start": "random"}, "start is 'random', known: average"),
        ({"loops": 2}, "unknown keys loops"),
    ],
)
def test_what_means_nothing_is_refused(made: Made, changed: dict[str, Any], message: str) -> None:
    config = _config(made, **changed)
    with pytest.raises(AdaptiveConfigError, match=message):
        type(made("llama", 3)[0])(config)


def test_exits_are_refused(made: Made) -> None:
    config = _config(made)
    config.adaptive["model"]["exits"] = {"kind": "causal"}
    with pytest.raises(AdaptiveConfigError, match="cannot be combined"):
        type(made("llama", 3)[0])(config)


def test_residuals_that_are_missing_are_named(made: Made, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, _ = made("llama", 3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.residual.down"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AdaptiveConfigError, match=r"layers\.2\.mlp\.up_proj\.residual\.down"):
        type(model).from_pretrained(tmp_path)


def test_a_new_model_begins_as_plain_sharing(made: Made) -> None:
    config = _config(made)
    model: Any = type(made("llama", 3)[0])(config).eval()
    assert all(not r.up.any() and bool(r.down.any()) for _, r in residuals(model))
    assert all(isinstance(r, Residual) for _, r in residuals(model))
    assert len(list(residuals(model))) == LAYERS * len(LLAMA)
