"""Which files beside the weights go along, byte for byte, and why the others do not."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from adaconvert.errors import AdaconvertError
from adaconvert.io.names import escape
from adaconvert.io.strict_json import load_object

GENERATION_CONFIG: Final = "generation_config.json"
_MAX_JSON: Final = 16 << 20

_COPIED: Final = re.compile(
    r"""
    tokenizer[\w.-]*\.(json|txt)     | tokenizer[\w.-]*\.model(\.v\d+)?
    | [\w.-]*\.tiktoken               | tekken\.json
    | vocab[\w.-]*\.(json|txt|model)    | merges[\w.-]*\.txt
    | (spiece|sentencepiece[\w.-]*)\.model | sentencepiece\.bpe\.model
    | special_tokens_map\.json | added_tokens\.json | normalizer\.json
    | chat_template[\w.-]*\.(jinja|json)
    | generation_config\.json
    | ([\w-]*_)?(preprocessor|processor)_config\.json
    | (LICEN[CS]E|NOTICE|USE_POLICY)([._ -][\w.-]*)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
_NEVER: Final = (
    (re.compile(r".*\.index\.json", re.I), "belongs to the source's shards"),
    (
        re.compile(
            r"config\.json|README(\..*)?|adaconvert\.json|compute_loss\.svg"
            r"|real_experts\.svg|adaconvert_recipe\.yaml",
            re.I,
        ),
        "written anew",
    ),
    (re.compile(r"\.git.*", re.I), "belongs to the source's repository"),
    (re.compile(r".*\.(py|pyc|so|sh)", re.I), "is code"),
    (re.compile(r"training_args.*|optimizer.*|scheduler.*|rng_state.*", re.I), "is training state"),
    (re.compile(r"trainer_state.*|.*events\.out.*", re.I), "is training state"),
    (re.compile(r".*\.(safetensors|gguf|ggml|onnx|msgpack|h5)", re.I), "holds other weights"),
    (re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|npz|npy)", re.I), "may hold pickled objects"),
)


class Folder(Protocol):
    """A source's files; `io.source.Source` is one."""

    @property
    def side_files(self) -> tuple[str, ...]: ...

    def path(self, relative: str) -> Path:
        """Return where a file lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxFiles:
    """The files of a source beside its weights: which to copy, and why not the others."""

    copied: tuple[str, ...]
    dropped: dict[str, str]


def classify(source: Folder) -> AuxFiles:
    """Return what happens to every side file of a source; only generation_config.json is read.

    Raises:
        ResourceError: generation_config.json may not be read.
    """
    dropped = {name: reason for name in source.side_files if (reason := _reason(name))}
    copied = [name for name in source.side_files if name not in dropped]
    if GENERATION_CONFIG in copied:
        fault = generation_config_fault(source.path(GENERATION_CONFIG))
        if fault:
            copied.remove(GENERATION_CONFIG)
            dropped[GENERATION_CONFIG] = fault
    return AuxFiles(copied=tuple(sorted(copied)), dropped=dict(sorted(dropped.items())))


def generation_config_fault(path: Path) -> str | None:
    """Return why a generation_config.json must not be copied, None when it may be."""
    try:
        config = load_object(path, GENERATION_CONFIG, _MAX_JSON)
    except AdaconvertError as error:
        return f"is not usable: {error.message}"
    if "custom_generate" in config:
        return f"asks for code: custom_generate is '{escape(config['custom_generate'])}'"
    return None


def _reason(name: str) -> str | None:
    if "/" in name:
        return "lies in a nested folder"
    for pattern, reason in _NEVER:
        if pattern.fullmatch(name):
            return reason
    return None if _COPIED.fullmatch(name) else "is not a known part of a checkpoint"
