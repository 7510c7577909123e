"""The kernels of `dynk_decode` in Triton's interpreter, against fp64."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaconvert.kernels import decode, dispatch, reference_decode, triton_decode
from adaconvert.kernels.decode_steps import Call
from adaconvert.kernels.reference import expert_ffn

LIMITS = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 1e-2,
}
pytestmark = pytest.mark.usefixtures("poison")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def call_of(
    *,
    tokens: int = 2,
    slots: int = 3,
    experts: int = 5,
    width: int = 8,
    hidden: int = 64,
    shared: int = 0,
    glu: bool = True,
    biases: bool = False,
    weights: bool = False,
    dtype: torch.dtype = torch.float32,
    activation: str = "silu",
) -> Call:
    def new(*shape: int, unless: bool = False) -> Tensor | None:
        return None if unless else draw(*shape, dtype=dtype)

    every = torch.stack([torch.randperm(experts) for _ in range(tokens)]) if tokens else None
    given: dict[str, Any] = {
        "x": draw(tokens, hidden, dtype=dtype),
        "ids": torch.zeros(0, slots).int() if every is None else every[:, :slots].int(),
        "counts": torch.randint(1, slots + 1, (tokens,)),
        "gate": new(experts, width, hidden, unless=not glu),
        "up": new(experts, width, hidden),
        "down_rows": new(experts, width, hidden),
        "gate_bias": new(experts, width, unless=not (biases and glu)),
        "up_bias": new(experts, width, unless=not biases),
        "down_bias": new(experts, hidden, unless=not biases),
        "out_bias": new(hidden, unless=not biases),
        "weights_of": torch.rand(tokens, slots) + 0.5 if weights else None,
        "shared_gate": new(shared, hidden, unless=not (shared and glu)),
        "shared_up": new(shared, hidden, unless=not shared),
        "shared_down_rows": new(shared, hidden, unless=not shared),
        "shared_gate_bias": new(shared, unless=not (shared and glu and biases)),
        "shared_up_bias": new(shared, unless=not (shared and biases)),
        "activation": activation,
    }
    return Call(**given)


def exact(call: Call) -> Tensor:
    floats = {
        name: value.double()
        for name, value in call._asdict().items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    return reference_decode.dynk_decode(call._replace(**floats))


def error(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def check(call: Call, **options: Any) -> Tensor:
    """The kernels are as exact as promised, repeat bit by bit, in either order of programs."""
    found, true = triton_decode.run(call, **options), exact(call)
    assert found.dtype == call.x.dtype
    assert found.shape == call.x.shape
    assert error(found, true) < LIMITS[call.x.dtype]
    assert torch.equal(triton_decode.run(call, **options), found)
    assert torch.equal(triton_decode.run(call, **options, reverse=True), found)
    return found


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("glu", "biases", "weights", "shared"), [(1, 1, 1, 5), (0, 0, 0, 0)])
def test_kernels_compute_the_reference(
    dtype: torch.dtype, glu: int, biases: int, weights: int, shared: int
) -> None:
    call = call_of(
        glu=bool(glu), biases=bool(biases), weights=bool(weights), shared=shared, dtype=dtype
    )
    found, true = check(call), exact(call)
    # the test sees a result of zeros, and one expert that is missing
    assert error(torch.zeros_like(found), true) > 0.5
    assert error(triton_decode.run(call._replace(counts=call.counts - 1)), true) > 0.05


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
def test_every_activation(activation: str) -> None:
    for glu in (True, False):
        check(call_of(glu=glu, activation=activation, tokens=1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("hidden", "width", "experts", "slots", "shared"),
    [
        (1, 1, 1, 1, 1),
        (61, 3, 7, 7, 0),
        (257, 5, 3, 2, 17),
        (130, 1, 9, 4, 0),
        (40, 33, 2, 2, 3),
        (300, 16, 5, 5, 70),
    ],
)
def test_sizes_that_are_no_multiples(
    hidden: int, width: int, experts: int, slots: int, shared: int
) -> None:
    check(
        call_of(
            hidden=hidden, width=width, experts=experts, slots=slots, shared=shared, biases=True
        )
    )


@pytest.mark.parametrize("shares", [1, 2, 8])
@pytest.mark.parametrize("shared", [0, 100])
def test_the_rows_may_be_split(shares: int, shared: int) -> None:
    call = call_of(width=40, slots=5, shared=shared, biases=True, weights=True)
    check(call._replace(counts=torch.tensor([5, 3])), shares=shares)


def test_sizes_decide_how_rows_are_split() -> None:
    assert triton_decode._shares(1, 2048, 8192) == 16
    assert triton_decode._shares(8, 2048, 8192) == 2
    assert triton_decode._shares(8, 4096, 8192) == 1
    assert triton_decode._shares(1, 2048, 100) == 2
    assert triton_decode._shares(1, 1 << 20, 0) == 1


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_up_to_eight_tokens(tokens: int) -> None:
    check(call_of(tokens=tokens, hidden=32, width=4))


def test_no_token_is_no_output() -> None:
    assert triton_decode.run(call_of(tokens=0)).shape == (0, 64)


@pytest.mark.parametrize("shares", [1, 4])
def test_no_expert_is_exactly_zero(shares: int) -> None:
    call = call_of(weights=True)
    for counts in (torch.zeros(2, dtype=torch.int64), torch.tensor([-1, -(2**40)])):
        none = triton_decode.run(call._replace(counts=counts), shares=shares)
        assert torch.equal(none, torch.zeros(2, 64))


def test_ids_that_are_no_expert_are_passed_over() -> None:
    call = call_of(biases=True, weights=True, slots=5)._replace(counts=torch.tensor([5, 4]))
    ids = torch.tensor([[-1, 2, 5, 0, 2**31 - 1], [-(2**31), 6, 4, 4, 1]])
    for dtype in (torch.int32, torch.int64):
        check(call._replace(ids=ids.to(dtype)))
    every = call._replace(ids=torch.full((2, 5), -1), out_bias=None)
    assert torch.equal(triton_decode.run(every), torch.zeros(2, 64))


def test_what_follows_the_counts_is_not_read() -> None:
    call = call_of(weights=True, slots=5)._replace(counts=torch.tensor([2, 3]))
    before = triton_decode.run(call)
    after = torch.arange(5) >= call.counts[:, None]
    assert call.weights_of is not None
    changed = call._replace(
        ids=call.ids.masked_fill(after, 2**31 - 1),
        weights_of=call.weights_of.masked_fill(after, torch.nan),
    )
    assert torch.equal(triton_decode.run(changed), before)


def test_counts_past_the_slots_are_the_slots() -> None:
    call = call_of()
    full = triton_decode.run(call._replace(counts=torch.tensor([3, 3])))
    assert torch.equal(triton_decode.run(call._replace(counts=torch.tensor([4, 1000]))), full)


def test_weights_of_other_experts_are_not_read() -> None:
    call = call_of(experts=4, slots=2, shared=3, biases=True)
    call = call._replace(ids=torch.tensor([[0, 2], [2, 0]]), counts=torch.tensor([2, 1]))
    before = triton_decode.run(call)
    spoilt = {}
    for name in ("gate", "up", "down_rows", "gate_bias", "up_bias", "down_bias"):
        spoilt[name] = getattr(call, name).clone()
        spoilt[name][[1, 3]] = torch.nan
    assert torch.equal(triton_decode.run(call._replace(**spoilt)), before)


def test_nan_in_one_token_stays_there() -> None:
    call = call_of(tokens=3, activation="relu")
    before = triton_decode.run(call)
    call.x[1, 5] = torch.nan
    after = triton_decode.run(call)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def test_any_strides() -> None:
    plain = call_of(biases=True, weights=True, shared=4)
    turned = {}
    for name, value in plain._asdict().items():
        if isinstance(value, Tensor) and value.dim() > 1:
            order = range(value.dim() - 1, -1, -1)
            turned[name] = value.permute(*order).contiguous().permute(*order)
    found = triton_decode.run(plain._replace(**turned))
    assert torch.equal(found, triton_decode.run(plain))


def test_offsets_past_32_bits() -> None:
    """Experts lie 2^30 numbers apart, in a file with holes."""
    call = call_of(tokens=1, slots=2, experts=4, width=2, hidden=4, glu=False)
    call = call._replace(ids=torch.tensor([[3, 0]]), counts=torch.tensor([2]))
    with tempfile.NamedTemporaryFile() as file:
        far = torch.from_file(file.name, shared=True, size=3 * 2**30 + 8, dtype=torch.float32)
        view = far.as_strided((4, 2, 4), (2**30, 4, 1))
        for name in ("up", "down_rows"):
            view.copy_(getattr(call, name))
            found = triton_decode.run(call._replace(**{name: view}))
            assert torch.equal(found, triton_decode.run(call))


# -- what the adaptive runtime calls


def network(
    *, glu: bool = True, shared: int = 0, experts: int = 6, width: int = 4, hidden: int = 24
) -> dict[str, Any]:
    neurons = shared + experts * width
    return {
        "gate": draw(neurons, hidden) if glu else None,
        "up": draw(neurons, hidden),
        "down": draw(hidden, neurons),
        "gate_bias": draw(neurons) if glu else None,
        "up_bias": draw(neurons),
        "down_bias": draw(hidden),
        "activation": functional.silu,
        "width": width,
        "shared": shared,
    }


@pytest.mark.parametrize(
    ("glu", "shared", "neuron_major"), [(1, 0, 0), (1, 5, 1), (0, 5, 0), (0, 0, 1)]
)
def test_expert_ffn_is_the_runtime_s(glu: int, shared: int, neuron_major: int) -> None:
    options, x = network(glu=bool(glu), shared=shared), draw(3, 24)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0] * 6, [1] * 6]).bool()
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    if neuron_major:
        options["down"] = options["down"].t().contiguous().t()
    for factors in (None, torch.rand(3, 6)):
        given = {"weights_per_expert": factors}
        found = decode.expert_ffn(x, mask, **options, **given)
        true = expert_ffn(x.double(), mask, **wide, **given)
        assert error(found, true) < LIMITS[torch.float32]
        assert error(decode.expert_ffn(x, ~mask, **options, **given), true) > 0.1


def test_expert_ffn_of_an_unknown_activation_runs_by_torch() -> None:
    options, x = {**network(), "activation": torch.sin}, draw(2, 24)
    mask = torch.ones(2, 6, dtype=torch.bool)
    assert torch.equal(decode.expert_ffn(x, mask, **options), expert_ffn(x, mask, **options))


@pytest.mark.parametrize("experts", [1, 37, 300])
def test_masks_become_lists_in_order(experts: int) -> None:
    mask = torch.rand(4, experts) < 0.3
    mask[0], mask[1] = False, True
    # a mask whose rows and columns lie apart
    apart = torch.zeros(4, 2 * experts, dtype=torch.bool)
    apart[:, ::2] = mask
    factors = torch.rand(experts, 4).t()
    for reverse, given in ((False, mask), (True, apart[:, ::2])):
        ids, counts, found = triton_decode.compact(given, factors, reverse=reverse)
        assert found is not None
        assert torch.equal(counts, mask.sum(dim=1).int())
        for token, row in enumerate(mask):
            chosen = row.nonzero().flatten()
            assert torch.equal(ids[token, : len(chosen)], chosen.int())
            assert torch.equal(found[token, : len(chosen)], factors[token, chosen])


def test_insisting_runs_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(glu=False)
    asked = {"down_rows": call.down_rows, "activation": "silu", "glu": False, "up": call.up}
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    seen: list[Call] = []
    run = triton_decode.run
    monkeypatch.setattr(triton_decode, "run", lambda call: seen.append(call) or run(call))
    found = decode.dynk_decode(call.x, call.ids, call.counts, **asked)
    assert len(seen) == 1
    assert error(found, exact(call)) < LIMITS[torch.float32]
    monkeypatch.setenv(dispatch.VARIABLE, "auto")
    decode.dynk_decode(call.x, call.ids, call.counts, **asked)
    assert len(seen) == 1


def test_the_runtime_s_select_gives_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    options, x = network(), draw(2, 24)
    facts = {"device": "cpu", "dtype": x.dtype, "tokens": 2, "hidden": 24, "neurons": 24}
    kernel = dispatch.select(
        "expert_ffn", **facts, experts=6, width=4, shared=0, glu=True, grad=False
    )
    assert kernel is not None
    mask = torch.eye(6, dtype=torch.bool)[:2]
    found = kernel(x, mask, gated=None, weights_per_expert=None, **options)
    assert error(found, expert_ffn(x, mask, **options).double()) < LIMITS[torch.float32]
