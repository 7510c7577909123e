"""Variants whose experts differ, against a decoder written independently."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaconvert
from adaconvert.testing.reference_moe import ReferenceMoE
from adaconvert.testing.tiny_models import VARIANTS, make

#: longer than every window and than the original context of the scaled rotary rules.
IDS = [int(i) for i in np.random.default_rng(3).integers(3, 250, 40)]
HOSTS = (
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granitemoe",
    "granitemoeshared",
    "flex_olmo",
    "glm4_moe",
    "dots1",
    "ernie4_5_moe",
)
Options = dict[str, Any]
Sources = Callable[..., Path]

#: what makes experts differ; "seeds" are those of the sources that are mixed.
KINDS: dict[str, Options] = {
    "noise": {"noise": 0.5, "router_init": "orthogonal"},
    "drop": {"drop": 0.5, "top_k": 3},
    "granular": {"granularity": 2, "experts": 8, "top_k": 4, "noise": 0.5},
    "mix": {"seeds": (0, 1)},
}
#: source -> hosts that are tried with every kind.
EVERY_KIND: dict[str, tuple[str, ...]] = {
    "llama-head-dim": ("mixtral", "qwen2_moe", "granitemoeshared", "glm4_moe", "ernie4_5_moe"),
    "llama-attention-bias": ("granitemoe",),
    "mistral-sliding": ("mixtral",),
    "qwen2": ("qwen2_moe",),
    "qwen3": ("qwen3_moe", "dots1"),
    "olmo2": ("flex_olmo",),
    "olmo": ("mixtral",),
    "phi3": ("mixtral",),
    "granite": ("granitemoe",),
    "gemma": ("granitemoe",),
}
#: source, host, options beside noise: features of a source or host that need one look each.
NOISE_ONLY: list[tuple[str, str, Options]] = [
    ("llama-llama3-rope", "mixtral", {}),
    ("mistral-tied", "mixtral", {}),
    ("qwen2-sliding", "qwen2_moe", {}),
    ("qwen2-sliding-all", "qwen2_moe", {}),
    ("qwen2-tied", "glm4_moe", {}),
    ("qwen3-attention-bias", "qwen3_moe", {}),
    ("qwen3-sliding", "dots1", {}),
    ("qwen3", "glm4_moe", {}),
    ("olmo3-full", "flex_olmo", {}),
    ("olmo2-bias", "flex_olmo", {}),
    ("olmo-tied", "granitemoe", {}),
    ("phi3-sliding", "mixtral", {}),
    ("phi3-longrope", "mixtral", {}),
    ("phi3-partial", "glm4_moe", {}),
    ("gemma", "mixtral", {}),
    # some blocks stay dense
    ("qwen2", "qwen2_moe", {"layers": "0"}),
    ("qwen3", "qwen3_moe", {"layers": "1"}),
    ("qwen3", "dots1", {"layers": "1"}),
    ("llama-head-dim", "glm4_moe", {"layers": "1"}),
    ("llama-head-dim", "ernie4_5_moe", {"layers": "0"}),
    # shared experts
    ("granite", "granitemoeshared", {"shared_experts": "split"}),
    ("granite", "granitemoeshared", {"shared_experts": "neutral"}),
    ("qwen2", "qwen2_moe", {"shared_experts": "split", "shared_width": 16}),
    ("qwen2", "qwen2_moe", {"shared_experts": "neutral"}),
    ("qwen3", "dots1", {"shared_experts": "split"}),
    ("llama-head-dim", "glm4_moe", {"shared_experts": "split"}),
    ("llama-head-dim", "ernie4_5_moe", {"shared_experts": "split"}),
    ("llama-head-dim", "ernie4_5_moe", {"shared_experts": "neutral"}),
    # together
    ("gemma", "granitemoe", {"granularity": 4, "experts": 8, "top_k": 4, "drop": 0.25}),
    ("olmo", "mixtral", {"drop": 0.5, "drop_index": "per-matrix", "top_k": 1}),
    (
        "qwen2",
        "qwen2_moe",
        {"shared_experts": "split", "granularity": 2, "experts": 8, "top_k": 4},
    ),
]
CASES = [
    (name, host, options)
    for name, hosts in EVERY_KIND.items()
    for host in hosts
    for options in KINDS.values()
] + [(name, host, KINDS["noise"] | options) for name, host, options in NOISE_ONLY]


def _id(value: object) -> str:
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items())
    return str(value)


def stock_logits(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def convert(dense: Sources, name: str, out: Path, **options: Any) -> ReferenceMoE:
    """Return the reference model of a tiny source converted as asked."""
    sources = [dense(name, seed) for seed in options.pop("seeds", (0,))]
    adaconvert.convert(
        *sources, destination=out, verify=False, **{"experts": 4, "seed": 11, **options}
    )
    return ReferenceMoE(out)


def turn_routers(model: ReferenceMoE) -> None:
    """Give every expert's router row to the next expert."""
    for name in model.tensors:
        if name.endswith((".gate.weight", ".router.layer.weight")):
            model.tensors[name] = np.roll(model.tensors[name], 1, axis=0)


NATIVE: list[tuple[str, Options]] = [
    *((host, {}) for host in HOSTS),
    *((name, {}) for name, (family, _) in VARIANTS.items() if family in HOSTS),
    ("glm4_moe", {"routed_scaling_factor": 2.5, "norm_topk_prob": False}),
    ("dots1", {"num_experts_per_tok": 3, "routed_scaling_factor": 2.5}),
    ("qwen3_moe", {"norm_topk_prob": False, "hidden_act": "gelu_pytorch_tanh"}),
]


