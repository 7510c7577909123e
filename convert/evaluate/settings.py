"""Settings of a model's knobs that `evaluate` repeats its measurements at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from adaconvert.errors import OptionError
from adaconvert.io.names import escape

#: the value each selection rule takes.
RULES: Mapping[str, str | None] = {
    "all": None,
    "top-k": "k",
    "dynamic-k": "tau",
    "threshold": "threshold",
    "top-p": "p",
    "null": "bias",
}
#: rules that use what the model holds where they are given no value.
_OWN_VALUE: Final = frozenset({"null"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One position of the knobs.

    Attributes:
        label: what the report calls it.
        compute: argument of `set_compute`, None for another kind of setting.
        select: arguments of `set_select`, empty for another kind of setting.
    """

    label: str
    compute: float | None = None
    select: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stored(self) -> bool:
        """Return whether this is what the checkpoint does by itself."""
        return self.compute is None and not self.select

    @contextmanager
    def applied(self, model: Any) -> Iterator[None]:
        """Run the body at this setting.

        Raises:
            OptionError: the model cannot do it; says what it can.
        """
        if self.stored:
            yield
            return
        try:
            if self.compute is not None:
                held = model.set_compute(self.compute)
            else:
                held = model.set_select(**self.select)
        except ValueError as error:
            option = "--set-compute" if self.compute is not None else "--select"
            raise OptionError(str(error), where=option) from error
        with held:
            yield


STORED = Setting(label="as stored")


def settings_of(
    compute: float | Sequence[float], select: str | Sequence[str]
) -> tuple[Setting, ...]:
    """Return the settings asked for, or the stored one alone when none is.

    Args:
        compute: fractions of the reference's FLOPs; one or several.
        select: texts such as "rule=top-k,k=8"; one or several.

    Raises:
        OptionError: a text is malformed, or a setting is given twice.
    """
    compute = (compute,) if isinstance(compute, int | float) else compute
    select = (select,) if isinstance(select, str) else select
    found = [Setting(label=f"compute {value:g}", compute=value) for value in compute]
    found += [
        Setting(label=text.replace("rule=", "", 1), select=parse_select(text)) for text in select
    ]
    labels = [setting.label for setting in found]
    for label in labels:
        if labels.count(label) > 1:
            raise OptionError("is given twice", where=f"setting '{escape(label, 60)}'")
    return tuple(found) or (STORED,)


def parse_select(text: str) -> dict[str, Any]:
    """Return the arguments of `set_select` that a text such as "rule=top-k,k=8" means.

    Raises:
        OptionError: it is malformed, names an unknown rule, or lacks the rule's value.
    """
    where = f"--select '{escape(text, 60)}'"
    pairs = [part.strip().partition("=") for part in text.split(",")]
    if any(not sign for _, sign, _ in pairs):
        raise OptionError("is malformed", where=where, expected="rule=NAME,VALUE=NUMBER")
    given = {name.strip(): value.strip() for name, _, value in pairs}
    rule = given.pop("rule", None)
    if rule is None or rule not in RULES:
        raise OptionError("has no known rule", where=where, expected=f"rule={'|'.join(RULES)}")
    name = RULES[rule]
    wanted = set() if name is None or (rule in _OWN_VALUE and not given) else {name}
    if set(given) != wanted or len(pairs) != 1 + len(wanted):
        also = " or alone" if rule in _OWN_VALUE else ""
        raise OptionError(
            "does not fit its rule",
            where=where,
            expected=f"rule={rule}" + (f",{name}=NUMBER{also}" if name else " alone"),
        )
    if name is None or name not in given:
        return {"rule": rule}
    return {"rule": rule, name: _number(given[name], whole=name == "k", where=where)}


def _number(text: str, *, whole: bool, where: str) -> int | float:
    try:
        number = int(text) if whole else float(text)
        if math.isfinite(number):
            return number
        raise ValueError(text)
    except ValueError:
        raise OptionError(
            "is malformed",
            where=where,
            expected="a whole number" if whole else "a number",
            found=f"'{escape(text, 40)}'",
        ) from None


def check_settings(settings: Sequence[Setting], model: Any) -> None:
    """Return only when the model can be set to every one of `settings`.

    Raises:
        OptionError: it has no knobs, or one is out of reach.
    """
    if not hasattr(model, "set_compute") and not all(setting.stored for setting in settings):
        raise OptionError(
            "the checkpoint has no compute knob",
            where="--set-compute and --select",
            expected="an adaptive checkpoint",
            hint="Make one with `adaconvert moefy`.",
        )
    for setting in settings:
        with setting.applied(model):
            pass
