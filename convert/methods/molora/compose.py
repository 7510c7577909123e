"""Existing LoRA adapters as the experts of a mixture: stacked, padded and held to one base.

Expert e computes s_e B_e A_e x. One scaling per expert serves all linears; where an adapter's own
differs from linear to linear, the rest of it is in B.
Shapes: n inputs and m outputs of a linear, E adapters, R the largest rank.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaconvert.arch.adapter_targets import near_names, tails
from adaconvert.arch.adapters import block_of, is_named, linears, outer_linears
from adaconvert.errors import OptionError, SourceError
from adaconvert.io.names import escape, listing
from adaconvert.methods.molora.base_at_hand import fingerprint_at
from adaconvert.methods.molora.lora_folder import LoraFolder
from adaconvert.methods.sources import Described

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, numpy.dtype[Any]]

#: what makes rows of a linear's router, [E, n], from its path, A [E, R, n] and B [E, m, R].
Rows = Callable[[str, "Array", "Array"], "Array"]
#: roles of linears whose rows or columns are neurons.
_NEURONS = ("gate", "up", "gate_up", "down")
A, B, ROUTER = "adapters.a", "adapters.b", "router.weight"


def key_of(path: str, name: str) -> str:
    """Return the key of a fitted tensor: `A`, `B` or `ROUTER` of a linear."""
    return f"molora.{path}.{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """Adapters beside each other.

    Attributes:
        adapters: in the order of the experts.
        sizes: path -> (n, m) of every linear that one of them adapts, in the order of the modules.
        rank: R.
        scaling: s of each expert.
        mean: the mean of all A and of all B is taken off each (GenKnowSub).
        notes: what the user should know.
    """

    adapters: tuple[LoraFolder, ...]
    sizes: Mapping[str, tuple[int, int]] = field(repr=False)
    rank: int
    scaling: tuple[float, ...]
    mean: bool = False
    notes: tuple[str, ...] = ()

    @property
    def paths(self) -> tuple[str, ...]:
        """Return the linears."""
        return tuple(self.sizes)

    @property
    def dtype(self) -> str:
        """Return the widest dtype of an adapter, as in a safetensors header; what is computed from
        factors is float32."""
        found = {adapter.dtype for adapter in self.adapters}
        factors = [len({m.scaling for m in one.modules.values()}) for one in self.adapters]
        computed = self.mean or max(factors) > 1
        return found.pop() if len(found) == 1 and not computed else "F32"

    def stack(self, path: str) -> tuple[Array, Array]:
        """Return the factors of all adapters at a linear in float32, A [E, R, n] and B [E, m, R];
        an adapter without that linear is zeros.

        Raises:
            SourceError: a file has changed, or a value is not finite.
            ResourceError: one may not be read.
        """
        import numpy

        inputs, outputs = self.sizes[path]
        count = len(self.adapters)
        a = numpy.zeros((count, self.rank, inputs), numpy.float32)
        b = numpy.zeros((count, outputs, self.rank), numpy.float32)
        for index, adapter in enumerate(self.adapters):
            module = adapter.modules.get(path)
            if module is not None:
                a[index, : module.rank], b[index, :, : module.rank] = adapter.read(path)
        if self.mean:
            a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        factors = [self._factor(index, path) for index in range(count)]
        return a, b * numpy.array(factors, numpy.float32)[:, None, None]

    def _factor(self, index: int, path: str) -> float:
        """Return what of an adapter's scaling at a linear is not in `scaling`."""
        module = self.adapters[index].modules.get(path)
        return 1.0 if module is None else module.scaling / self.scaling[index]

    def digest(self) -> str:
        """Return the sha256 of everything `stack` gives.

        Raises:
            SourceError: a file has changed.
            ResourceError: one may not be read.
        """
        facts = [*(adapter.digest() for adapter in self.adapters), list(self.sizes), self.mean]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def arrays(self, rows: Rows | None = None) -> Stacks:
        """Return the tensors of all linears by `key_of`, each computed when it is asked for.

        Args:
            rows: makes routers; None for none.
        """
        return Stacks(self, rows)


