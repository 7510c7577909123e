"""Ways to train adapters on frozen linears, each ready for forward, backward and optimizer step.

PEFT's LoRA, this project's routed adapters as PEFT's users get them, the same ones as a loop over
adapters, and MixLoRA's own layers where that package is given. All of a model share its weights.

Shapes: T tokens, E adapters of rank r, n inputs and m outputs of a linear.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional

import adaconvert.auto  # noqa: F401
from adaconvert.adapters.config import MoloraConfig

#: alpha by rank, of every adapter here.
SCALING = 2
STD = 0.02
NAME = "default"
FFN = ("gate_proj", "up_proj", "down_proj")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", *FFN)


@dataclass(kw_only=True, slots=True)
class Variant:
    """One way.

    Attributes:
        linears: which of the model's have adapters.
        root: what runs.
        low: by autocast in bfloat16.
        run: returns the loss, or an output with `upstream` for its gradient.
        output: returns what is compared with a rival's.
        leaves: what gradients arrive at besides `trained`.
        trained: parameters of adapters and routers.
        rival: name of the variant it is compared with besides the baselines.
        exact: it computes what its rival does.
    """

    name: str
    linears: str
    root: nn.Module
    low: bool
    run: Callable[[], Tensor]
    output: Callable[[], Tensor]
    leaves: list[Tensor]
    trained: list[nn.Parameter]
    rival: str = ""
    exact: bool = False
    upstream: Tensor | None = None
    optimizer: torch.optim.Optimizer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.trained:
            # a rate of nothing, so that the losses stay what they are; the work is the same
            self.optimizer = torch.optim.AdamW(self.trained, lr=0.0)

    def forward(self) -> Tensor:
        """Return what `run` returns."""
        # entered every time, as it keeps casts of weights until it is left
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return self.run()

    def backward(self, out: Tensor) -> None:
        """Let gradients arrive."""
        out.backward(self.upstream)

    def clear(self) -> None:
        """Forget gradients."""
        for leaf in (*self.leaves, *self.trained):
            leaf.grad = None

    def weights(self) -> list[Tensor]:
        """Return what is there before the forward and not kept for the backward's sake."""
        return [*self.root.parameters(), *self.trained, *self.leaves]


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """How many adapters of which rank there are, and how many a token uses."""

    experts: int = 8
    rank: int = 16
    top_k: int = 2


#: name -> how a token's adapters are weighed, what routers read and share, and its rival.
ROUTED: dict[str, tuple[str, str, str | None, str]] = {
    "soft, router per linear": ("soft", "module", None, "loop, all tokens"),
    "top-2, router per linear": ("top-2", "module", None, "loop, selected tokens"),
    "top-1, router per linear": ("top-1", "module", None, ""),
    "soft, router per layer": ("soft", "layer", None, ""),
    "top-2, router per layer": ("top-2", "layer", None, ""),
    "soft, one A for all": ("soft", "module", "a", ""),
}
LOOPS = ("loop, all tokens", "loop, selected tokens")


def twin(root: nn.Module) -> Any:
    """Return a copy of the modules that shares all parameters."""
    return copy.deepcopy(root, {id(each): each for each in root.parameters()})


