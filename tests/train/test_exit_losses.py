"""Losses of exits: chunks against everything at once, formulas against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from adaconvert.modeling.loading import load_model
from adaconvert.testing import tiny_models
from adaconvert.testing.exits_by_hand import by_hand
from adaconvert.train import losses
from adaconvert.train.exit_heads import OwnHeads, SharedHeads
from adaconvert.train.exit_losses import (
    Teacher,
    Wanted,
    confidence_loss,
    enabled_layers,
    exit_losses,
    predicted,
    skip_weights,
    softmax_losses,
)
from adaconvert.train.layer_dropout import LayerTaps, probabilities

KINDS = ("shared", "affine", "norm", "mlp", "layer", "full")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exits")
    dense = tiny_models.make("llama", folder / "dense", layers=4, max_shard_size="1GB")
    made = {kind: by_hand(dense, folder / kind, [1, 3], kind) for kind in KINDS}
    return {**made, "dense": dense}


def model_of(folder: Path) -> Any:
    """Return a model whose exits no longer are the copies they began as."""
    model: Any = load_model(folder)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("exits."):
                parameter += 0.05 * torch.randn_like(parameter)
    return model


def sample(vocab: int = 320) -> tuple[Tensor, Tensor]:
    """Return ids and labels, some of which do not count."""
    ids = torch.randint(5, vocab, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, 4:9] = losses.IGNORED
    return ids, labels


def plain(model: Any, ids: Tensor, labels: Tensor, wanted: Wanted) -> Tensor:
    """Return the loss from whole logits, as one would write it down."""
    states = model.exit_states(input_ids=ids)
    end = model.exit_logits(4, states[4])
    total = torch.zeros(())
    for at in {*wanted.ce, *wanted.kd}:
        logits = end if at == 4 else model.exit_logits(at, states[at])
        total = total + wanted.ce.get(at, 0.0) * losses.language_model(logits, labels)
        if at in wanted.kd:
            kd = losses.distillation(logits, end.detach(), labels, wanted.temperature)
            total = total + wanted.kd[at] * kd
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("ce", "kd"), [(1.0, 0.0), (0.3, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_the_closed_form_is_what_autograd_finds(ce: float, kd: float, temperature: float) -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(6, 50, dtype=torch.float64)).requires_grad_()
    other = 8 * torch.randn(6, 50, dtype=torch.float64)
    targets = torch.randint(50, (6,))
    found = softmax_losses(
        logits.detach(), targets, Teacher.of(other, temperature), ce, kd, learns=True
    )
    lost = functional.cross_entropy(logits, targets, reduction="sum")
    ours, theirs = (logits / temperature).log_softmax(-1), (other / temperature).log_softmax(-1)
    apart = functional.kl_div(ours, theirs, log_target=True, reduction="sum") * temperature**2
    (grad,) = torch.autograd.grad(ce * lost + kd * apart, logits)
    torch.testing.assert_close(found.ce, lost.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.grad, grad, rtol=0, atol=1e-13)
    if kd:
        torch.testing.assert_close(found.kd, apart.detach(), rtol=1e-12, atol=0)
    else:
        assert found.kd is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("trunk", [True, False])
def test_chunks_give_the_losses_and_gradients_of_everything_at_once(
    kind: str, trunk: bool, sources: dict[str, Path]
) -> None:
    if kind == "shared" and not trunk:
        pytest.skip("nothing learns")
    model = model_of(sources[kind])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trunk or name.startswith("exits."))
    ids, labels = sample()
    ce = {1: 0.3, 3: 0.7, **({4: 1.0} if trunk else {})}
    wanted = Wanted(end=4, ce=ce, kd={1: 0.5, 3: 1.5}, temperature=2.0, compare=True, chunk=7)
    expected = plain(model, ids, labels, wanted)
    expected.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    heads = OwnHeads(model)
    states, targets = predicted(heads.states({"input_ids": ids}, (1, 3)), labels)
    found = exit_losses(heads.logits, states, targets, wanted, heads.tail())
    # what comes after must not forget the factor
    (3 * found.total).backward()
    assert float(found.total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        if grads[name] is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad, 3 * grads[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        all_states = model.exit_states(input_ids=ids)
        ours = model.exit_logits(1, all_states[1])[:, :-1].argmax(-1)
        theirs = model(input_ids=ids).logits[:, :-1].argmax(-1)
    counted = labels[:, 1:] != losses.IGNORED
    assert torch.equal(found.agrees[1], (ours == theirs)[counted])


def test_whole_logits_are_never_there(sources: dict[str, Path]) -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = function(*args, **(kwargs or {}))
            # weights have d columns, logits V
            if isinstance(out, Tensor) and out.dim() > 1 and out.shape[-1] == 320:
                self.rows = max(self.rows, out.numel() // 320)
            return out

    model = model_of(sources["mlp"])
    heads, (ids, labels) = OwnHeads(model), sample()
    wanted = Wanted(end=4, ce={1: 1.0, 3: 1.0, 4: 1.0}, kd={1: 1.0}, compare=True, chunk=6)
    with Largest() as seen:
        states, targets = predicted(heads.states({"input_ids": ids}, (1, 3)), labels)
        found = exit_losses(heads.logits, states, targets, wanted, heads.tail())
        found.total.backward()
    # a matrix of 32 columns turned round has 32 rows of V
    assert 6 <= seen.rows <= 32 < len(targets)


def test_bf16_casts_keep_their_gradients(sources: dict[str, Path]) -> None:
    model = model_of(sources["norm"])
    heads, (ids, labels) = OwnHeads(model), sample()
    grads = []
    for chunk in (5, 100):
        model.zero_grad()
        wanted = Wanted(end=4, ce={1: 1.0, 4: 1.0}, kd={1: 1.0}, chunk=chunk)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            states, targets = predicted(heads.states({"input_ids": ids}, (1,)), labels)
            found = exit_losses(heads.logits, states, targets, wanted, heads.tail())
        found.total.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert "lm_head.weight" in grads[0]
    assert "exits.1.head.weight" in grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gpt2", "gpt_neox", "granite", "phi3"])
def test_a_stock_model_exits_through_its_own_head(family: str, tmp_path: Path) -> None:
    from adaconvert.arch.exits import places_of
    from adaconvert.methods.sources import open_source

    folder = tiny_models.make(family, tmp_path / "src")
    model: Any = load_model(folder)
    where = places_of(open_source(str(folder)).spec)
    taps = LayerTaps(model.get_submodule(where.blocks), 0.0, 0)
    heads = SharedHeads(model, where.blocks, where.tail, taps, [1])
    ids, _ = sample(256)
    with torch.no_grad():
        states = heads.states({"input_ids": ids}, [1])
        end = heads.logits(2, states[2].flatten(0, 1))
        first = heads.logits(1, states[1].flatten(0, 1))
        whole = model(input_ids=ids).logits
    torch.testing.assert_close(end, whole.flatten(0, 1), rtol=1e-5, atol=1e-5)
    fresh: Any = load_model(folder)
    kept = fresh.get_submodule(where.blocks)
    del kept[1]
    with torch.no_grad():
        cut = fresh(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(first, cut.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_weights_of_layerskip() -> None:
    # L = 5, e_scale 0.2: e = 0, .2, .6, 1.2 and 4 + .2 (0 + 1 + 2 + 3)
    found = skip_weights(5, 0.2, [True] * 5)
    total = 0.2 + 0.6 + 1.2 + 5.2
    assert found == pytest.approx({2: 0.2 / total, 3: 0.6 / total, 4: 1.2 / total, 5: 5.2 / total})
    some = skip_weights(5, 0.2, [False, True, False, True, True], chosen=[4])
    assert some == pytest.approx({4: 1.2 / 6.4, 5: 5.2 / 6.4})
    assert skip_weights(1, 0.2, [True]) == {1: 1.0}


def test_curricula_of_layerskip() -> None:
    def on(*curriculum: Any, step: int) -> list[int]:
        found = enabled_layers(*curriculum, 6, step, 10)
        return [layer for layer, enabled in enumerate(found) if enabled]

    assert on("none", 1, step=0) == [0, 1, 2, 3, 4, 5]
    assert [on("rotational:3", 3, step=s) for s in range(4)] == [
        [0, 3, 5],
        [1, 4, 5],
        [2, 5],
        [0, 3, 5],
    ]
    assert on("gradual", 1, step=0) == [5]
    assert on("gradual", 1, step=2) == [3, 4, 5]
    assert all(on("gradual", 1, step=s) == [0, 1, 2, 3, 4, 5] for s in (5, 9))


def test_layer_dropout_follows_its_formula_and_its_seed() -> None:
    assert probabilities(4, 0.5) == pytest.approx([0, 0.5 * (2 ** (1 / 3) - 1), 0.2937, 0.5], 1e-3)
    blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))
    taps, again = (LayerTaps(blocks, 0.5, seed=7) for _ in range(2))
    drawn = torch.stack([taps.draw(200, step) for step in range(20)]).float().mean((0, 1))
    # a share of 4,000 draws is this sure to half a percent
    assert (1 - drawn).tolist() == pytest.approx(probabilities(4, 0.5), abs=0.03)
    # a resumed run draws what it would have drawn
    first = [taps.draw(8, 19) for _ in range(2)]
    again.draw(200, 19)
    assert torch.equal(first[0], again.draw(8, 19))
    assert not torch.equal(taps.draw(8, 5), taps.draw(8, 6))


def test_a_block_is_left_out_of_some_sequences_and_only_while_training() -> None:
    block = torch.nn.Linear(4, 4)
    first = torch.nn.Identity()
    taps = LayerTaps([first, block], 1.0, seed=0)
    x = torch.randn(6, 3, 4)
    kept = taps.draw(6, 0)
    assert not kept[:, 1].any()
    taps.watch([2])
    assert torch.equal(block(x), x)
    assert torch.equal(taps.states[2], x)
    block.eval()
    assert torch.equal(block(x), functional.linear(x, block.weight, block.bias))


def test_both_answers_of_a_classifier_weigh_half() -> None:
    logits = torch.tensor([2.0, 1.0, -1.0, 0.5])
    agrees = torch.tensor([True, True, True, False])
    right = functional.softplus(-logits[:3]).mean()
    wrong = functional.softplus(logits[3])
    assert float(confidence_loss(logits, agrees)) == pytest.approx(float((right + wrong) / 2))
    alone = confidence_loss(logits[:3], agrees[:3])
    assert float(alone) == pytest.approx(float(right))
