"""config.json of a source: read strictly, freed of all that could load code or tell secrets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from adaconvert.errors import SourceError
from adaconvert.io.names import escape, listing
from adaconvert.io.strict_json import load_object

CONFIG_FILE = "config.json"
MAX_CONFIG_BYTES = 16_000_000

#: keys that make transformers or diffusers fetch or run something; dropped with a note
CODE_KEYS = frozenset(
    [
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "auto_map",
        "custom_pipelines",
        "custom_generate",
        "kernel_config",
        "trust_remote_code",
        "use_kernels",
    ]
)
#: keys that hold a credential, or where the checkpoint lay on somebody's disk
PRIVATE_KEYS = frozenset(
    [
        "_name_or_path",
        "access_token",
        "api_key",
        "hf_token",
        "password",
        "secret",
        "token",
        "use_auth_token",
    ]
)
_PRIVATE_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}"
    r"|[\w.+-]+@[\w-]+\.[\w.]+"
    r"|^(?:/|~|file:|[A-Za-z]:[\\/]|\\\\)"
)
_QUANTISED_KEYS = ("quantization_config", "compression_config")
_NESTED_KEYS = ("text_config", "language_config", "llm_config", "thinker_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """config.json as read and as used.

    Attributes:
        raw: as read.
        clean: without code-bearing and private keys.
        notes: what was dropped.
    """

    raw: dict[str, object]
    clean: dict[str, object]
    notes: tuple[str, ...]


def read_config(root: Path) -> SourceConfig:
    """Return the config of the checkpoint in `root`.

    Raises:
        SourceError: it is missing or damaged, or describes a quantised or a composite model.
        ResourceError: it may not be read.
    """
    raw = load_object(root / CONFIG_FILE, CONFIG_FILE, MAX_CONFIG_BYTES)
    _refuse_quantised(raw)
    _refuse_nested(raw)
    clean, code, private = sanitise(raw)
    notes = []
    if code:
        notes.append(f"{CONFIG_FILE}: dropped {listing(code)} (could load code)")
    if private:
        notes.append(
            f"{CONFIG_FILE}: dropped {listing(private)} (private to the machine it was made on)"
        )
    return SourceConfig(raw=raw, clean=clean, notes=tuple(notes))


def sanitise(raw: dict[str, object]) -> tuple[dict[str, object], list[str], list[str]]:
    """Return `raw` without code-bearing and private entries, and the dotted keys of both."""
    clean: dict[str, object] = {}
    code: list[str] = []
    private: list[str] = []
    for key, value in raw.items():
        if key in CODE_KEYS:
            code.append(key)
        elif key in PRIVATE_KEYS or (isinstance(value, str) and _PRIVATE_VALUE.search(value)):
            private.append(key)
        elif isinstance(value, dict):
            clean[key], inner_code, inner_private = sanitise(value)
            code += [f"{key}.{inner}" for inner in inner_code]
            private += [f"{key}.{inner}" for inner in inner_private]
        else:
            clean[key] = value
    return clean, code, private


def _refuse_quantised(raw: dict[str, object]) -> None:
    for key in _QUANTISED_KEYS:
        value = raw.get(key)
        if not value:
            continue
        method = value.get("quant_method") if isinstance(value, dict) else None
        raise SourceError(
            f"the checkpoint is quantised with {escape(method or 'an unnamed method')}",
            where=f"{CONFIG_FILE}: {key}",
            hint="Dequantise it first, or start from the original float checkpoint.",
        )


def _refuse_nested(raw: dict[str, object]) -> None:
    for key in _NESTED_KEYS:
        if isinstance(raw.get(key), dict):
            kind = escape(raw.get("model_type", "unknown"))
            raise SourceError(
                f"model_type '{kind}' wraps a language model with other parts: not supported",
                where=f"{CONFIG_FILE}: {key}",
                expected="the config of one plain model",
                hint="Save the language model alone (in transformers: its language_model part).",
            )
