"""The compiled forms: right, one graph for every selection, and harmless where they fail."""

from __future__ import annotations

import dataclasses
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from adaconvert.kernels.reference import expert_ffn
from adaconvert.modeling import adaptive_compiled, adaptive_decode
from adaconvert.modeling.adaptive_execution import (
    Decoder,
    ExpertWeights,
    decode_step,
    run_experts,
)
from adaconvert.modeling.adaptive_inductor import Inductor
from adaconvert.modeling.adaptive_layout import keep_rows
from adaconvert.modeling.adaptive_routers import (
    AnalyticRouter,
    ContributionRouter,
    LinearRouter,
    grouped,
)
from adaconvert.modeling.adaptive_select import select_experts
from adaconvert.testing.compilers import has_compiler

needs_compiler = pytest.mark.skipif(
    not has_compiler(),
    reason="torch.compile needs a C++ compiler here",
)
HIDDEN, EXPERTS = 24, 6
#: see test_execution.py
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what other tests compiled; compile even tiny matrices."""
    monkeypatch.setenv("ADACONVERT_COMPILE", "1")
    # at these sizes starting a graph is most of its time
    monkeypatch.setattr(adaptive_compiled, "SLOWEST", 1e3)
    for kept in (adaptive_compiled._CASES, adaptive_decode._DECODERS):
        kept.clear()
    adaptive_compiled._STEPS.clear()
    yield
    for kept in (adaptive_compiled._CASES, adaptive_decode._DECODERS):
        kept.clear()


def make(
    dtype: torch.dtype,
    *,
    width: int = 4,
    shared: int = 0,
    glu: bool = True,
    biases: bool = False,
    major: bool = True,
    seed: int = 0,
    activation: Callable[[Tensor], Tensor] = functional.silu,
) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    neurons = shared + EXPERTS * width

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator)
        return (drawn * (HIDDEN**-0.5 if len(shape) == 2 else 1)).to(dtype)

    down = draw(neurons, HIDDEN)
    return ExpertWeights(
        gate=draw(neurons, HIDDEN) if glu else None,
        up=draw(neurons, HIDDEN),
        down=down.t() if major else down.t().contiguous(),
        gate_bias=draw(neurons) if glu and biases else None,
        up_bias=draw(neurons) if biases else None,
        down_bias=draw(HIDDEN) if biases else None,
        activation=activation,
        width=width,
        shared=shared,
    )


def truth(x: Tensor, w: ExpertWeights, mask: Tensor) -> Tensor:
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    return expert_ffn(
        x.double(),
        mask,
        up=w.up.double(),
        down=w.down.double(),
        gate=wide(w.gate),
        gate_bias=wide(w.gate_bias),
        up_bias=wide(w.up_bias),
        down_bias=wide(w.down_bias),
        activation=w.activation,
        width=w.width,
        shared=w.shared,
    )


def close(out: Tensor, expected: Tensor) -> bool:
    limit = LIMITS[out.dtype] * max(1.0, float(expected.abs().max()))
    return float((out.double() - expected).abs().max()) <= limit


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {"biases": True, "shared": 3}),
        (torch.float32, {"width": 1, "glu": False, "major": False}),
    ],
    ids=["bfloat16 glu", "float32 plain, stock layout"],
)
def test_one_graph_serves_every_selection_and_layer(
    dtype: torch.dtype, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=adaptive_compiled.__name__)
    for seed in range(3):
        # an activation module of its own per layer, as transformers has
        weights = make(dtype, seed=seed, activation=nn.GELU(), **options)
        x = torch.randn(1, HIDDEN).to(dtype)
        for chosen in ([0, 3], [1], [], [0, 1, 2, 4, 5], list(range(EXPERTS))):
            mask = torch.zeros(1, EXPERTS, dtype=torch.bool)
            mask[0, chosen] = True
            with torch.inference_mode():
                out, pairs = run_experts(x, weights, mask, path="gather")
            assert close(out, truth(x, weights, mask)), chosen
            own = weights.shared + len(chosen) * weights.width
            spread = 0 if options.get("major", True) else (len(weights.up) - own) // 2
            assert pairs == own + spread
    (case,) = adaptive_compiled._CASES.values()
    assert case.compiled
    assert adaptive_compiled._STEPS == ["step_0"]
    assert "again" not in caplog.text


class Gate(nn.Module):
    """What the network's own gate would score, for comparison."""

    def __init__(self, weights: ExpertWeights) -> None:
        super().__init__()
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        w = self.weights
        first = (w.up, w.up_bias) if w.gate is None else (w.gate, w.gate_bias)
        gated = w.activation(functional.linear(x, *first))
        return grouped(gated.abs().float(), EXPERTS, w.shared)


