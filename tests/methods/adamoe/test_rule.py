"""Which real experts run with which weights once biases have moved: the rule written out.

Letters: n real experts, M null ones, k experts per token of the source, K' slots, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from adaconvert.arch.mixture import RENORM, Mixture
from adaconvert.evaluate.compute import estimated
from adaconvert.io.source import Source
from adaconvert.modeling.loading import load_model
from adaconvert.testing.mixtures_by_case import (
    CASES,
    blocks_of,
    gates_of,
    logits_of,
    null,
)

EPS = torch.finfo(torch.float32).eps

Sources = Callable[..., Path]


def by_rule(
    block: Mixture, real: Tensor, null: Tensor, slots: int, *, least: int
) -> tuple[Tensor, Tensor]:
    """Return weights [T, n] of the K' best of all logits, ties to real ones; and whether a token's
    choice is clear of rounding.

    Args:
        block: combine and scaling.
        real, null: logits [T, n] and [T, M], the bias in the second.
        slots: K'.
        least: real experts that run in any case.
    """
    both = torch.cat([real, null], dim=-1).double()
    order = both.argsort(dim=-1, descending=True, stable=True)
    ranked = both.gather(-1, order)
    chosen = torch.zeros_like(both, dtype=torch.bool).scatter(-1, order[:, :slots], True)
    runs = chosen[:, : real.shape[-1]]
    if least:
        runs = runs.scatter(-1, real.argmax(-1, keepdim=True), True)
    scores = real.double().exp()
    total = (scores * runs if block.combine == RENORM else scores).sum(-1, keepdim=True)
    weights = scores * runs / total.clamp_min(1e-300) * block.scaling
    return weights, ranked[:, slots - 1] - ranked[:, slots] > 1e-4


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_a_moved_bias_runs_what_the_rule_says(
    name: str, least: int, sources: Sources, tmp_path: Path
) -> None:
    source = sources(name, 1)
    out = null(source, tmp_path / "a", null_experts=12, min_real=least)
    model: Any = load_model(out, dtype="float32")
    for index, site in enumerate(model.adaptive_sites().values()):
        # copies tie among themselves; apart, every choice has one answer
        rows = site.null_experts.weight
        with torch.no_grad():
            rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(index)) / 20)
    means = []
    for bias in (-1.5, -0.4, 0.3, 2.0, 9.0):
        for site in model.adaptive_sites().values():
            with torch.no_grad():
                site.null_experts.bias.fill_(bias)
        found, _ = gates_of(model, source)
        run = torch.zeros(())
        for block in blocks_of(source):
            dense, rows = found.dense[block.path], model.get_submodule(block.path).null_experts
            nulls = linear(found.inputs[block.path], rows.weight) + bias
            wanted, clear = by_rule(
                block, found.logits[block.path], nulls, 3 * block.top_k, least=least
            )
            assert clear.double().mean() > 0.9
            dense, wanted = dense[clear].double(), wanted[clear]
            assert torch.equal(dense > 0, wanted > 0)
            assert (dense - wanted).norm() <= 8 * EPS * wanted.norm()
            assert int((dense > 0).sum(-1).min()) >= least
            run += (dense > 0).sum(-1).float().mean()
        means.append(float(run))
    assert means == sorted(means, reverse=True)
    assert means[0] > means[-1]


def test_random_logits_run_the_share_the_paper_expects(sources: Sources, tmp_path: Path) -> None:
    """K' n / (n + M) real experts per token (AdaMoE 2406.13233) when all rows are alike."""
    out = null(sources("mixtral", 0), tmp_path / "a", null_experts=12, top_k=5)
    model: Any = load_model(out, dtype="float32")
    for site in model.adaptive_sites().values():
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for rows in (site.adaptive_router.weight, site.null_experts.weight):
                rows.copy_(torch.randn(rows.shape, generator=generator))
            x = torch.randn(20000, 32, generator=generator)
            found = site.adaptive_decide(x)
        mean = found.kept.double().sum(-1).mean()
        # rows are drawn once, so experts differ in how often they win: 18 rows of norm about 5.7
        assert abs(mean - 5 * 6 / 18) < 0.25


@pytest.mark.parametrize("name", CASES)
def test_the_account_counts_real_experts_and_null_rows(
    name: str, sources: Sources, tmp_path: Path
) -> None:
    """The source's own rule costs what shapes say of the source; nulls add their rows of the router
    and take away the experts that do not run."""
    source = sources(name)
    model: Any = load_model(null(source, tmp_path / "a", null_experts=12), dtype="float32")
    blocks = blocks_of(source)
    shapes = estimated(Source.open(str(source)), {40: 1}).flops
    with model.set_compute(1.0), model.account() as whole:
        logits_of(model)
    assert whole.flops_per_token()["total"] == shapes
    assert whole.compute() == 1.0
    for bias in (0.0, 1.0):
        for site in model.adaptive_sites().values():
            with torch.no_grad():
                site.null_experts.bias.fill_(bias)
        with model.account() as account:
            logits_of(model)
        spared = 0.0
        for block in blocks:
            counted = account.sites[block.path]
            run = float(counted.experts.sum()) / counted.tokens
            assert (run == block.top_k) == (bias == 0)
            spared += 6 * 32 * block.width * (block.top_k - run)
        rows = 2 * 32 * 12 * len(blocks)
        total = account.flops_per_token()["total"]
        assert abs(total - (shapes + rows - spared)) <= 1e-9 * total
