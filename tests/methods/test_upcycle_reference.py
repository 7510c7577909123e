"""Variants whose experts differ, against a decoder written independently; and what their weights
must be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import adaconvert
from adaconvert.testing.reference_moe import Glu, ReferenceMoE, read_folder
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


def dense_glu(folder: Path, layer: int) -> Glu:
    """Return gate, up and down of a dense block, fused or not; down centred for OLMo 1.

    OLMo's LayerNorm has no parameters: it is an RMSNorm where nothing written to the residual
    stream has a mean.
    """
    config, tensors = read_folder(folder)
    name = f"model.layers.{layer}.mlp"
    down = tensors[f"{name}.down_proj.weight"]
    if config["model_type"] == "olmo":
        down = down - down.mean(axis=0)
    if f"{name}.gate_up_proj.weight" in tensors:
        gate, up = np.split(tensors[f"{name}.gate_up_proj.weight"], 2)
        return gate, up, down
    return tensors[f"{name}.gate_proj.weight"], tensors[f"{name}.up_proj.weight"], down


def turn_routers(model: ReferenceMoE) -> None:
    """Give every expert's router row to the next expert."""
    for name in model.tensors:
        if name.endswith((".gate.weight", ".router.layer.weight")):
            model.tensors[name] = np.roll(model.tensors[name], 1, axis=0)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Return a function from the name of a tiny model and a seed to its folder."""
    root = tmp_path_factory.mktemp("dense")

    def source(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        return folder if folder.exists() else make(name, folder, seed=seed)

    return source


@pytest.fixture(scope="module")
def llama(dense: Sources) -> Path:
    return dense("llama-head-dim")


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


def test_granular_experts_are_the_scaled_shards(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adaconvert.convert(llama, destination=out, verify=False, granularity=4, experts=8, top_k=4)
    gate, up, down = dense_glu(llama, 1)
    block = ReferenceMoE(out).block(1)
    m = len(gate) // 4
    for e, (g, u, d) in enumerate(block.experts):
        rows = slice((e % 4) * m, (e % 4 + 1) * m)
        assert np.array_equal(g, gate[rows])
        assert np.array_equal(u, 2 * up[rows])
        assert np.array_equal(d, 2 * down[:, rows])
    assert block.router is not None
    assert np.array_equal(block.router[:4], np.repeat(block.router[:1], 4, axis=0))
    assert not np.array_equal(block.router[0], block.router[4])


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite"])
def test_noise_is_measured_in_standard_deviations_of_each_matrix(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    reference = convert(dense, name, tmp_path / "out", noise=0.5)
    for layer in range(2):
        whole = dense_glu(dense(name), layer)
        drawn = [
            (matrix - base) / base.std()
            for expert in reference.block(layer).experts
            for matrix, base in zip(expert, whole, strict=True)
        ]
        flat = np.array([draw.reshape(-1) for draw in drawn])
        assert flat.std(axis=1) == pytest.approx(0.5, abs=0.05)
        # no two draws are alike
        assert np.abs(np.corrcoef(flat) - np.eye(len(flat))).max() < 0.15


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite", "olmo"])
def test_drop_keeps_half_of_the_neurons_of_each_expert(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    gate, up, down = dense_glu(dense(name), 0)

    def intact(model: ReferenceMoE) -> list[Any]:
        # a computed matrix is rounded to float32; re-drawn neurons are nowhere near
        return [
            sum(
                np.isclose(got, want, rtol=0, atol=1e-6).all(axis).astype(int)
                for got, want, axis in zip(expert, (gate, up, down), (1, 1, 0), strict=True)
            )
            for expert in model.block(0).experts
        ]

    shared = intact(convert(dense, name, tmp_path / "out", drop=0.5))
    for neurons in shared:
        assert sorted(set(neurons.tolist())) == [0, 3]
        assert (neurons == 3).sum() == len(gate) // 2
    assert len({tuple(n) for n in shared}) == 4
    mixed = intact(convert(dense, name, tmp_path / "other", drop=0.5, drop_index="per-matrix"))
    assert {1, 2} <= set(np.concatenate(mixed).tolist())


@pytest.mark.parametrize("name", ["llama-head-dim", "phi3", "granite", "qwen3", "olmo2"])
def test_branch_train_mix_takes_ffns_as_experts_and_averages_the_rest(
    name: str, dense: Sources, tmp_path: Path
) -> None:
    mixed = convert(dense, name, tmp_path / "mixed", seeds=(0, 1))
    based = convert(dense, name, tmp_path / "based", seeds=(0, 1), base=f"{name}-1")
    models = [read_folder(dense(name, seed))[1] for seed in (0, 1)]
    parents = [dense_glu(dense(name, seed), 1) for seed in (0, 1)]
    for reference in (mixed, based):
        for e, expert in enumerate(reference.block(1).experts):
            for got, want in zip(expert, parents[e // 2], strict=True):
                assert np.array_equal(got, want)
    for rest in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"):
        one, two = (model[rest].astype(np.float32) for model in models)
        assert np.array_equal(mixed.tensors[rest], ((one + two) / 2).astype(np.float64))
        assert np.array_equal(based.tensors[rest], two)


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


def test_experts_of_more_files_than_stay_open(tmp_path: Path) -> None:
    sources = [make("granite", tmp_path / str(i), seed=i, max_shard_size="9KB") for i in range(4)]
    assert all(len(list(s.glob("*.safetensors"))) > 8 for s in sources)
    out = tmp_path / "out"
    adaconvert.convert(
        *sources, destination=out, verify=False, experts=4, target="granitemoe", base="0"
    )
    fused = "model.layers.0.block_sparse_moe.input_linear.weight"
    got = read_folder(out)[1][fused]
    for index, source in enumerate(sources):
        dense = read_folder(source)[1]
        parts = [dense[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")]
        assert np.array_equal(got[index], np.concatenate(parts))
