"""An upcycled checkpoint made with nothing but safetensors and json, to try `verification` on.

It shares no code with the converter, so that a fault of the one does not hide a fault of the other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from adaconvert.io import manifest
from adaconvert.io.layout import ShardRecord, shard_digest_of_file
from adaconvert.io.source import Source

if TYPE_CHECKING:
    import torch

_EXPERT_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_INDEX = "model.safetensors.index.json"

Tensors = dict[str, "torch.Tensor"]


def upcycle_by_hand(
    source: Path,
    target: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    edit: Callable[[Tensors], None] | None = None,
    config: Mapping[str, object] | None = None,
    kind: str = "exact",
    options: Mapping[str, object] | None = None,
) -> Path:
    """Return `target`, which now holds a Llama in `source` as a Mixtral of identical experts.

    Args:
        source: a tiny Llama checkpoint.
        target: folder to make.
        experts, top_k: of every block.
        edit: changes the tensors before they are written and hashed.
        config: config values that differ.
        kind: exactness the manifest promises.
        options: as the manifest records them.
    """
    target.mkdir()
    tensors = _mixture(_read(source), experts)
    if edit is not None:
        edit(tensors)
    _write(target, tensors)
    values = json.loads((source / "config.json").read_text())
    values |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_local_experts": experts,
        "num_experts_per_tok": top_k,
        "sliding_window": None,
        **(config or {}),
    }
    (target / "config.json").write_text(json.dumps(values, indent=2))
    for path in source.iterdir():
        if path.suffix in {".json", ".jinja"} and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    write_manifest(target, source, kind=kind, options=options or {})
    return target


def write_manifest(
    target: Path, source: Path, *, kind: str = "exact", options: Mapping[str, object]
) -> None:
    """Write an adaconvert.json that vouches for `target` as it is now."""
    side = [p for p in sorted(target.iterdir()) if p.name != manifest.MANIFEST_FILE]
    shards = {p.name: _record(p) for p in side if p.suffix == ".safetensors"}
    opened = Source.open(source)
    values = manifest.build(
        method="upcycle",
        options=options,
        sources=[{"label": opened.label, "revision": None, "fingerprint": opened.fingerprint}],
        plan_digest="0" * 64,
        exactness={"kind": kind, "why": "by hand"},
        shards=shards,
        files={
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in side if p.name not in shards
        },
    )
    (target / manifest.MANIFEST_FILE).write_bytes(manifest.dump(manifest.seal(values)))


def _record(path: Path) -> ShardRecord:
    digest, tensors = shard_digest_of_file(path)
    return ShardRecord(file=path.name, nbytes=path.stat().st_size, digest=digest, tensors=tensors)


def _read(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _mixture(dense: Tensors, experts: int) -> Tensors:
    import torch

    generator = torch.Generator().manual_seed(7)
    made: Tensors = {}
    for name, tensor in dense.items():
        part = name.split(".")[-2]
        if ".mlp." not in name:
            made[name] = tensor
            continue
        moe = name.split(".mlp.")[0] + ".block_sparse_moe"
        for expert in range(experts):
            made[f"{moe}.experts.{expert}.{_EXPERT_NAMES[part]}.weight"] = tensor.clone()
        if part == "gate_proj":
            router = torch.randn(experts, tensor.shape[1], generator=generator)
            made[f"{moe}.gate.weight"] = router.to(tensor.dtype)
    return made


def _write(target: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [f"model-{i}-of-00002.safetensors" for i in ("00001", "00002")]
    for file, half in zip(files, halves, strict=True):
        save_file(
            {name: tensors[name].contiguous() for name in half},
            target / file,
            metadata={"format": "pt"},
        )
        (target / file).chmod(0o644)
    weight_map = {n: file for file, half in zip(files, halves, strict=True) for n in half}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / _INDEX).write_text(json.dumps(index, indent=2))