def add_lora(root: nn.Module, targets: Iterable[str], rank: int) -> list[nn.Parameter]:
    """Put PEFT's LoRA on linears; returns what is trained."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=SCALING * rank, target_modules=list(targets), init_lora_weights=False
    )
    return _injected(config, root)


def add_routed(
    root: nn.Module, targets: Iterable[str], size: Size, name: str
) -> list[nn.Parameter]:
    """Put routed adapters of this project on linears; returns what is trained."""
    rule, reads, share, _ = ROUTED[name]
    select: dict[str, Any] = {"rule": "soft"}
    if rule != "soft":
        k = int(rule.removeprefix("top-"))
        select = {"rule": "top-k", "k": k, "renormalize": k > 1}
    config = MoloraConfig(
        num_experts=size.experts,
        r=size.rank,
        lora_alpha=SCALING * size.rank,
        target_modules=list(targets),
        share=share,
        router={"kind": "linear", "reads": reads},
        select=select,
    )
    return _injected(config, root)


def _injected(config: Any, root: nn.Module) -> list[nn.Parameter]:
    peft.inject_adapter_in_model(config, root, NAME)
    trained = [each for each in root.parameters() if each.requires_grad]
    draw = torch.Generator().manual_seed(0)
    for each in trained:
        # in float32 beside a base of bfloat16, as PEFT keeps them for training
        each.data = torch.randn(each.shape, generator=draw).mul_(STD)
    return trained


class Looped(nn.Module):
    """A linear with routed adapters, computed one adapter after the other.

    Args:
        base: frozen.
        layer: the same adapters as this project has them; their values are copied.
        top_k: tokens use this many, 0 for all of them.
    """

    def __init__(self, base: nn.Linear, layer: Any, size: Size, top_k: int) -> None:
        super().__init__()
        self.base, self.top_k = base, top_k
        # modules of one adapter each, as such code has them
        self.a = nn.ModuleList(
            nn.Linear(base.in_features, size.rank, bias=False) for _ in range(size.experts)
        )
        self.b = nn.ModuleList(
            nn.Linear(size.rank, base.out_features, bias=False) for _ in range(size.experts)
        )
        self.router = nn.Linear(base.in_features, size.experts, bias=False)
        with torch.no_grad():
            self.router.weight.copy_(layer.molora_router[NAME])
            for index, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
                a.weight.copy_(layer.molora_A[NAME][index])
                b.weight.copy_(layer.molora_B[NAME][index])

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        shares = functional.softmax(self.router(x).float(), dim=-1)
        run = self._selected if self.top_k else self._all
        return run(x, out, shares)

    def _all(self, x: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        for index, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            out = out + (shares[..., index, None] * b(a(x)) * SCALING).to(out.dtype)
        return out

    def _selected(self, x: Tensor, out: Tensor, shares: Tensor) -> Tensor:
        flat, wide = x.flatten(0, -2), out.flatten(0, -2)
        weights, chosen = shares.flatten(0, -2).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        for index, (a, b) in enumerate(zip(self.a, self.b, strict=True)):
            rows, slots = torch.where(chosen == index)
            part = b(a(flat[rows])) * weights[rows, slots, None] * SCALING
            wide = wide.index_add(0, rows, part.to(wide.dtype))
        return wide.view(out.shape)


def add_loop(
    root: nn.Module, like: nn.Module, targets: Iterable[str], size: Size, top_k: int
) -> list[nn.Parameter]:
    """Put the adapters that `like` has on the linears of `root`, as loops; returns what is trained.

    `like` is what `add_routed` made of the same root, with a router per linear.
    """
    layers: Mapping[str, nn.Module] = dict(like.named_modules())
    ending, trained = tuple(targets), []
    for path, module in list(root.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith(ending):
            looped = Looped(module, layers[path], size, top_k)
            parent, _, last = path.rpartition(".")
            setattr(root.get_submodule(parent), last, looped)
            trained += [each for each in looped.parameters() if each.requires_grad]
    return trained


def add_mixlora(root: Any, package: Path, size: Size) -> list[nn.Parameter]:
    """Let the package mixlora put its layers into the networks of a model; returns what is trained.

    It makes layers of tensors it is given, for inference; its matrices ask for gradients all the
    same, and its router is the tensor given. It refuses a dropout of 0, so its layers are put in
    evaluation mode, where a dropout does nothing.
    """
    if str(package) not in sys.path:
        sys.path.append(str(package))
    from mixlora.config import MixLoraConfig
    from mixlora.model import inject_adapter_in_model

    config = MixLoraConfig.from_config(
        {
            **{"peft_type": "MIXLORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "."},
            **{"r": size.rank, "lora_alpha": SCALING * size.rank, "lora_dropout": 0.05},
            **{"target_modules": list(FFN), "routing_strategy": "mixlora", "top_k": size.top_k},
            **{"num_experts": size.experts, "act_fn": root.config.hidden_act},
        }
    )
    config.check()
    config.adapter_name_, config.dtype_ = NAME, torch.float32
    given = dict(_mixlora_weights(root, size))
    inject_adapter_in_model(root, config, given)
    trained = [each for name, each in given.items() if name.endswith("moe_gate.weight")]
    for layer in root.model.layers:
        for expert in layer.mlp.mixlora_moes[NAME].experts_.values():
            expert.eval()
            trained += [expert.lora_A.weight, expert.lora_B.weight]
    return trained


def _mixlora_weights(root: Any, size: Size) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a tensor under every name that mixlora asks for."""
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=draw).mul_(STD))

    for index, layer in enumerate(root.model.layers):
        prefix = f"mixlora.layers.{index}.mlp"
        yield f"{prefix}.moe_gate.weight", made(size.experts, root.config.hidden_size)
        for projection in FFN:
            base = getattr(layer.mlp, projection)
            for expert in range(size.experts):
                path = f"{prefix}.{projection}.experts.{expert}"
                yield f"{path}.lora_A.weight", made(size.rank, base.in_features)
                yield f"{path}.lora_B.weight", made(base.out_features, size.rank)
