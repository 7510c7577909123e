"""PEFT's registry gets the method MOLORA.

PEFT keeps its methods in an enumeration that is closed; loaders of PEFT and transformers want a
member of it, not a string. So the member is added in place, once.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from adaconvert.errors import ResourceError

NAME = "MOLORA"


def register() -> None:
    """Make the method known to PEFT; again is harmless.

    Raises:
        ResourceError: the installed PEFT has a method of this name that is not ours.
    """
    known = PeftType.__members__.get(NAME)
    if known is None:
        known = _extend(NAME)
    elif known not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise _taken()
    from adaconvert.adapters.config import MoloraConfig
    from adaconvert.adapters.model import MoloraModel

    found = PEFT_TYPE_TO_CONFIG_MAPPING.get(known)
    if found is None:
        register_peft_method(name=NAME.lower(), config_cls=MoloraConfig, model_cls=MoloraModel)
    elif found is not MoloraConfig:
        raise _taken()


def _extend(name: str) -> PeftType:
    """Return the new member of the enumeration, known by name and by value."""
    kind = PeftType
    member = str.__new__(kind, name)
    member._name_, member._value_ = name, name
    # before it is known as a member: those cannot be assigned
    type.__setattr__(kind, name, member)
    kind._member_names_.append(name)
    kind._member_map_[name] = member
    kind._value2member_map_[name] = member
    # what `in` looks at from Python 3.12 on
    values = getattr(kind, "_hashable_values_", None)
    if values is not None:
        values.append(name)
    return member


def _taken() -> ResourceError:
    return ResourceError(
        f"the installed PEFT has a method {NAME} of its own",
        where="peft",
        hint="Adapter folders of adaconvert need a PEFT without one; install an older PEFT.",
    )
