"""A checkpoint that is ready to be measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError
from adaconvert.evaluate.options import EvaluateOptions
from adaconvert.io.names import escape
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    from adaconvert.io.source import Source

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_CLASSIFIER = "ForSequenceClassification"
_IMAGES = "ForImageClassification"


def is_classifier(architecture: str) -> bool:
    """Return whether a model of this class makes one prediction of a whole text, or of an image."""
    return architecture.endswith((_CLASSIFIER, _IMAGES))


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that is ready to run.

    Attributes:
        source: its files.
        model: transformers model on its device.
        kind: "causal", "classifier" or "image classifier".
    """

    source: Source
    model: Any
    kind: str


def load(where: str, options: EvaluateOptions, device: str) -> Loaded:
    """Return a checkpoint ready to run; no code of it runs.

    Raises:
        OptionError: it is of a kind that is not measured.
        SourceError: it is damaged.
    """
    from adaconvert.io.source import Source
    from adaconvert.modeling.loading import load_model

    source = Source.open(where, revision=options.revision)
    kind = _kind_of(source.raw_config)
    with quiet():
        model = load_model(source.root, dtype=options.dtype, device=device, use_safetensors=True)
    return Loaded(source=source, model=model, kind=kind)


def _kind_of(config: Mapping[str, object]) -> str:
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else _CAUSAL[0]
    if name.endswith(_CAUSAL):
        return "causal"
    if name.endswith(_CLASSIFIER):
        return "classifier"
    if name.endswith(_IMAGES):
        return "image classifier"
    raise OptionError(
        "models of this kind are not measured",
        where="config.json: architectures",
        expected=f"...{', ...'.join((*_CAUSAL, _CLASSIFIER, _IMAGES))}",
        found=escape(name, 80),
    )
