"""The models a comparison runs: dense and converted, of text and of images, on the same inputs.

Shapes: B sequences or images, S positions, V outputs per position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaconvert.arch.exits import exits_of, is_taken
from adaconvert.arch.null_experts import holds_nulls
from adaconvert.errors import AdaconvertError, VerificationError
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.layerwise.build import (
    KeyReport,
    attention_of,
    causal_class,
    find_blocks,
    load,
    report_of,
)
from adaconvert.layerwise.configs import load_config
from adaconvert.layerwise.quiet import quiet
from adaconvert.layerwise.stored import ReadCount, stored_tensors
from adaconvert.modeling.adaptive_schema import routed_specs
from adaconvert.verification.tokens import Probe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

_SEED = 20_240_607
_IMAGES = 4
#: outputs that are compared where a model has no logits.
_OUTPUTS = ("start_logits", "end_logits", "prediction_logits", "reconstruction")


def is_adaptive(source: Source) -> bool:
    """Return whether a checkpoint holds split networks that the adaptive runtime runs."""
    return isinstance(source.config.get("adaptive"), dict)


def is_nulled(source: Source) -> bool:
    """Return whether a checkpoint is a mixture with null experts."""
    return is_adaptive(source) and holds_nulls(source.config["adaptive"])


def is_split(source: Source) -> bool:
    """Return whether something in a checkpoint chooses among experts; adapters do not."""
    return is_adaptive(source) and bool(routed_specs(_adaptive(source)))


def is_adapted(source: Source) -> bool:
    """Return whether a checkpoint has routed adapters."""
    if not is_adaptive(source):
        return False
    slots = [slots.get("linear") or {} for slots in _adaptive(source)["sites"].values()]
    return any("adapters" in slot for slot in slots)


def has_exits(source: Source) -> bool:
    """Return whether a checkpoint has early exits."""
    return is_adaptive(source) and exits_of(_adaptive(source)) is not None


def takes_exits(source: Source) -> bool:
    """Return whether tokens may leave a checkpoint's model early as it is configured."""
    exits = exits_of(_adaptive(source)) if is_adaptive(source) else None
    return exits is not None and is_taken(exits)


def _adaptive(source: Source) -> Any:
    return source.config["adaptive"]


def is_text(source: Source) -> bool:
    """Return whether its model reads token ids."""
    from adaconvert.arch.registry import describe

    return describe(source.config, source.tensors.keys()).kind != "vision"


def load_reference(source: Source) -> PreTrainedModel:
    """Return the source in float32; a split one with every expert on, one with null experts or
    routed adapters as it is configured, one with early exits so that none is taken.

    A stock one is built from its validated files and its sanitised config.

    Raises:
        VerificationError: weights are missing or of another shape.
    """
    if is_adaptive(source):
        model, keys = load_target(source)
        if is_split(source) and not is_nulled(source):
            _set_all(model)
        if takes_exits(source):
            never_leave(model)
    else:
        config = load_config(source)
        model, keys = load(_stock_class(source), config, stored_tensors(source, ReadCount()))
    if keys.missing or keys.mismatched:
        names = ", ".join([*keys.missing, *keys.mismatched][:5])
        raise VerificationError(
            f"weights are missing or of another shape: {escape(names)}",
            where=escape(source.label),
        )
    return model


def _set_all(model: Any) -> None:
    model.set_select("all")


def never_leave(model: Any) -> None:
    """Let no token leave a model with early exits."""
    model.set_exits(thresholds=None)


def _stock_class(source: Source) -> type[PreTrainedModel]:
    """Return the stock class of a source: that of a language model, or the one it names."""
    import transformers

    from adaconvert.arch.registry import describe

    spec = describe(source.config, source.tensors.keys())
    if spec.kind == "decoder":
        return causal_class(load_config(source))
    found: type[PreTrainedModel] = getattr(transformers, spec.architecture)
    return found


def load_target(target: Source, *, dtype: str = "float32") -> tuple[PreTrainedModel, KeyReport]:
    """Return the target as transformers loads it from its folder, and what it said of names.

    A stock target is loaded by stock transformers, an adaptive one by the installed runtime; no
    code of the folder runs.

    Raises:
        VerificationError: it is refused.
    """
    import torch

    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "local_files_only": True,
        "use_safetensors": True,
        "output_loading_info": True,
    }
    try:
        with quiet():
            model, info = _loader(target, options)
    except MemoryError:
        raise
    except Exception as error:
        # whatever it raises, the verdict is the same: a user could not load it either
        raise VerificationError(
            f"transformers cannot load it: {escape(str(error), 400)}"
        ) from error
    return model.eval().requires_grad_(False), report_of(info)


def _loader(target: Source, options: dict[str, Any]) -> Any:
    """Return the model and transformers' report on it."""
    from transformers import AutoModelForCausalLM

    where = str(target.root)
    if is_adaptive(target):
        from adaconvert.modeling.loading import model_class

        made: Any = model_class(target.config)
        attention = attention_of(made)
        return made.from_pretrained(where, attn_implementation=attention, **options)
    stock: Any = _stock_class(target)
    attention = attention_of(stock)
    if stock is causal_class_or_none(target):
        stock = AutoModelForCausalLM
        options = {**options, "trust_remote_code": False}
    return stock.from_pretrained(where, attn_implementation=attention, **options)


def causal_class_or_none(source: Source) -> type[PreTrainedModel] | None:
    """Return the stock language-model class of a source, None when its family has none."""
    try:
        return causal_class(load_config(source))
    except AdaconvertError:
        return None


def inputs_of(model: PreTrainedModel, probe: Probe) -> dict[str, torch.Tensor]:
    """Return what a model is run on: the probe's tokens, or images drawn once and for all."""
    import numpy
    import torch

    if model.main_input_name != "pixel_values":
        return {"input_ids": probe.tensor()}
    config: Any = model.config
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    generator = numpy.random.Generator(numpy.random.Philox(_SEED))
    drawn = generator.standard_normal((_IMAGES, config.num_channels, height, width), "float32")
    return {"pixel_values": torch.from_numpy(drawn)}


def run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return what a model gives for inputs, float32 [B, S, V]: its logits where it has them."""
    import torch

    runner: Any = model
    extra = {"use_cache": False} if model.can_generate() else {}
    with torch.no_grad():
        outputs = runner(**inputs, **extra)
    found = getattr(outputs, "logits", None)
    if found is None:
        several = [outputs[name] for name in _OUTPUTS if name in outputs]
        found = torch.cat([t.flatten(1) for t in several], dim=1) if several else outputs[0]
    found = found.float()
    return found if found.dim() == 3 else found.reshape(len(found), 1, -1)


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """Return the list of transformer blocks, of encoders too.

    Raises:
        OptionError: there is not exactly one list of that length.
    """
    from torch import nn

    depth = model.config.num_hidden_layers
    backbone: Any = model.base_model
    nested = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    return nested[0] if len(nested) == 1 else find_blocks(model)
