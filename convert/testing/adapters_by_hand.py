"""Standalone checkpoints with routed adapters, made by hand for tests of the runtime alone.

A checkpoint that is adaptive already (split networks, null experts) keeps its sites.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.modeling.adaptive_linear import block_of, sizes_of
from adaconvert.modeling.loading import CODE_FILES, code_folder, is_adaptive, load_model

if TYPE_CHECKING:
    import torch

_AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
}


def make_adapted(
    dense: Path,
    folder: Path,
    *,
    linears: Sequence[str] = ("q_proj", "v_proj"),
    kind: str = "lora",
    experts: int = 4,
    rank: int = 2,
    scaling: float | Sequence[float] = 2.0,
    share: str | None = None,
    on: str = "output",
    reads: str = "module",
    router: Mapping[str, Any] | None = None,
    select: Mapping[str, Any] | None = None,
    random: bool = True,
) -> Path:
    """Return `folder`, now a copy of a checkpoint with routed adapters on some of its linears.

    Args:
        dense: dense checkpoint, or an adaptive one without adapters.
        folder: where to; must not exist.
        linears: last components of the paths of what is adapted, inside blocks.
        kind: "lora" or "ia3".
        experts: adapters of each linear.
        rank: of each adapter.
        scaling: of all adapters, or of each.
        share: "a" for one A of all adapters.
        on: what "ia3" scales, "input" or "output".
        reads: what routers read, "module", "layer" or "shared".
        router: more of the routers' description ("score", "norm", "scale"); {"kind": "none"} for
            none.
        select: rule of the gates, soft when not given.
        random: B and vectors are random; without it they are zero, so the model computes what
            `dense` does.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((dense / "config.json").read_text())
    adapters = {"kind": kind, "count": experts} | (
        {"rank": rank, "share": share, "scaling": scaling} if kind == "lora" else {"on": on}
    )
    sites = _sites(
        load_model(dense),
        linears,
        adapters,
        {"kind": "linear", "reads": reads, "score": "dot", "norm": "none", "scale": 1.0}
        | dict(router or {}),
        dict(select or {"rule": "soft"}),
    )
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        tensors |= load_file(file)
    like = next(iter(tensors.values()))
    tensors |= _tensors(sites, dtype=like.dtype, random=random)
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    adaptive = config if is_adaptive(config) else _adaptive_config(config)
    adaptive["adaptive"]["sites"] |= sites
    (folder / "config.json").write_text(json.dumps(adaptive))
    for name in CODE_FILES:
        shutil.copy(code_folder() / name, folder / name)
    return folder


def _sites(
    model: Any,
    linears: Sequence[str],
    adapters: Mapping[str, Any],
    router: Mapping[str, Any],
    select: Mapping[str, Any],
) -> dict[str, Any]:
    """Return path -> slots of every linear with one of the names, in model order."""
    hidden = getattr(model.config, "hidden_size", None) or model.config.n_embd
    owners: dict[str, str] = {}
    sites: dict[str, Any] = {}
    for path, module in model.named_modules():
        sizes = sizes_of(module)
        named = path.rpartition(".")[2] in linears
        if sizes is None or not named or block_of(path) is None:
            continue
        own = dict(router)
        if own["kind"] == "none":
            own = {"kind": "none"}
        elif own["reads"] != "module":
            group = str(block_of(path)) if own["reads"] == "layer" else ""
            own |= {"of": owners.setdefault(group, path), "input": int(hidden)}
        sized = {**adapters, "input": sizes[0], "output": sizes[1]}
        sites[path] = {"linear": {"adapters": sized, "router": own, "select": dict(select)}}
    return sites


def _tensors(
    sites: Mapping[str, Any], *, dtype: torch.dtype, random: bool
) -> dict[str, torch.Tensor]:
    """Return the tensors of adapters and routers by name."""
    import torch

    generator = torch.Generator().manual_seed(1)
    found: dict[str, torch.Tensor] = {}

    def draw(name: str, *shape: int, size: float = 0.3, dtype: Any = dtype) -> None:
        found[name] = (torch.randn(shape, generator=generator) * size).to(dtype)

    for path, slots in sites.items():
        adapters, router = slots["linear"]["adapters"], slots["linear"]["router"]
        count, out = adapters["count"], 0.3 if random else 0.0
        if adapters["kind"] == "lora":
            shared = 1 if adapters["share"] == "a" else count
            draw(f"{path}.adapters.a", shared, adapters["rank"], adapters["input"])
            draw(f"{path}.adapters.b", count, adapters["output"], adapters["rank"], size=out)
        else:
            draw(f"{path}.adapters.vectors", count, adapters[adapters["on"]], size=out)
        if router["kind"] == "linear" and router.get("of") in (None, path):
            width = router.get("input", adapters["input"])
            draw(f"{path}.router.weight", count, width, dtype=torch.float32)
    return found


def _adaptive_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of an adaptive checkpoint of a dense one, without sites."""
    import transformers

    family, architecture = config["model_type"], config["architectures"][0]
    stock: Any = getattr(transformers, architecture)
    auto = next(value for end, value in _AUTO.items() if architecture.endswith(end))
    named = stock.config_class.__name__
    return {
        **config,
        "model_type": f"adaptive_{family}",
        "architectures": [f"Adaptive{architecture}"],
        "auto_map": {
            "AutoConfig": f"configuration_adaptive.Adaptive{named}",
            auto: f"modeling_adaptive.Adaptive{architecture}",
        },
        "adaptive": {
            "version": 1,
            "base": {"architecture": architecture, "config": named, "model_type": family},
            "reference": {"flops_per_token": 200000, "ffn_flops_per_token": 0, "length": 512},
            "sites": {},
            "model": {"exits": None, "recursion": None, "decode_policy": None},
            "calibration": None,
        },
    }
