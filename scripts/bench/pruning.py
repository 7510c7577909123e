"""A dense checkpoint with its weakest feed-forward neurons left out for good.

The baseline of every method that chooses neurons token by token: the same number of neurons, chosen
once. What remains is a smaller stock model, so it is trained and measured by the ordinary commands.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adaconvert.arch.registry import FAMILIES
from adaconvert.arch.sites import ffn_site
from adaconvert.data.text import read_documents
from adaconvert.data.tokens import token_blocks
from adaconvert.io.reader import read_torch
from adaconvert.layerwise.quiet import quiet
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model


def prune(dense: Path, destination: Path, text: list[str], *, keep: int, tokens: int) -> Path:
    """Return `destination`, now a copy of `dense` with `keep` neurons a layer.

    A neuron's magnitude is the mean of |h_j| over `text`, times the norm of its column of down:
    what it adds to the residual stream.

    Args:
        dense: folder of a dense decoder.
        destination: where to; must not exist.
        text: files to take the mean over, in equal parts.
        keep: neurons of each layer that stay.
        tokens: tokens of text in all.
    """
    item = open_source(str(dense))
    kept = [
        scores.topk(keep).indices.sort().values for scores in magnitudes(item, text, tokens=tokens)
    ]
    tensors = {name: read_torch(item.source, ref) for name, ref in item.source.tensors.items()}
    for layer, order in enumerate(kept):
        for part in ffn_site(item.spec, layer).parts:
            old = tensors[part.tensor]
            runs = [order + run * item.spec.intermediate for run in range(part.runs)]
            tensors[part.tensor] = old.index_select(part.axis, torch.cat(runs)).contiguous()
    destination.mkdir(parents=True)
    for name in item.source.side_files:
        shutil.copy(item.source.path(name), destination / name)
    config = dict(item.source.config)
    config[FAMILIES[item.spec.model_type].keys["intermediate"].name] = keep
    (destination / "config.json").write_text(json.dumps(config, indent=2))
    for name in (*item.audit.dropped, "adaconvert.json"):
        tensors.pop(name, None)
        (destination / name).unlink(missing_ok=True)
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def magnitudes(item: Described, text: list[str], *, tokens: int) -> list[Tensor]:
    """Return how much each neuron adds to the residual stream on average, [f] for each layer."""
    with quiet():
        model: Any = load_model(item.source.root, dtype="float32")
    sums: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    handles = []
    for layer in range(item.spec.layers):
        site = ffn_site(item.spec, layer)
        down = model.get_submodule(site.path).get_submodule(site.weights["down"])
        # a Conv1D holds [in, out]
        weight = down.weight if type(down).__name__ == "Conv1D" else down.weight.T
        norms[layer] = torch.linalg.vector_norm(weight.detach().float(), dim=1)
        handles.append(down.register_forward_pre_hook(_adder(sums, layer)))
    with torch.inference_mode():
        for where in text:
            share = tokens // len(text)
            blocks = token_blocks(read_documents(where), item.source.root, max_tokens=share)
            for ids, real in zip(blocks.ids, blocks.weights, strict=True):
                model(input_ids=torch.from_numpy(ids[real])[None])
    for handle in handles:
        handle.remove()
    return [sums[layer] * norms[layer] for layer in sorted(sums)]


def _adder(sums: dict[int, Tensor], layer: int) -> Any:
    def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
        found = inputs[0].detach().float().abs().flatten(0, -2).sum(dim=0)
        sums[layer] = sums[layer] + found if layer in sums else found

    return hook
