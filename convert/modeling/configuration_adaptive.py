"""Configurations of adaptive models: the stock configuration plus `adaptive`.

`Adaptive<Base>Config` exists for every configuration class of transformers; it is made when asked
for, so a new family needs no code here.
"""

from __future__ import annotations

from typing import Any

import transformers

_MADE: dict[str, type] = {}
_PREFIX = "Adaptive"


def _make(name: str) -> type:
    base = getattr(transformers, name.removeprefix(_PREFIX), None)
    if base is None or not issubclass(base, transformers.PreTrainedConfig):
        raise AttributeError(f"transformers has no configuration {name.removeprefix(_PREFIX)}")
    body: dict[str, Any] = {
        "__module__": __name__,
        "__qualname__": name,
        "__annotations__": {"adaptive": "dict | None"},
        "adaptive": None,
        "model_type": f"adaptive_{base.model_type}",
    }
    if getattr(base, "base_model_ep_plan", None):
        # experts elsewhere are told by their index, and so are slots without an expert
        body["base_model_ep_plan"] = None
    plan = getattr(base, "base_model_tp_plan", None)
    if plan:
        # experts are runs of neurons: splitting the matrices over devices would cut them
        networks = (".mlp", ".block_sparse_moe")
        kept = {k: v for k, v in plan.items() if not any(name in k for name in networks)}
        body["base_model_tp_plan"] = kept
    made = type(name, (base,), body)
    made.register_for_auto_class("AutoConfig")  # type: ignore[attr-defined]
    return made


def made_config(name: str) -> type:
    """Return the configuration class of this name; the same object every time.

    Raises:
        AttributeError: transformers has no such configuration.
    """
    if name not in _MADE:
        _MADE[name] = _make(name)
    return _MADE[name]


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX) and name.endswith("Config"):
        return made_config(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
