"""Providers of the grouped expert feed-forward: ours, transformers', other libraries', dense ones.

T tokens, K slots per token, E experts, d hidden size, i intermediate size of one expert.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cells import Cell
from timing import Case, Provider
from torch import Tensor, nn
from torch.nn import functional
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from adaconvert.kernels.grouped import grouped_ffn as our_ffn
from adaconvert.kernels.plan import route_plan

BASELINE = "transformers grouped_mm"
BACKENDS = ("auto", "loop", "grouped_mm", "triton")
IMPLEMENTATIONS = ("grouped_mm", "eager", "batched_mm")
#: bytes of matrices that batched_mm may copy for its pairs.
GATHERED = {"cpu": 2e9, "cuda": 20e9}
Build = Callable[["Inputs"], Callable[[], Tensor]]


class Inputs:
    """Random tensors of one cell; those that are differentiated are leaves."""

    def __init__(self, cell: Cell, device: str) -> None:
        self.cell, self.device = cell, device
        config = MixtralConfig(
            hidden_size=cell.hidden,
            intermediate_size=cell.width,
            num_local_experts=cell.experts,
            num_experts_per_tok=cell.slots,
        )
        with torch.device(device):
            self.experts: Any = MixtralExperts(config).to(cell.dtype)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=cell.hidden**-0.5)
            self.x = torch.randn(cell.tokens, cell.hidden).to(cell.dtype).requires_grad_()
            scores = torch.rand(cell.tokens, cell.experts).topk(cell.slots)
            self.weights_of = scores.values.softmax(-1).requires_grad_()
            self.upstream = torch.randn(cell.tokens, cell.hidden).to(cell.dtype)
        self.experts_of = scores.indices
        self.gate_up, self.down = self.experts.gate_up_proj, self.experts.down_proj
        self.leaves: list[Tensor] = [self.x, self.weights_of, self.gate_up, self.down]

    @property
    def pairs(self) -> int:
        return self.cell.tokens * self.cell.slots


def grouped_ffn(cell: Cell, device: str) -> Case:
    """Return the case of a cell, its routing plan included in what is timed."""
    inputs, skipped = Inputs(cell, device), dict[str, str]()
    providers = [
        _provider(f"transformers {name}", _stock(inputs, name), inputs)
        for name in _stocks(inputs, skipped)
    ]
    providers += [_provider(f"adaconvert {name}", _ours(inputs, name), inputs) for name in BACKENDS]
    for name, build in OTHERS.items():
        try:
            run = build(inputs)
        except (ImportError, RuntimeError, TypeError, AttributeError) as error:
            skipped[name] = str(error).partition("\n")[0]
            continue
        providers.append(_provider(name, run, inputs, exact=name != "megablocks"))
    dense: list[Tensor] = []
    for name, width in (("dense, equal FLOPs", cell.slots), ("dense, all experts", cell.experts)):
        matrices = _dense_matrices(inputs, width * cell.width)
        dense += matrices
        run = _dense(inputs, *matrices)
        providers.append(_provider(name, run, inputs, exact=False, leaves=[inputs.x, *matrices]))
    item, wide = cell.dtype.itemsize, inputs.pairs * 2 * cell.width
    weights = sum(parameter.numel() for parameter in inputs.experts.parameters())
    return Case(
        providers=providers,
        parameters=[inputs.gate_up, inputs.down, *dense],
        flops=6.0 * inputs.pairs * cell.hidden * cell.width,
        # weights, x and the output once, the pre-activations written
        moved=item * (weights + 2.0 * cell.tokens * cell.hidden + wide),
        skipped=skipped,
    )


def _provider(
    name: str,
    run: Callable[[], Tensor],
    inputs: Inputs,
    *,
    exact: bool = True,
    leaves: list[Tensor] | None = None,
) -> Provider:
    """Return a provider that starts from leaves without gradients, as a training step does."""
    leaves = inputs.leaves if leaves is None else leaves

    def forward(_: int) -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        return run()

    def backward(out: Tensor) -> None:
        out.backward(inputs.upstream)

    # what is not exact has other matrices
    work = 1.0 if exact else None
    return Provider(name=name, forward=forward, backward=backward, exact=exact, work=work)


def _stocks(inputs: Inputs, skipped: dict[str, str]) -> Iterator[str]:
    for name in IMPLEMENTATIONS:
        copied = (
            3.0 * inputs.pairs * inputs.cell.width * inputs.cell.hidden * inputs.x.element_size()
        )
        if name == "batched_mm" and copied > GATHERED[inputs.device]:
            skipped["transformers batched_mm"] = f"it would copy {copied / 1e9:.0f} GB of weights"
            continue
        yield name


def _stock(inputs: Inputs, implementation: str) -> Callable[[], Tensor]:
    def run() -> Tensor:
        inputs.experts.config._experts_implementation = implementation
        weights_of = inputs.weights_of.to(inputs.x.dtype)
        out: Tensor = inputs.experts(inputs.x, inputs.experts_of, weights_of)
        return out

    return run


def _ours(inputs: Inputs, backend: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        # as the experts implementation does: it knows that no slot is without an expert
        plan = route_plan(inputs.experts_of, inputs.cell.experts, may_drop=False)
        weights = {"gate_up": inputs.gate_up, "down": inputs.down}
        options = {"activation": "silu", "glu": True, "backend": backend}
        return our_ffn(inputs.x, inputs.weights_of, plan, **weights, **options)  # type: ignore[arg-type]

    return run


def _dense_matrices(inputs: Inputs, width: int) -> list[Tensor]:
    """Return gate over up [2w, d] and down [d, w]."""
    found = []
    for shape in ((2 * width, inputs.cell.hidden), (inputs.cell.hidden, width)):
        matrix = torch.randn(shape, device=inputs.device).mul_(inputs.cell.hidden**-0.5)
        found.append(matrix.to(inputs.cell.dtype).requires_grad_())
    return found


def _dense(inputs: Inputs, gate_up: Tensor, down: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        gate, up = functional.linear(inputs.x, gate_up).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, down)

    return run


# -- other libraries: GPU only, each left out with a reason where it is not installed


def _liger(inputs: Inputs) -> Callable[[], Tensor]:
    function = _imported("liger_kernel.ops.fused_moe", inputs).LigerFusedMoEFunction
    experts_of = inputs.experts_of.int()

    def run() -> Tensor:
        call = (inputs.x, inputs.gate_up, inputs.down, experts_of, inputs.weights_of)
        out: Tensor = function.apply(*call)
        return out

    return run


def _scattermoe(inputs: Inputs) -> Callable[[], Tensor]:
    cell = inputs.cell
    made = _imported("scattermoe.mlp", inputs).GLUMLP
    mlp = made(cell.hidden, cell.width, cell.experts, cell.slots, activation=nn.SiLU())
    mlp = mlp.to(inputs.device, cell.dtype)
    with torch.no_grad():
        # its first matrix holds up over gate
        mlp.experts.weight.copy_(torch.cat(inputs.gate_up.chunk(2, 1)[::-1], 1))
        mlp.output_experts.weight.copy_(inputs.down)

    def run() -> Tensor:
        mlp.zero_grad(set_to_none=True)
        out: Tensor = mlp(inputs.x, inputs.weights_of.to(cell.dtype), inputs.experts_of)
        return out

    return run


def _sonicmoe(inputs: Inputs) -> Callable[[], Tensor]:
    # transformers fetches the kernel with the package of this name, and calls it
    _imported("kernels", inputs)
    return _stock(inputs, "sonicmoe")


def _megablocks(inputs: Inputs) -> Callable[[], Tensor]:
    cell = inputs.cell
    layers = _imported("megablocks.layers.dmoe", inputs)
    arguments = importlib.import_module("megablocks.layers.arguments").Arguments(
        hidden_size=cell.hidden,
        ffn_hidden_size=cell.width,
        moe_num_experts=cell.experts,
        moe_top_k=cell.slots,
        mlp_type="glu",
        mlp_impl="grouped",
        activation_fn=functional.silu,
        bias=False,
        return_bias=False,
        bf16=True,
        fp16=False,
    )
    layer = layers.dMoE(arguments).to(inputs.device, cell.dtype)

    def run() -> Tensor:
        # with weights and a router of its own
        layer.zero_grad(set_to_none=True)
        out = layer(inputs.x[None])
        return (out[0] if isinstance(out, tuple) else out)[0]

    return run


def _imported(name: str, inputs: Inputs) -> Any:
    """Return the module.

    Raises:
        ImportError: it is not installed.
        RuntimeError: there is no GPU.
    """
    module = importlib.import_module(name)
    if inputs.device != "cuda":
        raise RuntimeError("it needs a GPU")
    return module


OTHERS: dict[str, Build] = {
    "liger": _liger,
    "scattermoe": _scattermoe,
    "sonicmoe": _sonicmoe,
    "megablocks": _megablocks,
}
