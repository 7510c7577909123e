"""The models of the matrix: dense sources, and what adaconvert makes of them.

Each case is a source and a host. There are three folders: `<source>.dense`, `<case>.same`
(identical experts: must compute what the dense model computes) and `<case>.distinct` (experts that
differ by noise: only a runtime that routes right agrees with another one).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISTINCT = ("--noise", "0.3", "--router-init", "orthogonal")
REAL = "SmolLM2-135M"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# sizes that every runtime can run: vLLM's attention on a CPU wants heads of 32 or more
TINY: Mapping[str, object] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One conversion.

    Attributes:
        name: names its folders.
        source: REAL, or a family or variant of `adaconvert.testing.tiny_models`.
        target: the host, as `--target` takes it.
        options: of the conversion, beside the target.
        overrides: config values of a tiny source, the same in all cases with this source.
    """

    name: str
    source: str
    target: str
    options: tuple[str, ...] = ()
    overrides: Mapping[str, object] | None = None


CASES = (
    Case(name="smollm2", source=REAL, target="mixtral"),
    Case(name="llama", source="llama", target="mixtral"),
    Case(name="llama-granular", source="llama", target="mixtral", options=("--granularity", "2")),
    Case(
        name="llama-shared",
        source="llama",
        target="qwen2_moe",
        options=("--shared-experts", "split"),
    ),
    Case(name="llama-scaled-rope", source="llama-llama3-rope", target="mixtral"),
    Case(
        name="llama-wide-heads",
        source="llama-head-dim",
        target="mixtral",
        overrides={"head_dim": 64},
    ),
    # not named after its source: llama.cpp patches the vocabulary of models that are called phi-3
    Case(name="fused", source="phi3", target="mixtral", overrides={"sliding_window": None}),
    Case(
        name="mistral-window",
        source="mistral-sliding",
        target="mixtral",
        overrides={"sliding_window": 16},
    ),
    Case(name="olmo", source="olmo", target="mixtral"),
    Case(name="qwen2", source="qwen2", target="qwen2_moe"),
    Case(name="qwen2-tied", source="qwen2-tied", target="qwen2_moe"),
    Case(name="qwen3", source="qwen3", target="qwen3_moe"),
    Case(name="qwen3-layers", source="qwen3", target="qwen3_moe", options=("--layers", "1")),
    Case(name="granite", source="granite", target="granitemoe"),
    Case(
        name="granite-shared",
        source="granite",
        target="granitemoeshared",
        options=("--shared-experts", "split"),
    ),
    Case(name="llama-bias", source="llama-attention-bias", target="granitemoe"),
    Case(name="gemma", source="gemma", target="granitemoe"),
    Case(name="olmo2", source="olmo2", target="flex_olmo"),
    Case(name="llama-glm4", source="llama", target="glm4_moe"),
    Case(name="qwen3-dots1", source="qwen3", target="dots1"),
    Case(name="llama-ernie", source="llama", target="ernie4_5_moe"),
)
# what stands for the real model where it cannot be had
STAND_IN = Case(name="llama-tied", source="llama-tied", target="mixtral")


def make_source(case: Case, sources: Path, real: Path | None) -> Path:
    """Return the folder of the dense checkpoint, made once when it is a tiny one."""
    if case.source == REAL:
        if real is None:
            raise ValueError(f"{case.name} needs the folder of {REAL}")
        return real
    folder = sources / case.source
    complete = sources / f"{case.source}.complete"
    if not complete.exists():
        _make_tiny(case, folder, real)
        complete.touch()
    return folder


def _make_tiny(case: Case, folder: Path, real: Path | None) -> None:
    from adaconvert.testing import tiny_models

    values: dict[str, Any] = {**TINY, "dtype": "float32"} | dict(case.overrides or {})
    if real is not None:
        values["vocab_size"] = json.loads((real / "config.json").read_text())["vocab_size"]
    tiny_models.make(case.source, folder, max_shard_size="1GB", **values)
    if real is not None:
        # llama.cpp's converter knows tokenizers by name: a made-up one is refused
        for name in TOKENIZER_FILES:
            shutil.copyfile(real / name, folder / name)


def make_dense(source: Path, folder: Path) -> Path:
    """Return a copy of the source whose config.json old and new transformers read alike.

    transformers 5 writes `rope_parameters` only; 4.57 then falls back to its default base and
    computes another function without a word.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():
        (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        scaled = rope.get("rope_type", "default") != "default"
        config["rope_scaling"] = rope if scaled else None
    config["torch_dtype"] = config.get("dtype", config.get("torch_dtype"))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return folder


def convert(adaconvert: str, case: Case, source: Path, folder: Path, *, distinct: bool) -> None:
    """`folder` holds the converted model."""
    shutil.rmtree(folder, ignore_errors=True)
    extra = DISTINCT if distinct else ()
    _run(adaconvert, "upcycle", str(source), str(folder), *_options(case), *extra, "--no-verify")


def planned(adaconvert: str, case: Case, source: Path) -> dict[str, str]:
    """Return what `plan` says each runtime will do with the converted model."""
    said = _run(adaconvert, "plan", "upcycle", str(source), *_options(case), "--json")
    return {entry["runtime"]: entry["verdict"] for entry in json.loads(said)["runtimes"]}


def _options(case: Case) -> list[str]:
    return ["--target", case.target, *case.options]


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed with {done.returncode}:\n{done.stderr}")
    return done.stdout
