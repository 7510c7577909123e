"""What takes turns when training steps of adapters are measured: models, and single linears."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from bench.adapter_steps import (
    ALL,
    FFN,
    LOOPS,
    ROUTED,
    Size,
    Variant,
    add_loop,
    add_lora,
    add_mixlora,
    add_routed,
    twin,
)
from torch import Tensor, nn

FROZEN, LORA, MIXLORA = "frozen", "LoRA", "MixLoRA"


class Models:
    """A dense model, and copies of it with adapters; they share its weights.

    Args:
        options: of the command line.
        dtype: of the weights.
        blocks: this many of the model's blocks alone, without what makes logits and the loss; None
            for the model.
    """

    def __init__(self, options: dict[str, Any], dtype: str, blocks: int | None) -> None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self.options, self.size, self.low = options, Size(), dtype != "float32"
        self.base: Any = load(options["model"], dtype=getattr(torch, dtype)).eval()
        self.base.requires_grad_(False)
        self.label = options["name"] or Path(options["model"]).resolve().name
        self.upstream = None
        shape = (options["batch"], options["length"])
        self.ids = torch.zeros(shape, dtype=torch.long)
        self.inputs = self.base.get_input_embeddings()(self.ids).detach().requires_grad_()
        self.fresh(0)
        if blocks is not None:
            del self.base.model.layers[blocks:]
            self.label += f", {blocks} blocks"
            draw = torch.Generator().manual_seed(0)
            self.upstream = torch.randn(self.inputs.shape, generator=draw).to(self.inputs.dtype)

    @torch.no_grad()
    def fresh(self, turn: int) -> None:
        """Let the variants run other tokens from now on, so that routing is new as in training."""
        draw = torch.Generator().manual_seed(turn)
        size = self.base.config.vocab_size
        self.ids.copy_(torch.randint(0, size, self.ids.shape, generator=draw))
        self.inputs.copy_(self.base.get_input_embeddings()(self.ids))

    def variants(self) -> list[Variant]:
        """Return what takes turns."""
        found = [self.variant(FROZEN, "", self.base, [])]
        for linears, targets in (("all", ALL), ("ffn", FFN)):
            root = twin(self.base)
            found.append(self.variant(LORA, linears, root, add_lora(root, targets, self.whole)))
        found += [self.routed(name, "all", ALL) for name in ROUTED]
        found += [self.looped(name, found) for name in LOOPS]
        found.append(self.routed("top-2, router per layer", "ffn", FFN))
        package = self.options["mixlora"]
        if package is not None:
            found[-1].rival = MIXLORA
            root = twin(self.base)
            found.append(self.variant(MIXLORA, "ffn", root, add_mixlora(root, package, self.size)))
        return found

    @property
    def whole(self) -> int:
        """The rank that all adapters have together."""
        return self.size.experts * self.size.rank

    def routed(self, name: str, linears: str, targets: Sequence[str]) -> Variant:
        root = twin(self.base)
        made = self.variant(name, linears, root, add_routed(root, targets, self.size, name))
        made.rival = ROUTED[name][3]
        made.exact = bool(made.rival)
        return made

    def looped(self, name: str, others: Iterable[Variant]) -> Variant:
        like = next(each for each in others if each.rival == name)
        root, top_k = twin(self.base), self.size.top_k if "selected" in name else 0
        trained = add_loop(root, like.root, ALL, self.size, top_k)
        return self.variant(name, "all", root, trained)

    def variant(self, name: str, linears: str, root: Any, trained: list[nn.Parameter]) -> Variant:
        given = {"inputs_embeds": self.inputs, "use_cache": False}

        def blocks() -> Tensor:
            found: Tensor = root.model(**given).last_hidden_state
            return found

        def loss() -> Tensor:
            found: Tensor = root(**given, labels=self.ids).loss
            return found

        more: dict[str, Any] = {"leaves": [self.inputs], "trained": trained}
        more |= {
            "low": self.low,
            "run": loss if self.upstream is None else blocks,
            "output": blocks,
        }
        return Variant(name=name, linears=linears, root=root, upstream=self.upstream, **more)


class Linears:
    """A frozen linear, and copies of it with adapters."""

    def __init__(self, inputs: int, outputs: int, dtype: str, options: dict[str, Any]) -> None:
        kind = getattr(torch, dtype)
        tokens = options["batch"] * options["length"]
        self.size, self.low = Size(), dtype != "float32"
        self.base = nn.ModuleDict({"linear": nn.Linear(inputs, outputs, bias=False, dtype=kind)})
        self.base.requires_grad_(False)
        self.x = torch.zeros(1, tokens, inputs, dtype=kind, requires_grad=True)
        self.fresh(0)
        self.upstream = torch.randn(1, tokens, outputs).to(kind)

    @torch.no_grad()
    def fresh(self, turn: int) -> None:
        """Let the variants run another input from now on."""
        draw = torch.Generator().manual_seed(turn)
        self.x.copy_(torch.randn(self.x.shape, generator=draw))

    def variants(self) -> list[Variant]:
        """Return what takes turns."""
        whole = self.size.experts * self.size.rank
        found = [self.variant(FROZEN, "", self.base, [])]
        root = twin(self.base)
        found.append(self.variant(LORA, "all", root, add_lora(root, ["linear"], whole)))
        for name, (_, reads, _, rival) in ROUTED.items():
            if reads == "module":
                root = twin(self.base)
                trained = add_routed(root, ["linear"], self.size, name)
                found.append(self.variant(name, "all", root, trained))
                found[-1].rival, found[-1].exact = rival, bool(rival)
        for name in LOOPS:
            like = next(each for each in found if each.rival == name)
            root, top_k = twin(self.base), self.size.top_k if "selected" in name else 0
            trained = add_loop(root, like.root, ["linear"], self.size, top_k)
            found.append(self.variant(name, "all", root, trained))
        return found

    def variant(self, name: str, linears: str, root: Any, trained: list[nn.Parameter]) -> Variant:
        def run() -> Tensor:
            found: Tensor = root["linear"](self.x)
            return found

        ways = {"low": self.low, "run": run, "output": run, "upstream": self.upstream}
        more: dict[str, Any] = {"leaves": [self.x], "trained": trained}
        return Variant(name=name, linears=linears, root=root, **ways, **more)