class Stacks(Mapping[str, "Array"]):
    """The fitted tensors of adapters; one linear is in memory at a time.

    Args:
        composed: the adapters.
        rows: makes routers; None for none.
    """

    def __init__(self, composed: Composed, rows: Rows | None) -> None:
        self._composed, self._rows = composed, rows
        names = (A, B) if rows is None else (A, B, ROUTER)
        self._keys = {key_of(p, name): (p, name) for p in composed.paths for name in names}
        self._last: tuple[str, tuple[Array, Array]] | None = None

    def __getitem__(self, key: str) -> Array:
        path, name = self._keys[key]
        a, b = self._stack(path)
        if name == ROUTER:
            assert self._rows is not None
            return self._rows(path, a, b)
        return a if name == A else b

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def _stack(self, path: str) -> tuple[Array, Array]:
        # the last one is kept: all tensors of a linear are asked for in turn
        last = self._last
        if last is None or last[0] != path:
            last = self._last = (path, self._composed.stack(path))
        return last[1]


def compose(
    adapters: Sequence[LoraFolder],
    item: Described,
    *,
    fingerprint: Callable[[Sequence[str]], str | None] | None = None,
    subtract_mean: bool = False,
) -> Composed:
    """Return adapters as the experts of one model.

    Args:
        adapters: opened, in the order of the experts.
        item: the model.
        fingerprint: of that model over linears, by path, as `adapters.fingerprint` makes it; None
            where adapters are not held to it.
        subtract_mean: take the mean of all A and of all B off each: PEFT's GenKnowSub
            (`ArrowConfig.use_gks`) with the adapters themselves in place of general ones.

    Raises:
        OptionError: none is given, or the mean is asked for of adapters of several ranks.
        SourceError: one is for another base.
    """
    if not adapters:
        raise OptionError("name one adapter or more", where="--from")
    notes: list[str] = []
    for adapter in adapters:
        notes += [*adapter.notes, *check_base(adapter, item, fingerprint)]
    ranks = sorted({m.rank for adapter in adapters for m in adapter.modules.values()})
    if subtract_mean:
        _check_mean(adapters, ranks)
    sizes = {
        path: linear.sizes
        for path, linear in linears(item.spec).items()
        if any(path in adapter.modules for adapter in adapters)
    }
    return Composed(
        adapters=tuple(adapters),
        sizes=sizes,
        rank=ranks[-1],
        scaling=tuple(_usual_scaling(adapter) for adapter in adapters),
        mean=subtract_mean,
        notes=(*notes, *_notes(adapters, sizes, ranks)),
    )


def check_base(
    adapter: LoraFolder,
    item: Described,
    fingerprint: Callable[[Sequence[str]], str | None] | None = None,
) -> list[str]:
    """Return what is not certain about an adapter being for a model, one sentence each.

    Args:
        adapter: opened.
        item: the model.
        fingerprint: as for `compose`.

    Raises:
        SourceError: it is for another one: a linear is not there or has other sizes, the recorded
            fingerprint differs, or both have names on the hub and these differ.
    """
    known = linears(item.spec)
    for path, module in adapter.modules.items():
        if path not in known:
            raise _no_linear(adapter, item, path)
        if module.sizes != known[path].sizes:
            raise SourceError(
                f"the adapter is for another base than {escape(item.source.label)}",
                where=f"{escape(adapter.name)}: '{escape(path)}'",
                expected=f"factors of {_sizes(known[path].sizes)}",
                found=_sizes(module.sizes),
            )
    paths, recorded = sorted(adapter.modules), adapter.settings.fingerprint
    if recorded is None:
        _check_order(adapter, item)
    if recorded is None and fingerprint is not None:
        recorded = fingerprint_at(adapter.settings.base, paths)
    if recorded is None or fingerprint is None:
        return _by_name(adapter, item)
    found = fingerprint(paths)
    if found is not None and found != recorded:
        raise SourceError(
            f"the adapter is for another base: the weights of {escape(item.source.label)} are not "
            "those it was made for",
            where=adapter.settings.where,
            expected=f"base_fingerprint {escape(recorded[:16])}",
            found=found[:16],
            hint=_meant(adapter),
        )
    return []


def _check_order(adapter: LoraFolder, item: Described) -> None:
    """Return only when no factor is along neurons that are in another order than its base's.

    Raises:
        SourceError: a split network's are, and the adapter names another model as its base.
    """
    own = _last(adapter.settings.base or "") == _last(item.source.label)
    if item.spec.adaptive is None or own:
        return
    sites: Any = item.spec.adaptive.get("sites")
    permuted = {
        block_of(path)
        for path, slots in sites.items()
        if (slots.get("ffn") or {}).get("partition", {}).get("permuted")
    }
    known = linears(item.spec)
    for path in adapter.modules:
        if known[path].role in _NEURONS and block_of(path) in permuted:
            raise SourceError(
                f"{escape(item.source.label)} holds the neurons of this network in another order "
                "than the model it was split from, and the adapter was not trained on it",
                where=f"{escape(adapter.name)}: '{escape(path)}'",
                hint="Compose adapters on the dense model, or train them on this one.",
            )


