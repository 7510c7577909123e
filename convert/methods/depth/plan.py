"""The plan of a checkpoint without some of its blocks: every other tensor as it is, renamed."""

from __future__ import annotations

from collections.abc import Iterator

from adaconvert.arch import depth
from adaconvert.errors import SourceError
from adaconvert.io.names import escape
from adaconvert.methods.depth.choose import kept_of, share_without
from adaconvert.methods.moefy.plan import dropped as unread
from adaconvert.methods.moefy.plan import target, whole
from adaconvert.methods.sources import Described
from adaconvert.planning.accounting import check_plan
from adaconvert.planning.ops import Drop, Exactness, Plan, TargetTensor

METHOD = "depth"


def drop_plan(
    options: dict[str, object],
    item: Described,
    gone: tuple[int, ...],
    *,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the checked plan of the stock checkpoint without some blocks.

    Args:
        options: resolved options, JSON values only.
        item: the model.
        gone: the blocks that go, ascending.
        notes: what the user should know.

    Raises:
        SourceError: the blocks that stay could not say in config.json what they compute.
    """
    kept = kept_of(item.spec, gone)
    why = depth.refusal(item.spec, kept)
    if why is not None:
        raise SourceError(
            f"cannot lose blocks {_listed(gone)}: {why}",
            where=f"{escape(item.source.label)}/config.json",
            hint="Drop others: --drop names them.",
        )
    plan = Plan(
        method=METHOD,
        options=options,
        sources=(item.source.fingerprint,),
        targets=tuple(_targets(item, kept)),
        drops=(*unread(item), *_drops(item, gone)),
        config=depth.config_without(item.spec, kept),
        exactness=Exactness(
            kind="approximate",
            why=f"{len(gone)} of {item.spec.layers} blocks are gone; the others compute what they "
            "did",
        ),
        notes=(_says(item, gone), *notes),
    )
    check_plan(plan, [item.source.tensors])
    return plan


def _targets(item: Described, kept: tuple[int, ...]) -> Iterator[TargetTensor]:
    """Yield every tensor that stays, under its new name."""
    names = depth.names_without(item.spec, kept)
    for tensor in depth.tensors_of(item.spec, kept):
        ref = item.source.tensors.get(tensor.name)
        if ref is not None:
            layer = None if tensor.layer is None else kept.index(tensor.layer)
            yield target(names[tensor.name], ref.dtype, ref.shape, whole(ref), layer)


def _drops(item: Described, gone: tuple[int, ...]) -> Iterator[Drop]:
    """Yield the tensors of the blocks that go."""
    for tensor in item.spec.tensors:
        if tensor.layer in gone and tensor.name in item.source.tensors:
            reason = f"of block {tensor.layer}, which was dropped"
            yield Drop(source=0, tensor=tensor.name, reason=reason)


def _says(item: Described, gone: tuple[int, ...]) -> str:
    blocks = f"{'block' if len(gone) == 1 else 'blocks'} {_listed(gone)}"
    is_image = item.spec.kind == "vision"
    what = "an image costs" if is_image else "a token of a text of 512 tokens costs"
    return (
        f"drops {blocks} of 0 to {item.spec.layers - 1}: {what} "
        f"{share_without(item.spec, gone):.3f} of the source's FLOPs"
    )


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))
