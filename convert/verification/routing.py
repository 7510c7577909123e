"""What the routers of a converted model decide: whether experts are used, and used evenly.

Shapes: T tokens, H hidden size, N experts, K experts per token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from adaconvert.arch.null_experts import MODULE

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRouting:
    """Routing of one layer over the probe.

    Attributes:
        layer: index of the block.
        experts: number of routed experts.
        entropy: mean over tokens of the entropy of the router's distribution in nats; ln N when it
            is even.
        load: tokens of the busiest expert, as a multiple of the mean; 1 when all are used equally.
        top1: mean over tokens of the highest probability.
        dead: number of experts no token chose.
        real: mean number of real experts per token beside null ones; None where there are none.
        split_groups: fraction of tokens that chose a part of a group of sibling experts, None when
            experts have no siblings. Such tokens get a part of an FFN.
        split_groups_stored: the same with the router computed in the checkpoint's own dtype, where
            rounding can tie the routers of two groups.
    """

    layer: int
    experts: int
    entropy: float
    load: float
    top1: float
    dead: int
    real: float | None = None
    split_groups: float | None = None
    split_groups_stored: float | None = None


class RouterWatch:
    """Collects what the router of one block decides while the block runs, as a context manager.

    The router is found by structure, not by name: a module with `experts`, and beside them a module
    whose weight is [N, H].

    Args:
        block: the transformer block.
        granularity: experts j * G to j * G + G - 1 are parts of one FFN; 1 when experts are whole.
        stored_dtype: torch name of the dtype the checkpoint is meant to run in.
    """

    def __init__(
        self, block: nn.Module, *, granularity: int = 1, stored_dtype: str | None = None
    ) -> None:
        found = _find_router(block)
        self._router: nn.Module | None = found[0] if found else None
        self._experts: nn.Module | None = found[1] if found else None
        self._nulled = any(name.endswith(f".{MODULE}") for name, _ in block.named_modules())
        self._granularity = granularity
        self._stored_dtype = stored_dtype
        self._hooks: list[Any] = []
        self._logits: list[torch.Tensor] = []
        self._inputs: list[torch.Tensor] = []
        self._chosen: list[torch.Tensor] = []

    def __enter__(self) -> RouterWatch:
        if self._router is not None and self._experts is not None:
            self._hooks = [
                self._router.register_forward_hook(self._on_router),
                self._experts.register_forward_pre_hook(self._on_experts, with_kwargs=True),
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _on_router(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inputs = args[0].reshape(-1, args[0].shape[-1])
        self._logits.append(_logits(module, inputs))
        if self._granularity > 1:
            self._inputs.append(inputs)

    def _on_experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        chosen = _integers([*args, *kwargs.values()])
        if chosen is not None:
            self._chosen.append(chosen.reshape(-1, chosen.shape[-1]))

    def summary(self, layer: int) -> LayerRouting | None:
        """Return the statistics of what was seen, None when the block has no router or did not run.

        Args:
            layer: index of the block, for the result.
        """
        import torch

        if self._router is None or not self._chosen or not self._logits:
            return None
        chosen, logits = torch.cat(self._chosen), torch.cat(self._logits)
        count = logits.shape[-1]
        real = chosen >= 0
        used = torch.bincount(chosen[real], minlength=count).double()
        probabilities = _distribution(self._router, logits)
        split = split_stored = None
        if self._granularity > 1:
            split = _split_groups(chosen, self._granularity)
            rounded = self._choose_as_stored(chosen.shape[-1])
            split_stored = split if rounded is None else _split_groups(rounded, self._granularity)
        return LayerRouting(
            layer=layer,
            experts=count,
            entropy=float(torch.special.entr(probabilities).sum(-1).mean()),
            load=float(used.max() / used.mean().clamp_min(1 / len(chosen))),
            top1=float(probabilities.amax(-1).mean()),
            dead=int((used == 0).sum()),
            real=float(real.double().sum(-1).mean()) if self._nulled else None,
            split_groups=split,
            split_groups_stored=split_stored,
        )

    def _choose_as_stored(self, top_k: int) -> torch.Tensor | None:
        """Return the experts [T, K] a copy of the router chooses with everything as stored."""
        import torch

        dtype = self._stored_dtype
        if dtype is None or dtype == "float32":
            return None
        kind = getattr(torch, dtype)
        router = copy.deepcopy(self._router)
        assert router is not None
        with torch.no_grad():
            output = router.to(kind)(torch.cat(self._inputs).to(kind))
        chosen = _integers(output) if isinstance(output, tuple) else None
        logits = output[0] if isinstance(output, tuple) else output
        return logits.float().topk(top_k).indices if chosen is None else chosen


def _find_router(block: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    from torch import nn

    for module in block.modules():
        experts = getattr(module, "experts", None)
        count = getattr(experts, "num_experts", None)
        if not isinstance(experts, nn.Module) or not isinstance(count, int):
            continue
        for child in _beside(module, experts):
            weight = child._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and weight.shape[0] == count:
                return child, experts
    return None


def _beside(module: nn.Module, experts: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        # rows of null experts are no router of as many experts
        if child is not experts and child is not getattr(module, MODULE, None):
            yield child


def _integers(values: Any) -> torch.Tensor | None:
    import torch

    for value in values:
        if (
            isinstance(value, torch.Tensor)
            and not value.dtype.is_floating_point
            and value.dim() > 1
        ):
            return value
    return None


def _logits(router: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """Return the router's logits [T, N] for its inputs [T, H].

    Computed here: the order of what routers return differs between versions of transformers.
    """
    from torch.nn.functional import linear

    weight, bias = router._parameters["weight"], router._parameters.get("bias")
    assert weight is not None
    return linear(inputs.float(), weight.float(), None if bias is None else bias.float())


def _distribution(router: nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Return the router's probabilities [T, N]; sigmoid scores are divided by their sum."""
    # the routers that score with a sigmoid are the ones with a correction bias of their own
    if not hasattr(router, "e_score_correction_bias"):
        return logits.double().softmax(-1)
    scores = logits.double().sigmoid()
    return scores / scores.sum(-1, keepdim=True)


def _split_groups(chosen: torch.Tensor, size: int) -> float:
    """Return the fraction of tokens whose choice [T, K] has a part of a group of `size` experts."""
    groups = chosen.long() // size
    members = (groups.unsqueeze(-1) == groups.unsqueeze(-2)).sum(-1)
    return float((members != size).any(-1).double().mean())


def even_entropy(experts: int) -> float:
    """Return the entropy in nats of a router that prefers no expert."""
    return math.log(experts)