def _usual_scaling(adapter: LoraFolder) -> float:
    """Return the scaling at most linears, the first of several."""
    found = Counter(module.scaling for module in adapter.modules.values())
    return found.most_common(1)[0][0]


def _meant(adapter: LoraFolder) -> str | None:
    base = adapter.settings.base
    return None if base is None else f"It names {escape(_last(base))!r} as its base."


def _sizes(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]} inputs and {sizes[1]} outputs"


def _by_name(adapter: LoraFolder, item: Described) -> list[str]:
    """Return a note where names do not show that the base is the same."""
    base, name, label = adapter.settings.base, escape(adapter.name), item.source.label
    if base is None:
        return [f"adapter {name} does not say which base it is for; only shapes were compared"]
    if base in (label, str(item.source.root)) and (_on_hub(base) or Path(base).is_absolute()):
        return []
    if _on_hub(base) and _on_hub(label) and _last(base) != _last(label):
        raise SourceError(
            "the adapter is for another base",
            where=adapter.settings.where,
            expected=f"base_model_name_or_path {escape(label)}",
            found=escape(base),
            hint=f"Convert {escape(base)}; or, if the weights are the same, give the base as a "
            "folder.",
        )
    return [
        f"adapter {name} was trained on a base called {escape(_last(base))!r}, this one is "
        f"{escape(_last(label))!r}; only shapes were compared"
    ]


def _on_hub(name: str) -> bool:
    """Tell whether a name can be one on the hub, "org/name"."""
    return name.count("/") == 1 and name[:1] not in "/.~" and name[-1:] != "/"


def _last(name: str) -> str:
    """Return the last part of a path or hub id; of a snapshot in the hub's cache, of the id."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    if len(parts) > 2 and parts[-2] == "snapshots":
        return parts[-3].rpartition("--")[2]
    return parts[-1] if parts else name


def _no_linear(adapter: LoraFolder, item: Described, path: str) -> SourceError:
    spec, label = item.spec, escape(item.source.label)
    where = f"{escape(adapter.name)}: '{escape(path)}'"
    if any(is_named(path, outer) for outer in outer_linears(spec)):
        return SourceError(
            "the adapter is on a head, outside the blocks, where adapters are not routed",
            where=where,
            hint="Train it again with that module in exclude_modules.",
        )
    if any(path == tensor.name.removesuffix(".weight") for tensor in spec.tensors):
        return SourceError("the adapter is on a module that is no linear", where=where)
    near = [name for name in near_names(spec, path) if not is_named(path, name)]
    others = f"Did you mean {', '.join(near)}?" if near else None
    return SourceError(
        f"the adapter is for another base: {label} has no such linear",
        where=where,
        expected=f"{', '.join(tails(spec))} in {spec.layers} blocks",
        hint=others or _meant(adapter),
    )


def _check_mean(adapters: Sequence[LoraFolder], ranks: Sequence[int]) -> None:
    paths = {frozenset(adapter.modules) for adapter in adapters}
    if len(ranks) > 1 or len(paths) > 1:
        what = "linears" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        raise OptionError(
            "the mean is taken over factors of one rank at the same linears",
            where="--subtract-mean",
            found=f"adapters of several {what}",
        )
    if len(adapters) == 1:
        raise OptionError("a single adapter less its mean is nothing", where="--subtract-mean")


def _notes(
    adapters: Sequence[LoraFolder], sizes: Mapping[str, tuple[int, int]], ranks: Sequence[int]
) -> Iterator[str]:
    if len(ranks) > 1:
        listed = ", ".join(map(str, ranks))
        yield f"adapters of ranks {listed} are padded with zeros to {ranks[-1]}"
    for adapter in adapters:
        missing = [path for path in sizes if path not in adapter.modules]
        if missing:
            yield (
                f"adapter {escape(adapter.name)} has nothing at {len(missing)} of {len(sizes)} "
                f"linears, such as {listing(missing[:1])}: as an expert it adds zero there"
            )
        if len({module.scaling for module in adapter.modules.values()}) > 1:
            yield (
                f"adapter {escape(adapter.name)} is scaled differently from linear to linear; what "
                "differs is in its B, rounded to float32"
            )
