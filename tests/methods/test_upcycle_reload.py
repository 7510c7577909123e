"""What stock transformers makes of a result: a fresh process, saving it again, generating, odd
sizes and odd weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import adaconvert
from adaconvert.errors import OptionError
from adaconvert.testing.reference_moe import read_folder
from adaconvert.testing.tiny_models import make

#: longer than every window.
IDS = [int(i) for i in np.random.default_rng(5).integers(3, 250, 24)]
#: host -> a source with something to lose: windows, ties, multipliers, partial rotary.
SOURCES = {
    "mixtral": "mistral-sliding",
    "qwen2_moe": "qwen2-sliding",
    "qwen3_moe": "qwen3-tied",
    "granitemoe": "gemma",
    "granitemoeshared": "granite",
    "flex_olmo": "olmo2",
    "glm4_moe": "phi3-partial",
    "dots1": "qwen3-sliding",
    "ernie4_5_moe": "llama-tied",
}
#: host -> a source that does not say one token over and over, as tied random weights do.
GENERATING = {
    "mixtral": "mistral-sliding",
    "qwen2_moe": "qwen2-sliding",
    "granitemoe": "granite",
    "qwen3_moe": "qwen3",
    "flex_olmo": "olmo2",
}
PROMPTS = (
    "The river is wide, the boat is small and the other bank is far away.",
    "def route(token):",
)
Options = dict[str, Any]


class Pair(NamedTuple):
    """A dense folder and what it was converted to."""

    dense: Path
    out: Path


Pairs = Callable[..., Pair]


def load(folder: Path, dtype: str = "float32") -> Any:
    """Return the model as stock transformers loads it, with nothing missing or left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=False, output_loading_info=True
    )
    assert {key: list(found) for key, found in info.items() if found} == {}
    return model


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float().numpy()


