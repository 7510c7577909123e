"""Classes of labelled data, as numbers or by the names a config lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from adaconvert.errors import DataError, OptionError
from adaconvert.io.names import escape, listing

#: what holds the class of a text or an image unless another field is named.
LABEL_FIELD: Final = "label"


def check_single_label(config: Any, what: str = "a text") -> None:
    """Return only when a model chooses one of several classes.

    Args:
        config: its transformers config.
        what: one of what it classifies, for the message.

    Raises:
        OptionError: it gives several labels at once, or a number.
    """
    kind = getattr(config, "problem_type", None)
    if kind in ("regression", "multi_label_classification") or config.num_labels < 2:
        raise OptionError(
            f"labels are compared with what classifiers choose that give one label {what}",
            where="config.json",
            found=kind or f"{config.num_labels} labels",
        )


def label_of(value: object, config: Any, where: str) -> int:
    """Return the class a label means: a number, or a name the config lists.

    Raises:
        DataError: it is neither.
    """
    by_name: Mapping[str, int] = config.label2id or {}
    if isinstance(value, str) and value in by_name:
        return int(by_name[value])
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < config.num_labels:
        return value
    raise DataError(
        "is no label of the model",
        where=where,
        expected=f"0 to {config.num_labels - 1}, or one of {listing(list(by_name), 12)}",
        found=escape(value, 60),
    )
