"""The check that a block built alone is the block the whole model has at that place.

A one-block configuration is cut out of the whole one by rules; a family whose rules we do not know
would silently get another window, rope or FFN. Both modules are stock, so comparing their classes,
sizes and plain settings catches that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaconvert.errors import OptionError

if TYPE_CHECKING:
    from torch import nn

_PLAIN = (bool, int, float, str, type(None))
#: settings that differ because the block stands elsewhere or holds weights, not because it computes
#: another thing.
_POSITION = frozenset({"layer_idx", "training", "layer_id", "adaptive_path"})


def check_likeness(alone: nn.Module, within: nn.Module, index: int) -> None:
    """Raise unless both modules have the same parts, sizes and settings.

    Args:
        alone: the block that was built by itself.
        within: block `index` of the whole model, without weights.
        index: for the message.

    Raises:
        OptionError: they differ.
    """
    for name, difference in _differences(alone, within):
        raise OptionError(
            f"block {index} cannot be run alone: {name or 'the block'} {difference}",
            hint="Raise --memory so that the whole model fits.",
        )


def _differences(alone: nn.Module, within: nn.Module) -> list[tuple[str, str]]:
    ours, theirs = dict(alone.named_modules()), dict(within.named_modules())
    found = [(name, "is in only one of both") for name in sorted(ours.keys() ^ theirs.keys())]
    for name in ours.keys() & theirs.keys():
        if type(ours[name]) is not type(theirs[name]):
            found.append((name, "is of another class"))
        elif _sizes(ours[name]) != _sizes(theirs[name]):
            found.append((name, "has other sizes"))
        elif _settings(ours[name]) != _settings(theirs[name]):
            found.append((name, "has other settings"))
    return sorted(found)


def _sizes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}


def _settings(module: nn.Module) -> dict[str, object]:
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _POSITION and isinstance(value, _PLAIN)
    }