def filled(router: Any, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return router.requires_grad_(False)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "rule", "name", "values", "options"),
    [
        ("linear", "top-k", "k", [2, 1, 5, 3], {}),
        ("contribution", "dynamic-k", "tau", [0.5, 0.9, 0.1], {"shared": 2}),
        ("analytic", "top-k", "k", [3], {"glu": False, "biases": True}),
        ("gate", "threshold", "threshold", [0.5, 3.0, 100.0], {}),
    ],
)
def test_decode_step_is_router_selection_and_experts(
    kind: str,
    rule: str,
    name: str,
    values: list[float],
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger=adaptive_compiled.__name__)
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: LinearRouter(HIDDEN, EXPERTS, normalised=True),
        "contribution": lambda: ContributionRouter(HIDDEN, EXPERTS, width=8),
        "analytic": lambda: AnalyticRouter(HIDDEN, EXPERTS, gated=False, activation=nn.SiLU()),
    }
    for seed in range(2):
        weights = make(torch.float32, seed=seed, **options)
        router = filled(made[kind](), seed) if kind in made else None
        decoder = Decoder(weights, router)
        x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            scores = (router or Gate(weights))(x)
            for value in values:
                found = decode_step(x, decoder, rule, value)
                mask = select_experts(scores, {"rule": rule, name: value})
                if found is None:
                    # more than the limit is selected: not gathered
                    assert rule == "top-k"
                    assert value / EXPERTS > 0.8
                    continue
                assert torch.equal(found[1], mask)
                assert close(found[0], truth(x, weights, mask))
    assert len(adaptive_compiled._STEPS) == 1
    assert "again" not in caplog.text


