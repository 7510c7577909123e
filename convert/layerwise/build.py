"""Models built by transformers from weights we hand over, nothing missing and nothing left over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaconvert.errors import OptionError, VerificationError
from adaconvert.io.names import escape
from adaconvert.layerwise.quiet import quiet

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReport:
    """What transformers said about the names of a checkpoint it loaded; empty when all is well.

    Attributes:
        missing: weights of the model that no file holds; they are random.
        unexpected: stored tensors that the model has no place for.
        mismatched: weights stored with another shape.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.mismatched)

    def __or__(self, other: KeyReport) -> KeyReport:
        """Return both reports as one, each name once."""
        return KeyReport(
            missing=_union(self.missing, other.missing),
            unexpected=_union(self.unexpected, other.unexpected),
            mismatched=_union(self.mismatched, other.mismatched),
        )


def _union(left: Sequence[str], right: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({*left, *right}))


def report_of(info: Mapping[str, Any]) -> KeyReport:
    """Return transformers' loading info; a mismatch is written "name [stored] [expected]"."""
    mismatched = [
        " ".join([key[0], *(str(list(shape)) for shape in key[1:])])
        if isinstance(key, tuple)
        else key
        for key in info.get("mismatched_keys", ())
    ]
    return KeyReport(
        missing=tuple(sorted(info.get("missing_keys", ()))),
        unexpected=tuple(sorted(info.get("unexpected_keys", ()))),
        mismatched=tuple(sorted(mismatched)),
    )


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the stock language-model class of a configuration; the adaptive one over it where the
    configuration is adaptive.

    Raises:
        OptionError: the family has none.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, config, "is no language model: it has no logits")


def image_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that classifies images, as `causal_class` does.

    Raises:
        OptionError: the family has none.
    """
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    return _class_in(MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, config, "classifies no images")


def _class_in(mapping: Any, config: PreTrainedConfig, otherwise: str) -> type[PreTrainedModel]:
    is_adaptive = getattr(config, "adaptive", None) is not None
    stock = type(config).__bases__[0] if is_adaptive else type(config)
    try:
        found: Any = mapping[stock]
    except KeyError:
        raise OptionError(f"model_type {escape(config.model_type)} {otherwise}") from None
    chosen: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
    if not is_adaptive:
        return chosen
    from adaconvert.modeling import modeling_adaptive

    own: type[PreTrainedModel] = getattr(modeling_adaptive, f"Adaptive{chosen.__name__}")
    return own


def attention_of(model_class: type[PreTrainedModel]) -> str:
    """Return the attention implementation to ask for: the default, never what a config names."""
    return "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"


def load(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: Mapping[str, object],
    *,
    dtype: str = "float32",
) -> tuple[PreTrainedModel, KeyReport]:
    """Return a model in evaluation mode that holds `tensors`, and the report on their names.

    Args:
        model_class: stock class, or a subclass of one.
        config: its configuration; not changed.
        tensors: on-disk names to tensors, or to `StoredTensor`s.
        dtype: what every weight is cast to, a torch name.

    Raises:
        VerificationError: transformers refuses the weights.
    """
    import torch

    loader: Any = model_class
    try:
        with quiet():
            model, info = loader.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                dtype=getattr(torch, dtype),
                attn_implementation=attention_of(model_class),
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
            )
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise VerificationError(
            f"transformers cannot load the weights: {escape(str(error))}"
        ) from error
    return model.eval().requires_grad_(False), report_of(info)


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of transformer blocks of a decoder or of a vision model.

    Raises:
        OptionError: its backbone does not hold exactly one list of that length.
    """
    from torch import nn

    depth = model.config.num_hidden_layers
    backbone: Any = model.base_model
    found = [m for m in backbone.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        raise OptionError(
            f"model_type {escape(model.config.model_type)} does not keep its blocks in one list, "
            "so it cannot be run block by block"
        )
    return found[0]
