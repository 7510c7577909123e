"""Tiny mixtures of every family whose routing null experts cover, and what their routers do.

Letters: n real experts, k experts per token of the source, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adaconvert.api import convert
from adaconvert.arch import registry
from adaconvert.arch.mixture import Mixture, mixtures
from adaconvert.io.source import Source
from adaconvert.testing.tiny_models import make

#: name -> family or variant, and what differs from the tiny model: n = 6 and k = 2, or as it says.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 6}),
    "mixtral-sliding": ("mixtral-sliding", {"num_local_experts": 6, "num_experts_per_tok": 1}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 6}),
    "qwen2_moe-all": ("qwen2_moe-some-dense", {"num_experts": 6, "norm_topk_prob": False}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "qwen3_moe-all": ("qwen3_moe-step", {"num_experts": 6, "norm_topk_prob": False}),
    "olmoe": ("olmoe", {"num_experts": 6}),
    "olmoe-all": ("olmoe-bias", {"num_experts": 6, "num_experts_per_tok": 3}),
    "flex_olmo": ("flex_olmo", {"num_experts": 6}),
    "flex_olmo-all": ("flex_olmo", {"num_experts": 6, "norm_topk_prob": False}),
    "granitemoe": ("granitemoe", {"num_local_experts": 6}),
    "granitemoeshared": ("granitemoeshared", {"num_local_experts": 6, "num_experts_per_tok": 3}),
    "deepseek_v2": ("deepseek_v2", {"n_routed_experts": 6}),
    "deepseek_v2-lite": ("deepseek_v2-lite", {"n_routed_experts": 6, "num_experts_per_tok": 3}),
}
#: seed -> factor on the routers' rows.
SEEDS = {0: 1.0, 1: 3.0, 2: 8.0}
#: tokens every comparison runs on, none of them padding.
IDS = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(5))
MASK = torch.ones_like(IDS)


@dataclass
class Gates:
    """What the routers of a model did, block by block, by path.

    Attributes:
        inputs: [T, d].
        logits: [T, n].
        dense: [T, n] weights, 0 where an expert does not run.
    """

    inputs: dict[str, Tensor]
    logits: dict[str, Tensor]
    dense: dict[str, Tensor]


def make_mixture(name: str, folder: Path, *, seed: int = 1, dtype: str = "float32") -> Path:
    """Return `folder`, now a tiny mixture of `CASES` with the routers of `SEEDS`."""
    variant, overrides = CASES[name]
    make(variant, folder, seed=seed, dtype=dtype, max_shard_size="1GB", **overrides)
    scale_routers(folder, SEEDS[seed])
    return folder


def null(source: Path, out: Path, *, verify: bool = False, **options: Any) -> Path:
    """Return `out`, now the source with null experts."""
    convert(source, destination=out, method="adamoe", verify=verify, **options)
    return out


def scale_routers(folder: Path, factor: float) -> None:
    """Multiply the rows of every router."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for block in blocks_of(folder):
        tensors[block.router_tensor] = tensors[block.router_tensor] * factor
    save_file(tensors, file, metadata={"format": "pt"})


def blocks_of(folder: Path) -> tuple[Mixture, ...]:
    """Return the sparse blocks of a stock checkpoint."""
    return mixtures(registry.describe(Source.open(folder).config))


def stock(folder: Path, dtype: str = "float32") -> Any:
    """Return the model transformers itself makes of a checkpoint."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False).eval()


def logits_of(model: Any) -> Tensor:
    """Return what a model makes of `IDS`."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def places(router: Any, count: int) -> tuple[int, int, int]:
    """Return where a stock router returns logits, weights and experts; versions differ."""
    hidden = router.weight.shape[-1]
    with torch.no_grad():
        found = router(torch.ones(1, hidden, dtype=router.weight.dtype))
    index = next(i for i, part in enumerate(found) if not part.is_floating_point())
    logits = next(i for i, part in enumerate(found) if part.shape[-1] == count)
    return logits, 3 - index - logits, index


@contextmanager
def watched(model: Any, blocks: tuple[Mixture, ...]) -> Iterator[Gates]:
    """Give what the routers do while the context lasts."""
    gates = Gates({}, {}, {})
    hooks = []
    for block in blocks:
        router = model.get_submodule(f"{block.path}.{block.router}")
        where = places(router, block.count)
        hooks.append(router.register_forward_hook(_keep(gates, block, where)))
    yield gates
    for hook in hooks:
        hook.remove()


def _keep(gates: Gates, block: Mixture, where: tuple[int, int, int]) -> Any:
    def keep(router: Any, args: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, weights, index = (output[place].detach() for place in where)
        dense = torch.zeros(len(index), block.count + 1, dtype=weights.dtype)
        dense.scatter_add_(1, index.clamp_min(-1) % (block.count + 1), weights)
        gates.inputs[block.path] = args[0].detach().reshape(len(index), -1)
        gates.logits[block.path] = logits
        gates.dense[block.path] = dense[:, :-1]

    return keep


def gates_of(model: Any, folder: Path) -> tuple[Gates, Tensor]:
    """Return what the routers did on the test's tokens, and the logits of the model."""
    with watched(model, blocks_of(folder)) as gates:
        found = logits_of(model)
    return gates, found


def assert_same_gates(model: Any, mine: Gates, theirs: Gates, folder: Path) -> None:
    """Hold gates to those of the source: the same experts in the whole model, and the same weights
    for the same input of a block.

    Through a whole model, routers whose rows are eight times larger turn roundings of one block
    into more than 1e-6 in the next.
    """
    blocks = blocks_of(folder)
    assert mine.dense.keys() == theirs.dense.keys() == {block.path for block in blocks}
    with watched(model, blocks) as same, torch.no_grad():
        for block in blocks:
            model.get_submodule(block.path)(theirs.inputs[block.path][None])
    for path, wanted in theirs.dense.items():
        assert torch.equal(mine.dense[path] != 0, wanted != 0), path
        found = same.dense[path]
        assert found.dtype == wanted.dtype
        assert torch.equal(same.logits[path], theirs.logits[path]), path
        assert torch.equal(found != 0, wanted != 0), path
        assert (found - wanted).abs().max() <= 1e-6, path


def assert_same_logits(mine: Tensor, theirs: Tensor) -> None:
    """Hold logits to others: 1e-5 of the largest, and the same next tokens."""
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert torch.equal(mine.argmax(-1), theirs.argmax(-1))
