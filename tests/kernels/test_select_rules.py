"""What `router_select` promises: ties, tau, null experts, what is kept, what transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.kernels.routing import SCORES, router_select


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(((found.double() - wanted).norm() / wanted.norm()).detach())


# -- equal scores


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_equal_scores_the_lower_index_is_selected(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, 40, dtype=dtype)
    zeros[1, ::2] = -0.0
    options = {"top_k": 5, "normalise": "none"}
    assert router_select(zeros, **options).experts.tolist() == [[0, 1, 2, 3, 4]] * 2
    zeros[:, 17] = 1
    assert router_select(zeros, **options).experts.tolist() == [[17, 0, 1, 2, 3]] * 2
    assert router_select(-zeros, **options).experts.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_scores_that_round_to_the_same_are_ordered_by_their_logits() -> None:
    logits = torch.tensor([[-300.0, -200.0, 0.0, -250.0]])
    found = router_select(logits, top_k=4, normalise="none")
    assert found.experts.tolist() == [[2, 1, 3, 0]]
    assert found.weights.tolist() == [[1.0, 0.0, 0.0, 0.0]]


# -- tau


@pytest.mark.parametrize("scores", SCORES)
def test_tau_0_keeps_all_and_tau_1_the_best_alone(scores: str) -> None:
    logits = draw(50, 9)
    logits[7, 3] = logits[7, 5] = 30.0
    options = {"top_k": 9, "normalise": "selected", "scores": scores}
    everyone = router_select(logits, **options)
    kept = router_select(logits, tau=0.0, **options)
    assert torch.equal(kept.experts, everyone.experts)
    assert torch.equal(kept.weights, everyone.weights)
    best = router_select(logits, tau=1.0, **options)
    assert torch.equal(best.experts[:, 0], logits.argmax(dim=-1))
    assert best.experts[7, :3].tolist() == [3, 5, -1]
    assert int(best.counts.sum()) == 51
    assert (best.weights.sum(dim=-1) - 1).abs().max() <= 1e-6


def test_tau_keeps_the_best_even_where_a_bias_selected_a_poor_one() -> None:
    logits = torch.tensor([[5.0, 0.0, -5.0]])
    bias = torch.tensor([0.0, 0.0, 2.0])
    found = router_select(logits, top_k=2, normalise="none", tau=0.9, bias=bias)
    assert found.experts.tolist() == [[2, 0]]


def test_tau_is_relative_to_the_highest_of_all_also_where_scores_underflow() -> None:
    logits = torch.tensor([[-120.0, -120.5, -130.0, -140.0]])
    options = {"top_k": 4, "tau": 0.5, "scores": "sigmoid", "normalise": "selected"}
    found = router_select(logits, **options)
    assert found.experts.tolist() == [[0, 1, -1, -1]]
    assert found.weights.tolist() == [pytest.approx([0.62245933, 0.37754067, 0, 0])]


# -- null experts


def test_copies_of_the_rows_as_null_experts_change_nothing() -> None:
    """AdaMoE's start: c copies of each row and k' = k (1 + c)."""
    logits = draw(400, 8)
    plain = router_select(logits, top_k=2, normalise="selected")
    found = router_select(torch.cat([logits] * 3, dim=1), top_k=6, null=16, normalise="real")
    real = found.experts >= 0
    assert torch.equal(real.sum(dim=-1), torch.full((400,), 2))
    assert torch.equal(found.experts[real], plain.experts.flatten())
    assert (found.weights[real] - plain.weights.flatten()).abs().max() <= 1e-6
    assert torch.equal(found.counts, plain.counts.repeat(3))


def test_real_weights_add_up_to_one_or_nothing_is_real() -> None:
    found = router_select(draw(500, 12), top_k=2, null=8, normalise="real")
    some = (found.experts >= 0).any(dim=-1)
    assert 0 < int(some.sum()) < 500
    assert (found.weights.sum(dim=-1) - some.float()).abs().max() <= 1e-6
    assert (found.weights[found.experts < 0] == 0).all()


def test_random_logits_select_the_expected_number_of_real_experts() -> None:
    found = router_select(draw(20_000, 24), top_k=5, null=16, normalise="real")
    mean = float((found.experts >= 0).sum()) / 20_000
    # k' n / (n + m); five standard deviations of the mean
    assert abs(mean - 5 * 8 / 24) <= 5 * (5 * (1 / 3) * (2 / 3) / 20_000) ** 0.5


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_forced_real_gives_every_token_the_best_real_expert(top_k: int) -> None:
    logits = draw(300, 12)
    options = {"top_k": top_k, "null": 9, "normalise": "real"}
    plain = router_select(logits, **options)
    forced = router_select(logits, force_real=True, **options)
    some = (plain.experts >= 0).any(dim=-1)
    assert not some.all()
    assert torch.equal(forced.experts[some], plain.experts[some])
    assert torch.equal(forced.experts[~some, -1], logits[~some, :3].argmax(dim=-1))
    assert (forced.weights.sum(dim=-1) - 1).abs().max() <= 1e-6
    assert int(forced.counts.sum()) == 300 * top_k


def test_shares_survive_null_experts_far_above() -> None:
    logits = torch.tensor([[1.0, 0.0, 900.0], [-900.0, -901.0, 900.0]])
    wanted = torch.tensor([0.0, 0.731058578, 0.268941421])
    for normalise in ("real", "all_real"):
        found = router_select(logits, top_k=3, null=1, normalise=normalise)
        assert (found.weights - wanted).abs().max() <= 1e-6
    leaf = logits.requires_grad_()
    weights = router_select(leaf, top_k=3, null=1, normalise="real").weights
    (grad,) = torch.autograd.grad(weights[:, 1].sum(), leaf)
    assert (grad - 0.196611933 * torch.tensor([1.0, -1.0, 0.0])).abs().max() <= 1e-6


def test_order_within_the_null_group_does_not_matter() -> None:
    logits = draw(200, 12)
    options = {"top_k": 4, "null": 8, "normalise": "real"}
    other = torch.cat([logits[:, :4], logits[:, 4:].flip(1)], dim=1)
    one, two = router_select(logits, **options), router_select(other, **options)
    assert torch.equal(one.experts, two.experts)
    assert torch.equal(one.weights, two.weights)
    assert torch.equal(one.counts[4:], two.counts[4:].flip(0))
    across = torch.cat([logits[:, 4:5], logits[:, 1:4], logits[:, :1], logits[:, 5:]], dim=1)
    assert not torch.equal(one.weights, router_select(across, **options).weights)


# -- what transformers computes


def parts(output: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor]:
    """Return weights and indices [T, K] of a stock router, whatever else it returns."""
    found = [part for part in output if part.shape[-1] == top_k]
    (indices,) = [part for part in found if not part.is_floating_point()]
    (weights,) = [part for part in found if part.is_floating_point()]
    return weights, indices


def stock() -> Iterator[tuple[torch.nn.Module, str, dict[str, Any]]]:
    """Yield routers of 9 experts, with the name of their matrix and our options."""
    from transformers import LongcatFlashConfig, MixtralConfig, OlmoeConfig
    from transformers.models.longcat_flash import modeling_longcat_flash as longcat
    from transformers.models.mixtral import modeling_mixtral as mixtral
    from transformers.models.olmoe import modeling_olmoe as olmoe

    config = MixtralConfig(hidden_size=16, num_local_experts=9, num_experts_per_tok=3)
    yield mixtral.MixtralTopKRouter(config), "weight", {"normalise": "selected"}
    for norm in (True, False):
        config = OlmoeConfig(
            hidden_size=16, num_experts=9, num_experts_per_tok=3, norm_topk_prob=norm
        )
        yield (
            olmoe.OlmoeTopKRouter(config),
            "weight",
            {"normalise": "selected" if norm else "none"},
        )
    config = LongcatFlashConfig(
        hidden_size=16, n_routed_experts=6, zero_expert_num=3, moe_topk=3, num_experts_per_tok=3
    )
    router = longcat.LongcatFlashTopkRouter(config)
    router.e_score_correction_bias = draw(9, seed=5) / 10
    options = {"normalise": "none", "bias": router.e_score_correction_bias}
    yield router, "classifier.weight", options | {"scaling": config.routed_scaling_factor}


def test_equals_the_routers_of_transformers() -> None:
    x = draw(300, 16)
    for router, name, options in stock():
        matrix = router.get_parameter(name)
        matrix.data = draw(9, 16, seed=2) / 8
        with torch.no_grad():
            weights, indices = parts(router(x), 3)
            found = router_select(x @ matrix.T, top_k=3, **options)
        order = weights.argsort(dim=-1, descending=True)
        ours = found.weights.argsort(dim=-1, descending=True)
        assert torch.equal(found.experts.gather(1, ours), indices.gather(1, order))
        assert error(found.weights.gather(1, ours), weights.gather(1, order).double()) <= 1e-6


@pytest.mark.parametrize("padded", [False, True])
def test_the_sums_give_the_load_balancing_loss_of_transformers(padded: bool) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = draw(3 * 20, 8).requires_grad_()
    mask = torch.ones(3, 20, dtype=torch.int64)
    if padded:
        mask[0, :7] = mask[2, :1] = 0
    counted = mask.flatten().bool()
    wanted = load_balancing_loss_func((logits,), 8, 2, mask if padded else None)
    found = router_select(
        logits, top_k=2, normalise="selected", counted=counted if padded else None
    )
    tokens = counted.sum()
    loss = 8 * (found.counts / tokens * found.probability_sums / tokens).sum()
    assert error(loss, wanted.double()) <= 1e-6
    (theirs,) = torch.autograd.grad(wanted, logits)
    (ours,) = torch.autograd.grad(loss, logits)
    assert error(ours, theirs.double()) <= 1e-5


# -- what is promised besides


def test_only_logits_and_small_indices_are_kept() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    logits = draw(64, 32, dtype=torch.bfloat16).requires_grad_()
    counted = torch.ones(64, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        router_select(
            logits, top_k=4, null=8, normalise="real", bias=torch.zeros(32), counted=counted
        )
    own = [t for t in kept if t.data_ptr() not in (logits.data_ptr(), counted.data_ptr())]
    assert len(kept) == 3
    assert sum(t.nbytes for t in own) == 64 * 4 * 4


def test_what_has_no_gradient_says_so() -> None:
    logits = draw(4, 5, dtype=torch.float64).requires_grad_()
    bias = torch.zeros(5, requires_grad=True)
    found = router_select(logits, top_k=2, normalise="selected", bias=bias)
    assert not found.experts.requires_grad
    assert not found.counts.requires_grad
    found.weights.square().sum().backward()
    assert bias.grad is None
    again = router_select(logits, top_k=2, normalise="selected").weights.square().sum()
    (grad,) = torch.autograd.grad(again, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiles_into_one_graph() -> None:
    options = {"top_k": 3, "null": 2, "normalise": "real", "tau": 0.2, "force_real": True}

    def outputs(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = router_select(logits, **options)
        return found.weights, found.experts, found.probability_sums

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    one, two = (draw(9, 7).requires_grad_() for _ in range(2))
    plain, traced = outputs(one), compiled(two)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    for leaf, (weights, _, sums) in ((one, plain), (two, traced)):
        (weights.square().sum() + sums.square().sum()).backward()
        assert leaf.grad is not None
    assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"logits": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "logits are torch.int64"),
        ({"logits": torch.zeros(2, 3, 4)}, ValueError, r"shape \(2, 3, 4\); expected \[tokens"),
        ({"top_k": 0}, ValueError, "top_k is 0; expected 1 to 4"),
        ({"top_k": 5}, ValueError, "top_k is 5; expected 1 to 4"),
        ({"null": 4}, ValueError, "null is 4; expected 0 to 3 of 4 experts"),
        ({"null": -1}, ValueError, "null is -1"),
        ({"tau": 1.5}, ValueError, "tau is 1.5; expected 0 to 1"),
        ({"tau": float("nan")}, ValueError, "tau is nan"),
        ({"scores": "relu"}, ValueError, "scores is 'relu'; expected one of softmax, sigmoid"),
        ({"normalise": "all"}, ValueError, "normalise is 'all'; expected one of none, selected"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\); expected \[4\]"),
        ({"counted": torch.ones(3) > 0}, ValueError, r"counted has shape \(3,\); expected \[2\]"),
        ({"counted": torch.ones(2)}, TypeError, "counted is torch.float32; expected bool"),
    ],
)
def test_what_does_not_fit_is_an_error(
    change: dict[str, Any], kind: type[Exception], message: str
) -> None:
    options = {"logits": torch.zeros(2, 4), "top_k": 2, "normalise": "selected"} | change
    with pytest.raises(kind, match=message):
        router_select(options.pop("logits"), **options)