@needs_compiler
@pytest.mark.slow
def test_without_a_compiler_decoding_works(tmp_path: Path) -> None:
    code = """
import logging, torch
logging.basicConfig(level=logging.WARNING)
from torch.nn import functional
from adaconvert.testing.compilers import has_compiler
from adaconvert.modeling.adaptive_execution import Decoder, ExpertWeights, decode_step, run_experts
up, down = torch.randn(8, 4), torch.randn(4, 8)
weights = ExpertWeights(None, up, down, None, None, None, functional.relu, 2)
x, mask = torch.randn(1, 4), torch.tensor([[True, False, False, True]])
with torch.inference_mode():
    for _ in range(3):
        out, pairs = run_experts(x, weights, mask, path="gather")
    assert decode_step(x, Decoder(weights, None), "top-k", 2) is None
rows = [0, 1, 6, 7]
expected = functional.linear(torch.relu(functional.linear(x, up[rows])), down[:, rows])
assert pairs == 4 + 4 // 2 and (out - expected).abs().max() < 1e-5, (out, expected)
print("done")
"""
    environment = {
        "PATH": str(tmp_path),
        "CXX": str(tmp_path / "no-compiler"),
        "HOME": str(tmp_path),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "ADACONVERT_COMPILE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout == "done\n", done.stderr
    assert "decoding is not compiled" in done.stderr


# -- failures, with stand-ins for the compiler


def stand_in(monkeypatch: pytest.MonkeyPatch, step: Callable[..., Any]) -> None:
    monkeypatch.setattr(adaptive_compiled, "_make_step", lambda *arguments: step)


def decoded(weights: ExpertWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.tensor([[True, False, True, False, False, False]])
    with torch.inference_mode():
        return run_experts(x, weights, mask, path="gather")[0], truth(x, weights, mask)


@pytest.mark.parametrize("kind", ["raises", "wrong", "not a number", "slow", "fails later"])
def test_a_compiled_form_that_fails_its_trial_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    weights, x = make(torch.float32), torch.randn(1, HIDDEN)
    calls = []

    def step(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        mask = rest[7]
        if kind == "raises" or (kind == "fails later" and len(calls) > 12):
            raise RuntimeError("no such\ncompiler")
        out = truth(x, weights, mask[None]).float()
        if kind == "slow":
            torch.randn(300, 300) @ torch.randn(300, 300)
        return out * {"wrong": 1.01, "not a number": float("nan")}.get(kind, 1.0), mask

    stand_in(monkeypatch, step)
    monkeypatch.setattr(adaptive_compiled, "SLOWEST", 2.0 if kind == "slow" else 1e3)
    for _ in range(15):
        out, expected = decoded(weights, x)
        assert close(out, expected)
    (case,) = adaptive_compiled._CASES.values()
    assert not case.compiled
    assert caplog.text.count("decoding is not compiled") == 1
    before = len(calls)
    decoded(weights, x)
    assert len(calls) == before


def test_a_decoder_that_fails_hands_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(*arguments: Any) -> Any:
        raise RuntimeError("cannot")

    stand_in(monkeypatch, step)
    decoder = Decoder(make(torch.float32), None)
    with torch.inference_mode():
        for _ in range(3):
            assert decode_step(torch.randn(1, HIDDEN), decoder, "top-k", 2) is None
    assert caplog.text.count("decoding is not compiled: cannot") == 1


@needs_compiler
@pytest.mark.slow
def test_a_decoder_follows_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing guards the bare graph, so other memory, types and layouts must be noticed."""
    weights = make(torch.float32, major=False)
    weights = dataclasses.replace(
        weights, **{name: nn.Parameter(getattr(weights, name)) for name in ("gate", "up", "down")}
    )
    router = filled(LinearRouter(HIDDEN, EXPERTS, normalised=False), 0)
    decoder, x = Decoder(weights, router), torch.randn(1, HIDDEN)

    def right(x: Tensor) -> bool:
        with torch.inference_mode():
            mask = select_experts(router(x), {"rule": "top-k", "k": 2})
            found = decode_step(x, decoder, "top-k", 2)
        assert found is not None
        return torch.equal(found[1], mask) and close(found[0], truth(x, weights, mask))

    assert right(x)
    assert isinstance(weights.down, nn.Parameter)
    keep_rows(weights.down)
    assert right(x)
    with torch.no_grad():
        weights.down.mul_(2)
    assert right(x)
    assert weights.gate is not None
    weights.gate.data = -weights.gate.data
    assert right(x)
    router.weight.data = router.weight.data.flip(0).double()
    assert right(x)
    for parameter in (weights.gate, weights.up, weights.down):
        parameter.data = parameter.data.bfloat16()
    with torch.inference_mode():
        assert decode_step(x, decoder, "top-k", 2) is None
    assert right(x.bfloat16())


def test_arguments_that_are_not_recognised_are_not_bound() -> None:
    backend = Inductor()
    assert backend.bound({}, 0) is None
    backend._made, backend._names = (lambda *arguments: arguments), ["l_x_", "l_up_", "u0"]
    bound = backend.bound({"up": torch.ones(2)}, 5)
    assert bound is not None
    assert bound(torch.zeros(1))[2] == 5
    assert backend.bound({"down": torch.ones(2)}, 5) is None
    backend._names = ["s7", "l_x_"]
    several = backend.bound({}, 5)
    assert several is not None
    assert several(torch.zeros(3, 2))[0] == 3
    backend._names = ["s7", "s8", "l_x_"]
    assert backend.bound({}, 5) is None


def test_decode_step_declines_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda *arguments: pytest.fail("ran"))
    monkeypatch.setattr(adaptive_compiled, "ANY_BYTES", 0)
    weights, x = make(torch.float32), torch.randn(1, HIDDEN)
    decoder = Decoder(weights, None)
    assert decode_step(x, decoder, "top-k", 2) is None  # gradients
    with torch.inference_mode():
        assert decode_step(x, decoder, "top-p", 0.5) is None
        assert decode_step(x, decoder, "top-k", 6) is None
        assert decode_step(x.expand(2, -1), decoder, "top-k", 2) is None
        assert decode_step(x.double(), decoder, "top-k", 2) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert decode_step(x, decoder, "top-k", 2) is None


def test_the_variable_and_the_size_decide_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    small, wanted = make(torch.float32), adaptive_compiled.compile_wanted
    large = ExpertWeights(
        *(None, torch.zeros(512, 512), torch.zeros(512, 512), None, None, None),
        *(functional.relu, 32),
    )
    for value, expected in (("0", (False, False)), ("1", (True, True)), ("", (False, True))):
        monkeypatch.setenv("ADACONVERT_COMPILE", value)
        assert (wanted(small), wanted(large)) == expected
    monkeypatch.setattr(adaptive_compiled, "_STEPS", ["x"] * adaptive_compiled.COMPILE_CASES)
    assert not wanted(large)
    monkeypatch.setenv("ADACONVERT_COMPILE", "yes")
    with pytest.raises(ValueError, match="ADACONVERT_COMPILE is 'yes'; expected 0, 1 or nothing"):
        wanted(large)


def test_activations_that_compute_alike_share_a_graph() -> None:
    key = adaptive_compiled._activation_key
    assert key(nn.SiLU()) == key(nn.SiLU())
    assert key(nn.GELU()) != key(nn.GELU(approximate="tanh"))
    assert key(functional.relu) == functional.relu
    own = nn.PReLU()
    assert key(own) is own
    assert key(nn.PReLU()) is not own
