"""Blocks that tokens skip, against stock code in which every token runs and the rest is masked."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adaconvert.modeling.adaptive_depth import _best
from adaconvert.modeling.adaptive_schema import AdaptiveConfigError
from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.depth_by_hand import FAMILIES, depth_by_hand

KINDS = ("skip", "skip-kv", "mod")
BLOCKS = (1, 2)
#: torch multiplies experts' matrices in this dtype; and eager attention of stock code gives NaN for
#: padding in float64.
DTYPE = {"mixtral": "float32", "gemma2": "float32"}
CLOSE = {"float32": 1e-5, "float64": 1e-12}
Made = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("depth")

    def load(family: str, kind: str = "skip", **more: Any) -> tuple[Any, Any]:
        """Return a model with routed blocks, and the dense one."""
        dense = root / family
        if not dense.exists():
            tiny_models.make(family, dense, layers=4, max_shard_size="1GB")
        number = len(list(root.iterdir()))
        folder = depth_by_hand(dense, root / f"{number}", BLOCKS, kind, **more)
        dtype = DTYPE.get(family, "float64")
        return load_model(folder, dtype=dtype), load_model(dense, dtype=dtype)

    return load


def batch() -> tuple[Tensor, Tensor]:
    """Return ids [3, 9] and a mask that pads two of the sequences on the left."""
    ids = torch.randint(5, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, :1] = 0, 0
    return ids, mask


@torch.no_grad()
def logits(model: Any, ids: Tensor, mask: Tensor | None = None, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, attention_mask=mask, **more).logits
    return found


def oracle(model: Any, dense: Any, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Return the logits of the dense model in which routed blocks run for every token, those that
    skip hand on what the routed model hands on, and nobody sees them where keys are not kept."""
    before = {}
    for path, block in model.adaptive_depth().items():
        stock = dense.get_submodule(path)
        before[stock] = stock.forward
        stock.forward = masked(block, stock, mask)
    try:
        return logits(dense, ids, mask, use_cache=False)
    finally:
        for stock, forward in before.items():
            stock.forward = forward


