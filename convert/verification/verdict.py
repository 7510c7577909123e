"""What a conversion promised, and whether the measurement keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adaconvert.errors import VerificationError
from adaconvert.io.manifest import MANIFEST_FILE
from adaconvert.io.names import escape
from adaconvert.io.source import Source
from adaconvert.planning.ops import Exactness
from adaconvert.verification.equivalence import Equivalence

#: largest difference of a logit that float32 arithmetic in another order explains, as a fraction of
#: the largest.
EXACT = 1e-5
#: the same where the stored dtype rounds computed tensors. A weight that is a product or a sum of
#: stored weights is rounded once when it is written, by up to 2**-9 (bfloat16) or 2**-12 (float16)
#: of its value; the bounds are about ten times that, room for the errors of all layers to add up.
#: They tell rounding from a mistake, no more, which is why the report always shows the number
#: itself.
ROUNDED = {"BF16": 0.03, "F16": 0.004}
KINDS = ("exact", "exact-fp32", "approximate", "needs-training")
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the promise is kept.

    Attributes:
        kind: what was promised, one of KINDS, or "unknown".
        bound: largest relative difference the promise allows, None when it allows any.
        fault: why it is not kept, None when it is.
    """

    kind: str
    bound: float | None
    fault: str | None = None


def promised(manifest: Mapping[str, object]) -> Exactness | None:
    """Return the promise a manifest records, None when it records none.

    Raises:
        VerificationError: it is of no known kind.
    """
    entry = manifest.get("exactness")
    if not isinstance(entry, dict) or "kind" not in entry:
        return None
    if entry["kind"] not in KINDS:
        raise VerificationError(
            f"exactness is of no known kind: {escape(entry['kind'])}",
            where=MANIFEST_FILE,
            expected=" or ".join(KINDS),
        )
    return Exactness(kind=str(entry["kind"]), why=str(entry.get("why", "")))


def bound_of(exactness: Exactness | None, target: Source) -> float | None:
    """Return the largest relative difference the promise allows, None when it allows any.

    A split network is the dense one whenever every expert runs, which is what is compared, so the
    bound holds for it however few experts are configured.
    """
    if exactness is not None and exactness.kind == "approximate" and _only_split(target):
        return EXACT
    if exactness is None or exactness.kind not in {"exact", "exact-fp32"}:
        return None
    if exactness.kind == "exact":
        return EXACT
    stored = {ref.dtype for ref in target.tensors.values()}
    return max([EXACT, *(bound for dtype, bound in ROUNDED.items() if dtype in stored)])


def _only_split(target: Source) -> bool:
    """Tell whether a checkpoint is adaptive and nothing but its feed-forward networks is."""
    adaptive = target.config.get("adaptive")
    sites = adaptive.get("sites") if isinstance(adaptive, dict) else None
    return isinstance(sites, dict) and all(set(slots) == {"ffn"} for slots in sites.values())


def judge(exactness: Exactness | None, bound: float | None, found: Equivalence) -> Verdict:
    """Return whether a measurement keeps a promise.

    A logit that is no number where the source's is one breaks every promise, and so does a source
    that gives none at all.
    """
    kind = "unknown" if exactness is None else exactness.kind
    return Verdict(kind=kind, bound=bound, fault=_fault(bound, found))


def _fault(bound: float | None, found: Equivalence) -> str | None:
    if found.keys:
        names = (*found.keys.missing, *found.keys.unexpected, *found.keys.mismatched)
        return (
            "transformers reports missing, unexpected or mismatched tensors: "
            f"{', '.join(escape(name) for name in names[:5])}"
        )
    if found.logits.silent:
        return (
            "not one logit of the source is a number, so there is nothing to compare with: repair "
            "it, or convert it unverified with --no-verify"
        )
    if not found.logits.finite:
        what = "other logits are no numbers in the target than in the source"
        return _with_blame(what, found)
    if bound is None or found.close:
        return None
    what = (
        f"the largest difference of a logit is {found.logits.max_abs_diff:.3g}, "
        f"{found.relative:.3g} of the largest logit; expected at most {bound:g}"
    )
    if found.relative <= bound:
        what = (
            f"{found.logits.disputed} of {found.logits.tokens} tokens get another most likely "
            "successor although the source's choice is clear"
        )
    return _with_blame(what, found)


def _with_blame(what: str, found: Equivalence) -> str:
    blame = found.blame()
    return f"{what}; {blame}" if blame else what


def run_dtype(target: Source) -> str:
    """Return the torch name of the dtype a user runs it in: config.json's or that of most bytes."""
    stated = target.config.get("dtype", target.config.get("torch_dtype"))
    if stated in _TORCH_NAMES.values():
        return str(stated)
    sizes: dict[str, int] = {}
    for ref in target.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    return _TORCH_NAMES.get(max(sizes, key=sizes.__getitem__), "float32")