def assert_same_function(dense: Path, out: Path) -> None:
    want = logits(load(dense))
    assert np.abs(logits(load(out)) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Return a function from a host, and a source, to one conversion, made once."""
    root = tmp_path_factory.mktemp("pairs")

    def pair(host: str, source: str | None = None) -> Pair:
        source = source or SOURCES[host]
        dense, out = root / source, root / f"{source}-{host}"
        if not dense.exists():
            make(source, dense)
        if not out.exists():
            adaconvert.convert(
                dense,
                destination=out,
                target=host,
                experts=4,
                verify=False,
                max_shard_size="60KB",
            )
        return Pair(dense, out)

    return pair


FRESH = """
import json, socket, sys
sys.modules["adaconvert"] = None

def refuse(*_):
    raise OSError("the network was asked for")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import numpy, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

report = {}
ids = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    with torch.no_grad():
        out = model(torch.tensor([ids])).logits[0]
    report[folder] = {
        "class": type(model).__module__,
        "loaded": {key: list(found) for key, found in info.items() if found},
        "text": tokenizer("The river is wide.")["input_ids"],
        "logits": out.tolist(),
    }
report["ours"] = [n for n in sys.modules if n.startswith("adaconvert.")]
print(json.dumps(report))
"""


def test_i4_every_host_loads_in_a_fresh_process_without_us(pairs: Pairs, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = {host: pairs(host) for host in SOURCES}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(IDS), *(str(p.out) for p in made.values())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["ours"] == []
    for host, pair in made.items():
        told = report[str(pair.out)]
        assert told["class"] == f"transformers.models.{host}.modeling_{host}"
        assert told["loaded"] == {}
        assert (
            told["text"]
            == AutoTokenizer.from_pretrained(pair.dense)("The river is wide.")["input_ids"]
        )
        want = logits(load(pair.dense))
        assert np.abs(np.array(told["logits"]) - want).max() <= 1e-5 * np.abs(want).max()
        assert "auto_map" not in json.loads((pair.out / "config.json").read_text())
        assert not list(pair.out.glob("*.py"))


@pytest.mark.parametrize("host", SOURCES)
def test_i8_saving_again_gives_the_same_tensors_and_logits(
    host: str, pairs: Pairs, tmp_path: Path
) -> None:
    out, again = pairs(host).out, tmp_path / "again"
    model = load(out)
    model.save_pretrained(again, max_shard_size="60KB")
    ours, theirs = read_folder(out)[1], read_folder(again)[1]
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert np.array_equal(ours[name], theirs[name]), name
    reloaded = load(again)
    assert np.array_equal(logits(reloaded), logits(model))
    assert reloaded.config.model_type == host


def generate(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[list[int]]:
    """Return the 16 tokens greedy decoding adds to each prompt, padded on the left in a batch."""
    batch = tokenizer(
        list(prompts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
    )
    out = model.generate(
        **batch, do_sample=False, temperature=None, max_new_tokens=16, min_new_tokens=16
    )
    added: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return added


@pytest.mark.parametrize("host", GENERATING)
def test_greedy_generation_is_that_of_the_dense_model(host: str, pairs: Pairs) -> None:
    from transformers import AutoTokenizer

    dense, out = pairs(host, GENERATING[host])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (dense, out)]
    models = [load(folder) for folder in (dense, out)]
    alone: list[list[int]] = []
    for prompt in PROMPTS:
        want, got = (
            generate(model, tokenizer, (prompt,))
            for model, tokenizer in zip(models, tokenizers, strict=True)
        )
        assert got == want
        alone += want
    for model, tokenizer in zip(models, tokenizers, strict=True):
        assert generate(model, tokenizer, PROMPTS) == alone
    assert min(len(set(added)) for added in alone) > 2


SIZES: list[Options] = [
    {"experts": 64, "top_k": 8},
    {"experts": 1, "top_k": 1},
    {"experts": 3, "top_k": 3},
]


@pytest.mark.parametrize("host", SOURCES)
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes["experts"]))
def test_many_experts_one_expert_and_all_experts_stay_exact(
    host: str, sizes: Options, pairs: Pairs, tmp_path: Path
) -> None:
    dense, out = pairs(host).dense, tmp_path / "out"
    if host in {"glm4_moe", "dots1"} and sizes["experts"] == 1:
        with pytest.raises(OptionError, match=r"1 experts \(its router needs at least 2\)"):
            adaconvert.convert(dense, destination=out, target=host, **sizes)
        return
    result = adaconvert.convert(dense, destination=out, target=host, **sizes)
    verification = result.manifest["verification"]
    assert isinstance(verification, dict)
    assert verification["ok"] is True
    assert_same_function(dense, out)


@pytest.mark.parametrize("host", SOURCES)
def test_a_model_of_one_block_stays_exact(host: str, tmp_path: Path) -> None:
    # variants that list their layers want two, so these are the plain families
    family = SOURCES[host].split("-")[0]
    dense = make(family, tmp_path / "dense", layers=1)
    adaconvert.convert(dense, destination=tmp_path / "out", target=host, experts=4)
    assert_same_function(dense, tmp_path / "out")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return the folder of a one-file checkpoint after `change` has edited its tensors."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def kill_neurons(tensors: dict[str, Any]) -> None:
    """Make neurons of block 0 dead or equal, and the whole FFN of block 1 constant or zero."""
    gate, up, down = (
        tensors[f"model.layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up", "down")
    )
    gate[:8] = 0
    up[8:16] = 0
    down[:, 16:24] = 0
    for matrix in (gate, up, down.T):
        matrix[24:40] = matrix[40]
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = 0
    tensors["model.layers.1.mlp.up_proj.weight"][:] = 0.25
    tensors["model.layers.1.post_attention_layernorm.weight"][:] = 0


@pytest.fixture(scope="module")
def half_dead(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half-dead") / "dense"
    return edit(make("llama", folder, max_shard_size="1GB"), kill_neurons)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router_init": "orthogonal"},
        {"granularity": 4, "experts": 8, "top_k": 4},
        {"shared_experts": "split"},
        {"target": "qwen2_moe", "shared_experts": "split"},
        {"router_init": "hidden"},
        {"noise": 0.5},
        {"drop": 0.5},
        {"drop": 0.5, "drop_index": "per-matrix"},
        {"drop": 1.0, "noise": 0.5},
    ],
    ids=lambda options: ",".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_d2_dead_and_equal_neurons_divide_by_nothing(
    options: Options, half_dead: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if options.get("router_init") == "hidden":
        # two groups alike: their difference is a zero vector
        (tmp_path / "prompts.txt").write_text("one\ntwo\none\ntwo\n")
        options = options | {"router_prompts": str(tmp_path / "prompts.txt")}
    with warnings.catch_warnings(), np.errstate(divide="raise", invalid="raise"):
        warnings.simplefilter("error", RuntimeWarning)
        adaconvert.convert(half_dead, destination=out, **{"experts": 4, **options})
    assert all(np.isfinite(tensor).all() for tensor in read_folder(out)[1].values())
    if not {"noise", "drop"} & options.keys():
        assert_same_function(half_dead, out)


@pytest.mark.parametrize(
    ("family", "host"),
    [
        ("llama", "mixtral"),
        ("qwen3", "qwen3_moe"),
        ("granite", "granitemoe"),
        ("gemma", "granitemoe"),
        ("llama", "ernie4_5_moe"),
    ],
)
def test_d8_a_tied_embedding_is_written_once(family: str, host: str, tmp_path: Path) -> None:
    dense = make(family, tmp_path / "dense", max_shard_size="1GB", tie_word_embeddings=True)
    out, twice = tmp_path / "out", tmp_path / "twice"
    adaconvert.convert(dense, destination=out, target=host, experts=4)
    stored = read_folder(out)[1]
    embedding = stored["model.embed_tokens.weight"]
    assert [name for name in stored if stored[name].shape == embedding.shape] == [
        "model.embed_tokens.weight"
    ]
    model = load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_function(dense, out)

    def store_the_head(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    result = adaconvert.convert(
        edit(dense, store_the_head), destination=twice, target=host, experts=4
    )
    again = read_folder(twice)[1]
    assert again.keys() == stored.keys()
    assert all(np.array_equal(again[name], stored[name]) for name in stored)
    assert "lm_head.weight" in json.dumps(result.manifest["dropped"])


def test_d8_a_scaled_embedding_leaves_its_head_unscaled(tmp_path: Path) -> None:
    dense = make("gemma", tmp_path / "dense")
    adaconvert.convert(dense, destination=tmp_path / "out", target="mixtral", experts=4)
    stored, source = read_folder(tmp_path / "out")[1], read_folder(dense)[1]
    embedding = source["model.embed_tokens.weight"]
    assert np.array_equal(stored["lm_head.weight"], embedding)
    assert stored["model.embed_tokens.weight"] == pytest.approx(embedding * 32**0.5, rel=1e-6)
    model = load(tmp_path / "out")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
