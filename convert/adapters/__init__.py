"""Routed adapters as a PEFT method, `peft_type: MOLORA`; needs peft.

`import adaconvert.auto`, or the use of a name from here, makes PEFT and transformers know it:
`get_peft_model`, `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM`, `load_adapter` and
`AutoModelForCausalLM.from_pretrained` of an adapter folder work after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["MoloraConfig", "MoloraLinear", "MoloraModel", "set_routing"]

if TYPE_CHECKING:
    from adaconvert.adapters.config import MoloraConfig
    from adaconvert.adapters.layer import MoloraLinear
    from adaconvert.adapters.model import MoloraModel, set_routing


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'adaconvert.adapters' has no attribute {name!r}")
    from adaconvert.adapters import config, layer, model
    from adaconvert.adapters.register import register

    register()
    found = {
        "MoloraConfig": config.MoloraConfig,
        "MoloraLinear": layer.MoloraLinear,
        "MoloraModel": model.MoloraModel,
        "set_routing": model.set_routing,
    }
    return found[name]