@pytest.mark.parametrize(("name", "changed"), NATIVE, ids=_id)
def test_the_reference_computes_what_stock_mixtures_compute(
    name: str, changed: Options, tmp_path: Path
) -> None:
    # random correction biases, several shared experts: more than a conversion writes
    folder = make(name, tmp_path / "moe", **changed)
    assert_close(stock_logits(folder, IDS), ReferenceMoE(folder).logits(IDS))


@pytest.mark.parametrize(("name", "host", "options"), CASES, ids=_id)
def test_distinct_experts_compute_what_the_reference_computes(
    name: str, host: str, options: Options, dense: Sources, tmp_path: Path
) -> None:
    reference = convert(dense, name, tmp_path / "out", target=host, **options)
    assert reference.kind == host
    sparse = [block for block in map(reference.block, (0, 1)) if block.experts]
    assert len(sparse) == (1 if "layers" in options else 2)
    for block in sparse:
        distinct = len({matrix.tobytes() for _, matrix, _ in block.experts})
        assert distinct == (2 if "seeds" in options else len(block.experts))
    want = reference.logits(IDS)
    assert_close(stock_logits(tmp_path / "out", IDS), want)
    turn_routers(reference)
    assert np.abs(reference.logits(IDS) - want).max() > 1e-3 * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        (
            "llama-head-dim",
            ("mixtral", "qwen2_moe", "granitemoe", "granitemoeshared", "ernie4_5_moe"),
        ),
        ("qwen3", ("dots1", "glm4_moe")),
    ],
)
@pytest.mark.parametrize("kind", ["noise", "drop", "granular"])
def test_hosts_that_route_alike_compute_the_same_function(
    name: str, hosts: tuple[str, ...], kind: str, dense: Sources, tmp_path: Path
) -> None:
    logits = [
        convert(dense, name, tmp_path / host, target=host, **KINDS[kind]).logits(IDS)
        for host in hosts
    ]
    for other in logits[1:]:
        assert_close(other, logits[0], 1e-9)


@pytest.mark.parametrize("name", ["mistral-sliding", "qwen2-sliding", "qwen3-sliding"])
def test_the_window_reaches_the_logits(name: str, dense: Sources, tmp_path: Path) -> None:
    target = "dots1" if name == "qwen3-sliding" else "auto"
    reference = convert(dense, name, tmp_path / "out", target=target, **KINDS["noise"])
    windowed = reference.logits(IDS)
    reference.config["sliding_window"] = None
    whole = reference.logits(IDS)
    assert np.abs(windowed - whole)[8:].max() > 1e-2 * np.abs(whole).max()
    assert_close(windowed[:8], whole[:8], 1e-9)


@pytest.mark.parametrize("name", ["llama-head-dim", "qwen2", "olmo", "gemma", "phi3"])
def test_equal_parents_give_the_parent(name: str, dense: Sources, tmp_path: Path) -> None:
    twin = shutil.copytree(dense(name), tmp_path / "twin")
    adaconvert.convert(dense(name), twin, destination=tmp_path / "out", verify=False, experts=4)
    assert_close(stock_logits(tmp_path / "out", IDS), stock_logits(dense(name), IDS), 1e-5)


PROMPTS = (
    ("alpha beta gamma", "delta epsilon"),
    ("12345 67890 13579",),
    ("!!! ??? ;;;", "... ,,, :::", "--- +++"),
    ("The river is wide.",),
)


def ffn_input_means(folder: Path) -> list[Any]:
    """Return, block by block, the mean FFN input of each group of PROMPTS [group, H].

    Stock transformers and a hook: nothing of the converter takes part.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    seen: dict[int, list[Any]] = {}
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda _, args, index=index: seen.setdefault(index, []).append(args[0][0].numpy())
        )
    means: list[list[Any]] = [[] for _ in model.model.layers]
    for group in PROMPTS:
        seen.clear()
        for prompt in group:
            with torch.no_grad():
                model(**tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
        for index, inputs in seen.items():
            means[index].append(np.concatenate(inputs).mean(axis=0))
    return [np.stack(rows) for rows in means]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [("llama-head-dim", 1), ("llama-head-dim", 2), ("olmo2", 1), ("olmo", 1)],
)
def test_routers_from_prompts_choose_their_own_expert(
    name: str, granularity: int, dense: Sources, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n\n".join("\n".join(group) for group in PROMPTS))
    reference = convert(
        dense,
        name,
        tmp_path / "out",
        experts=4 * granularity,
        top_k=2 * granularity,
        granularity=granularity,
        router_init="hidden",
        router_prompts=str(prompts),
    )
    for layer, means in enumerate(ffn_input_means(dense(name))):
        router = reference.block(layer).router
        assert router is not None
        assert np.isfinite(router).all()
        # four centred rows span three dimensions
        assert np.linalg.matrix_rank(router, tol=1e-4) == 3
        scores = means @ router.T
        assert (scores.argmax(axis=1) // granularity).tolist() == [0, 1, 2, 3]
        top = reference.weights(layer, means).argmax(axis=1)
        assert (top // granularity).tolist() == [0, 1, 2, 3]
    assert_close(stock_logits(tmp_path / "out", IDS), reference.logits(IDS))


def test_every_host_is_compared_with_distinct_experts() -> None:
    assert {host for _, host, _ in CASES} == set(HOSTS)