def masked(block: Any, stock: Any, real: Tensor | None) -> Any:
    """Return a forward of a stock block that computes all tokens and mixes."""
    spec, forward = block.adaptive_layer, stock.forward
    names = list(inspect.signature(type(stock).forward).parameters)[2:]

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        router, size = block.depth.router, x.shape[1]
        decides = router(x) if router.predictor is None else router(x) + router.predictor(x)
        ran = decides > spec["select"]["threshold"]
        ran = ran if real is None else ran & real.bool()
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if spec["kv"] == "skip":
            seen = given.get("attention_mask")
            if seen is None:
                seen = torch.ones(size, size, dtype=torch.bool).tril()[None, None]
            alone = ran[:, None, None, :] | torch.eye(size, dtype=torch.bool)
            given["attention_mask"] = (
                seen & alone
                if seen.dtype == torch.bool
                else seen.masked_fill(~alone, torch.finfo(seen.dtype).min)
            )
        weight = 1 + spec["gate"] * torch.tanh(router(x) - router.bias)[..., None]
        whole = x + weight * (forward(x, **given) - x)
        return torch.where(ran[..., None], whole, block.depth.skipped(x)).to(x.dtype)

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_open_blocks_compute_what_the_dense_model_does(made: Made, family: str, kind: str) -> None:
    model, dense = made(family, kind, start=True)
    ids, mask = batch()
    real = mask.bool()
    assert torch.allclose(
        logits(model, ids, mask)[real], logits(dense, ids, mask)[real], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_gathered_tokens_compute_what_masked_ones_do(made: Made, family: str, kind: str) -> None:
    model, dense = made(family, kind)
    ids, mask = batch()
    close = CLOSE[DTYPE.get(family, "float64")]
    for given in (None, mask):
        real = torch.ones_like(ids).bool() if given is None else given.bool()
        found = logits(model, ids, given)
        expected = oracle(model, dense, ids, given)
        assert (found - expected)[real].abs().max() <= close * expected[real].abs().max()
    with model.account() as account:
        logits(model, ids, mask)
    for layer in account.layers.values():
        assert layer.tokens == int(mask.sum())
        assert 0 < layer.run < layer.tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_is_the_full_pass(made: Made, family: str, kind: str) -> None:
    model, _ = made(family, kind)
    ids, mask = batch()
    whole, real = logits(model, ids, mask), mask.bool()
    steps, cache = [], None
    with torch.no_grad():
        for start, end in ((0, 4), (4, 6), *((at, at + 1) for at in range(6, 9))):
            out = model(
                input_ids=ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            steps.append(out.logits)
    close = CLOSE[DTYPE.get(family, "float64")]
    assert (torch.cat(steps, 1) - whole)[real].abs().max() <= close * whole[real].abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}]
)
def test_a_padded_batch_generates_what_each_prompt_does(
    made: Made, kind: str, options: dict[str, Any]
) -> None:
    model, _ = made("llama", kind)
    ids, mask = batch()
    settings = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    settings |= options
    together = model.generate(input_ids=ids, attention_mask=mask, **settings)
    for row, (own, real) in enumerate(zip(ids, mask, strict=True)):
        prompt = own[real.bool()][None]
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
        assert together[row, 9:].tolist() == alone[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_eager_attention_is_masked_too(made: Made, kind: str) -> None:
    model, dense = made("llama", kind)
    ids, _ = batch()
    for one in (model, dense):
        one.set_attn_implementation("eager")
    found, expected = logits(model, ids), oracle(model, dense, ids, None)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_change_nothing_before_them(made: Made, kind: str) -> None:
    model, _ = made("llama", kind)
    ids, _ = batch()
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 40
    assert torch.allclose(
        logits(model, ids)[:, :5], logits(model, other)[:, :5], rtol=0, atol=1e-12
    )
    with model.set_depth("capacity", capacity=0.4):
        ahead = logits(model, ids)[:, :5] - logits(model, other)[:, :5]
    assert ahead.abs().max() > 1e-6


@pytest.mark.parametrize("kind", ["skip", "skip-kv"])
def test_training_computes_what_evaluation_does(made: Made, kind: str) -> None:
    model, _ = made("llama", kind)
    ids, mask = batch()
    expected, real = logits(model, ids, mask), mask.bool()
    model.train()
    out = model(input_ids=ids, attention_mask=mask, labels=ids)
    assert torch.allclose(out.logits[real], expected[real], rtol=0, atol=1e-12)
    out.loss.backward()
    for block in model.adaptive_depth().values():
        for parameter in block.depth.parameters():
            assert torch.isfinite(parameter.grad).all()
            assert parameter.grad.abs().max() > 0


def test_training_of_mod_runs_its_capacity_and_teaches_the_router(made: Made) -> None:
    model, _ = made("llama", "mod")
    ids, mask = batch()
    model.train()
    with model.collect("depth") as seen:
        model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    for path, (one,) in seen.items():
        # halves of 6, 8 and 9 tokens, rounded up
        assert int(one.run.sum()) == 3 + 4 + 5
        assert model.get_submodule(path).depth.router.weight.grad.abs().max() > 0
        assert one.predicted.shape == one.logits.shape == (int(mask.sum()),)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_gradients_are_the_same(made: Made, kind: str) -> None:
    model, _ = made("llama", kind)
    ids, mask = batch()
    model.train()
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with model.collect("depth") as seen:
            model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
        assert all(len(passes) == 1 for passes in seen.values())
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert all(torch.allclose(found[0][n], found[1][n], rtol=0, atol=1e-12) for n in found[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_and_saved_models_decide_alike(
    made: Made, kind: str, how: str, tmp_path: Path
) -> None:
    model, _ = made("llama", kind)
    ids, mask = batch()
    if how == "save":
        model.save_pretrained(tmp_path / "again")
        other = load_model(tmp_path / "again", dtype="float64")
    else:
        other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    real = mask.bool()
    assert torch.allclose(
        logits(model, ids, mask)[real], logits(other, ids, mask)[real], rtol=0, atol=1e-12
    )


def test_routers_stay_in_float32(made: Made) -> None:
    model, _ = made("llama", "mod")
    folder = model.config._name_or_path
    low = load_model(folder, dtype="bfloat16")
    for name, parameter in low.named_parameters():
        expected = torch.float32 if ".router." in name else torch.bfloat16
        assert parameter.dtype == expected, name
    ids, mask = batch()
    assert torch.isfinite(logits(low, ids, mask)[mask.bool()]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_account_counts_what_ran(made: Made, kind: str) -> None:
    model, dense = made("llama", kind)
    ids, _ = batch()
    compute = {}
    for rule in ("all", "none"):
        with model.set_depth(rule), model.account() as account:
            logits(model, ids)
        compute[rule] = account.flops_per_token()["total"]
        assert {layer.run for layer in account.layers.values()} == {27 if rule == "all" else 0}
    block = dense.model.layers[1]
    linears = {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    keys = [n for n in linears if n.split(".")[-1] in ("q_proj", "k_proj", "v_proj")]
    gone = [m for n, m in linears.items() if kind != "skip" or n not in keys]
    config = model.config
    attention = 4 * config.num_attention_heads * config.head_dim * (9 + 1) / 2
    spared = sum(2 * m.weight.numel() for m in gone) + attention
    # an adapter in place of the block
    spared -= 0 if kind == "mod" else 4 * config.hidden_size * 4
    assert compute["all"] - compute["none"] == pytest.approx(len(BLOCKS) * spared, rel=1e-12)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "capacity", "capacity": 0}, "no token runs"),
        ({"rule": "capacity", "capacity": 1.5}, "expected a share"),
        ({"rule": "threshold"}, "expected a number"),
        ({"rule": "threshold", "threshold": float("nan")}, "expected a number"),
        ({"rule": "threshold", "threshold": {"model.layers.0": 0.0}}, "no such block"),
        ({"rule": "sometimes"}, "known: all, none, threshold, capacity"),
        ({"threshold": 0.5}, "needs a rule"),
    ],
)
def test_rules_that_mean_nothing_are_refused(
    made: Made, asked: dict[str, Any], message: str
) -> None:
    model, dense = made("llama")
    with pytest.raises(AdaptiveConfigError, match=message):
        model.set_depth(**asked)
    with pytest.raises(AttributeError):
        dense.set_depth("all")


def test_a_rule_holds_until_its_end(made: Made) -> None:
    model, dense = made("llama")
    ids, _ = batch()
    before = logits(model, ids)
    with model.set_depth("all"):
        assert torch.equal(logits(model, ids), logits(dense, ids))
    assert torch.equal(logits(model, ids), before)
    with model.set_compute(1.0):
        assert torch.equal(logits(model, ids), logits(dense, ids))
    with pytest.raises(ValueError, match="calibrate"):
        model.set_compute(0.5)


def test_a_number_for_all_blocks_brings_back_none_that_nobody_runs(made: Made) -> None:
    model, _ = made("llama")
    first, second = model.adaptive_depth().values()
    kept = dict(first.adaptive_layer)
    first.__dict__["adaptive_layer"] = {**kept, "select": {"rule": "none"}}
    ids, _ = batch()
    try:
        for rule, value in (("threshold", -1e9), ("capacity", 1.0)):
            with model.set_depth(rule, **{rule: value}), model.account() as account:
                logits(model, ids)
            run = {path: layer.run for path, layer in account.layers.items()}
            assert run == {
                first.adaptive_layer_path: 0,
                second.adaptive_layer_path: ids.numel(),
            }
    finally:
        first.__dict__["adaptive_layer"] = kept


def test_the_smallest_capacity_lets_one_token_run() -> None:
    run = _best(torch.tensor([[0.1, 0.3, 0.2]]), 1e-12, None)
    assert run.tolist() == [[False, True, False]]
