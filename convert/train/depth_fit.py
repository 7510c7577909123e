"""What skipped tokens run instead, and who skips, fitted in closed form before the first step.

An adapter whose last matrix is zero adds nothing, and a short fine-tune is spent on the little that
least squares find at once. So some sequences of the run pass through the model twice: as the
dense one, whose hidden states behind every block are kept, and as the one that is trained. In front
of each block the second pass fits its adapter to what leads from its own hidden states to the dense
model's, errors of the blocks before included, and goes on with it. The first matrix is the
reduced-rank ridge regression of that (Izenman 1975) on the scaled hidden states, at a scale where
the nonlinearity is felt little; the last is a ridge regression on what then comes out of it. How
strong the ridge is, an eighth of the tokens decides, which no candidate has seen. For models whose
pruned blocks become linear maps, ReplaceMe (2505.02819) does likewise; ranks, nonlinearity and the
errors carried along are ours. Behind each block its router is fitted where a budget decides later
who skips, see `depth_ranks`.

Shapes: N tokens, d hidden size, r width of an adapter.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.modeling.adaptive_depth_parts import DepthAdapter, unit_scale
from adaconvert.progress import bar
from adaconvert.train.config import FinetuneConfig
from adaconvert.train.depth_budget import BEYOND
from adaconvert.train.depth_ranks import HELD, Ranked, fit_router, wide

#: strengths of the ridge that are tried, as parts of the mean square of a feature.
RIDGES: Final = (1e-3, 1e-2, 1e-1)
#: root mean square of what the nonlinearity gets, and the ridge of the last matrix.
SPREAD: Final = 0.5
_LAST: Final = 1e-4
#: bytes of hidden states that are kept; a larger model is fitted on fewer tokens.
MOST: Final = 2 << 30
Rows = Sequence[Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """What was fitted.

    Attributes:
        tokens: real tokens it was fitted on.
        left: path -> squared distance to the dense hidden states that is left on tokens held out,
            as a share of what it is without an adapter.
        ranked: path -> what is known of the tokens of a block whose router was fitted.
    """

    tokens: int
    left: dict[str, float]
    ranked: dict[str, Ranked]

    def lines(self) -> list[str]:
        """Return what a log says of it."""
        on = f"blocks fitted on {self.tokens:,} tokens"
        found = []
        if self.left:
            middle = statistics.median(self.left.values())
            found.append(
                f"adapters of {len(self.left)} {on}: {middle:.2f} of what skipping changes is left "
                f"(median, on tokens held out)"
            )
        if self.ranked:
            middle = statistics.median(one.right for one in self.ranked.values())
            found.append(
                f"routers of {len(self.ranked)} {on}: correlation {middle:.2f} with what skipping "
                f"changes (median, on tokens held out)"
            )
        return found


def untouched(model: Any) -> dict[str, Any]:
    """Return the blocks whose adapters are trained and add nothing yet, by path."""
    found = {}
    for path, block in _routed(model):
        adapter = block.depth.adapter
        if adapter is None or not all(p.requires_grad for p in adapter.parameters()):
            continue
        if not bool(adapter.up.weight.any()):
            found[path] = block
    return found


def undecided(model: Any) -> dict[str, Any]:
    """Return the blocks that tokens may skip and whose routers are trained and tell no token from
    another yet, by path; only those where everyone goes on seeing the keys of who skips."""
    found = {}
    for path, block in _routed(model):
        spec, router = block.adaptive_layer, block.depth.router
        if spec["select"]["rule"] != "threshold" or spec["kv"] != "keep":
            continue
        trained = router.weight.requires_grad and router.bias.requires_grad
        if trained and not bool(router.weight.any()):
            found[path] = block
    return found


def _routed(model: Any) -> list[tuple[str, Any]]:
    """Return all routed blocks and their paths, in the order they run."""
    routed = model.adaptive_depth().items() if hasattr(model, "adaptive_depth") else ()
    return sorted(routed, key=lambda one: one[1].adaptive_layer["index"])


def fit_depth(
    model: Any, data: Any, config: FinetuneConfig, *, routers: bool, progress: bool = False
) -> Fitted | None:
    """Fit the adapters that add nothing yet, and routers, in place; None where there are none.

    Args:
        model: adaptive, where it is trained; in its own mode afterwards.
        data: sequences of the run, some of which are taken.
        config: the fine-tune.
        routers: a budget decides later who skips, so that routers are fitted too; all that are
            trained, or none where some of them tell tokens apart already.
        progress: show a bar on a terminal.
    """
    adapters = untouched(model)
    ranking = undecided(model) if routers else {}
    blocks = {path: block for path, block in _routed(model) if path in adapters or path in ranking}
    if not blocks or not config.depth.fit:
        return None
    rows = _rows(data, config, _room(model, blocks, config.depth.fit))
    fed = {name: torch.stack([row[name] for row in rows]).to(model.device) for name in rows[0]}
    mask = fed.get("attention_mask")
    real = None if mask is None else mask.bool()
    left: dict[str, float] = {}
    ranked: dict[str, Ranked] = {}

    def flat(values: Tensor) -> Tensor:
        return values.flatten(end_dim=-2) if real is None else values[real]

    with _passes(model, config), bar(len(blocks), "fit", "block", enabled=progress) as shown:
        dense: dict[str, Tensor] = {}
        if adapters:
            with model.set_depth("all"):
                dense = _outputs(model, adapters, fed)

        def before(path: str, x: Tensor) -> None:
            if path in adapters:
                wanted = dense.pop(path).to(x.device)
                left[path] = fit(blocks[path].depth.adapter, flat(x), flat(wanted))

        def after(path: str, x: Tensor, ran: Tensor) -> None:
            if path in ranking:
                depth = blocks[path].depth
                own = flat(x)
                found = fit_router(depth.router, own, flat(ran), depth.skipped(own))
                if found is not None:
                    ranked[path] = found
            shown.update()

        # what running changes is known of tokens that run, whatever the thresholds are
        running = dict.fromkeys(ranking, -BEYOND)
        with model.set_depth("threshold", threshold=running) if ranking else nullcontext():
            _visited(model, blocks, fed, before, after)
    tokens = fed["input_ids"].numel() if real is None else int(real.sum())
    return Fitted(tokens=tokens, left=left, ranked=ranked)


@torch.no_grad()
def fit(adapter: DepthAdapter, x: Tensor, wanted: Tensor) -> float:
    """Set an adapter so that x + adapter(x) comes near to what is wanted, [..., d] both.

    Returns:
        What is left of the squared distance, on tokens held out; 1 where no candidate helps there,
        and the adapter stays as it is.
    """
    x, wanted = (wide(values).flatten(end_dim=-2) for values in (x, wanted))
    scaled, change = unit_scale(x), wanted - x
    held = torch.arange(len(x), device=x.device) % HELD == HELD - 1
    seen = ~held
    if not bool(held.any()):
        return 1.0
    width = len(adapter.down.weight)
    solved = Ridge(scaled[seen], change[seen])
    best, left = None, 1.0
    for strength in RIDGES:
        down, up = solved.matrices(strength, width)
        missed = change[held] - functional.silu(scaled[held] @ down) @ up
        share = float(missed.square().sum() / change[held].square().sum().clamp_min(1e-300))
        if share < left:
            best, left = (down, up), share
    if best is not None:
        adapter.down.weight.copy_(best[0].T)
        adapter.up.weight.copy_(best[1].T)
    return left


class Ridge:
    """Ridge regressions of one change on one set of features.

    Args:
        features: [N, d].
        change: [N, d].
    """

    def __init__(self, features: Tensor, change: Tensor) -> None:
        self._features, self._change = features, change
        self._gram = features.T @ features
        self._values, self._vectors = torch.linalg.eigh(self._gram)
        self._turned = self._vectors.T @ (features.T @ change)

    def matrices(self, strength: float, width: int) -> tuple[Tensor, Tensor]:
        """Return both matrices of an adapter, [d, r] and [r, d].

        Args:
            strength: of the ridge, as a part of the mean square of a feature.
            width: r.
        """
        values = self._values.clamp_min(0)
        ridge = strength * values.mean()
        whole = self._vectors @ (self._turned / (values + ridge)[:, None])
        # what it predicts varies most along these directions
        _, directions = torch.linalg.eigh(whole.T @ self._gram @ whole)
        down = whole @ directions[:, -width:].flip(1)
        # a neuron and its opposite are linear together: silu(z) - silu(-z) = z
        down = torch.cat([down, -down], 1)
        down = down[:, torch.arange(width, device=down.device) % down.shape[1]]
        down = down * (SPREAD / (self._features @ down).square().mean(0).sqrt().clamp_min(1e-12))
        inside = functional.silu(self._features @ down)
        gram = inside.T @ inside
        gram.diagonal().add_(_LAST * gram.diagonal().mean() + 1e-12)
        return down, torch.linalg.solve(gram, inside.T @ self._change)


def _room(model: Any, blocks: Mapping[str, Any], tokens: int) -> int:
    hidden: int = next(iter(blocks.values())).adaptive_layer["hidden"]
    size: int = next(model.parameters()).element_size()
    return min(tokens, MOST // (len(blocks) * hidden * size))


def _rows(data: Any, config: FinetuneConfig, tokens: int) -> list[dict[str, Tensor]]:
    """Return sequences of a run, evenly spaced, as many as there are tokens for; the first of those
    that are made on the way, where looking ahead means making all of them."""
    whole = min(len(data), config.total_steps * config.step_sequences)
    count = min(max(tokens // config.seq_len, 1), whole)
    step = 1 if config.reading.streaming else whole // count
    rows = [dict(data[index * step]) for index in range(count)]
    masked = any("attention_mask" in row for row in rows)
    found = []
    for row in rows:
        one = {"input_ids": row["input_ids"]}
        if masked:
            one["attention_mask"] = row.get("attention_mask", torch.ones_like(row["input_ids"]))
        found.append(one)
    return found


@contextmanager
def _passes(model: Any, config: FinetuneConfig) -> Iterator[None]:
    """Let passes inside compute as training does, without gradients or dropout."""
    was_training = model.training
    model.eval()
    bf16 = config.precision == "bf16"
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            yield
    finally:
        model.train(was_training)


class _EnoughError(Exception):
    """The last block that matters is reached."""


def _outputs(model: Any, blocks: Mapping[str, Any], fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the hidden states behind each block, [B, S, d] on the CPU, of every token running."""
    kept: dict[str, list[Tensor]] = {path: [] for path in blocks}

    def after(path: str) -> Callable[..., None]:
        def hook(block: Any, given: Any, found: Any) -> None:
            kept[path].append(_hidden(found).cpu())
            if path == list(blocks)[-1]:
                raise _EnoughError

        return hook

    handles = [block.register_forward_hook(after(path)) for path, block in blocks.items()]
    for row in range(len(fed["input_ids"])):
        _pass(model, {name: value[row : row + 1] for name, value in fed.items()})
    for handle in handles:
        handle.remove()
    return {path: torch.cat(found) for path, found in kept.items()}


def _visited(
    model: Any,
    blocks: Mapping[str, Any],
    fed: Mapping[str, Tensor],
    before: Callable[[str, Tensor], None],
    after: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Run all rows at once, so that a block is visited before the next one begins.

    Args:
        before: gets path and hidden states [B, S, d] in front of each block.
        after: gets those behind it besides.
    """

    def in_front(path: str) -> Callable[..., None]:
        def hook(block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            before(path, _given(args, kwargs))

        return hook

    def behind(path: str) -> Callable[..., None]:
        def hook(block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Any) -> None:
            after(path, _given(args, kwargs), _hidden(found))
            if path == list(blocks)[-1]:
                raise _EnoughError

        return hook

    handles = []
    for path, block in blocks.items():
        handles.append(block.register_forward_pre_hook(in_front(path), with_kwargs=True))
        handles.append(block.register_forward_hook(behind(path), with_kwargs=True))
    _pass(model, fed)
    for handle in handles:
        handle.remove()


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _hidden(found: Any) -> Tensor:
    hidden: Tensor = found if isinstance(found, Tensor) else found[0]
    return hidden


def _pass(model: Any, fed: Mapping[str, Tensor]) -> None:
    with suppress(_EnoughError):
        model(**fed, use_cache=False)
