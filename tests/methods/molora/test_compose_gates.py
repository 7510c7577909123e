"""PHATGOOSE's gates: trained with everything else frozen, the same bytes every time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from adaconvert import api
from adaconvert.data.text import documents_of
from adaconvert.errors import DataError, OptionError, ResourceError
from adaconvert.layerwise.work import WorkFolder
from adaconvert.methods.molora import gate_training, phatgoose
from adaconvert.methods.molora.compose import Composed, compose
from adaconvert.methods.molora.gate_training import GateSettings
from adaconvert.methods.molora.lora_folder import read_lora
from adaconvert.methods.sources import Described, open_source
from adaconvert.modeling.loading import load_model
from adaconvert.progress import Silent
from adaconvert.testing.loras import make_lora

Array = numpy.ndarray[Any, Any]
Dense = Callable[..., Path]
EPS = float(numpy.finfo(numpy.float32).eps)
SETTINGS = GateSettings(steps=4, length=12, batch_tokens=24, device="cpu")
TEXTS = (
    documents_of(("the quick brown fox jumps over the lazy dog. " * 6, "another one " * 9)),
    documents_of(("numbers 1 2 3 4 5 6 7 8 9, and again 9 8 7 6 5. " * 8,)),
)


@pytest.fixture(scope="module")
def item(dense: Dense) -> Described:
    return open_source(str(dense("llama")))


@pytest.fixture(scope="module")
def composed(dense: Dense, item: Described, tmp_path_factory: pytest.TempPathFactory) -> Composed:
    root, llama = tmp_path_factory.mktemp("loras"), dense("llama")
    folders = [
        make_lora(llama, root / "a", lora_alpha=4),
        make_lora(llama, root / "b", seed=1, r=2, target_modules=["q_proj", "down_proj"]),
    ]
    return compose([read_lora(folder) for folder in folders], item)


def same(left: dict[str, Array], right: dict[str, Array]) -> bool:
    return left.keys() == right.keys() and all(
        numpy.array_equal(left[path], right[path]) for path in left
    )


def looped(item: Described, composed: Composed, index: int) -> dict[str, Array]:
    """Return the gates of one adapter, trained with hooks on the stock model: equation 3."""
    model: Any = load_model(item.source.root).requires_grad_(False)
    gates: dict[str, torch.nn.Parameter] = {}
    for path in composed.paths:
        linear = model.get_submodule(path)
        a, b = (torch.from_numpy(part[index]) for part in composed.stack(path))
        gate = gates[path] = torch.nn.Parameter(torch.zeros(a.shape[1]))

        def hook(module: Any, args: Any, out: Any, *, a: Any = a, b: Any = b, v: Any = gate) -> Any:
            (x,) = args
            gated = (x @ v).sigmoid()[..., None] * (x @ a.T @ b.T)
            return out + composed.scaling[index] * gated

        linear.register_forward_hook(hook)
    optimiser = torch.optim.AdamW(gates.values(), lr=SETTINGS.learning_rate, weight_decay=0.0)
    blocks = phatgoose._blocks(item, TEXTS[index], SETTINGS)
    order = gate_training.Batches(blocks, SETTINGS, index)
    for _, rows in zip(range(SETTINGS.steps), order, strict=False):
        ids, mask = torch.from_numpy(blocks.ids[rows]), torch.from_numpy(blocks.weights[rows])
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        aims = ids.masked_fill(~mask, -100)[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), aims.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return {path: gate.detach().numpy() for path, gate in gates.items()}


def test_gates_are_those_of_a_plain_loop(item: Described, composed: Composed) -> None:
    found = phatgoose.phatgoose(composed, item, TEXTS, SETTINGS)
    assert tuple(found) == composed.paths
    for index in range(2):
        for path, expected in looped(item, composed, index).items():
            gate = found[path][index]
            if path not in composed.adapters[index].modules:
                assert not gate.any()
                continue
            assert numpy.linalg.norm(expected) > 1e-3
            # Adam divides by the size of a gradient: what is rounded there is not small here
            assert numpy.linalg.norm(gate - expected) <= 2**12 * EPS * numpy.linalg.norm(expected)


def test_the_same_bytes_again_and_after_an_interruption(
    item: Described, composed: Composed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_training, "_KEPT_EVERY", 2)
    whole = phatgoose.phatgoose(composed, item, TEXTS, SETTINGS)
    assert same(whole, phatgoose.phatgoose(composed, item, TEXTS, SETTINGS))
    other = replace(SETTINGS, seed=1)
    assert not same(whole, phatgoose.phatgoose(composed, item, TEXTS, other))
    digest = phatgoose.run_digest(composed, item, TEXTS, SETTINGS)
    step = gate_training.Training._step

    def stopped(self: Any, number: int, rows: Array) -> None:
        if self._name == "b" and number == 3:
            raise KeyboardInterrupt
        step(self, number, rows)

    with monkeypatch.context() as patch:
        patch.setattr(gate_training.Training, "_step", stopped)
        work = WorkFolder(tmp_path / "work", digest)
        with pytest.raises(KeyboardInterrupt):
            phatgoose.phatgoose(composed, item, TEXTS, SETTINGS, work=work)
    steps: list[tuple[str, int]] = []

    def counted(self: Any, number: int, rows: Array) -> None:
        steps.append((self._name, number))
        step(self, number, rows)

    monkeypatch.setattr(gate_training.Training, "_step", counted)
    work = WorkFolder(tmp_path / "work", digest)
    assert same(whole, phatgoose.phatgoose(composed, item, TEXTS, SETTINGS, work=work))
    assert steps == [("b", 2), ("b", 3)]
    with pytest.raises(OptionError, match="belongs to another run"):
        WorkFolder(tmp_path / "work", phatgoose.run_digest(composed, item, TEXTS, other))


def test_digest_is_of_all_that_gates_depend_on(item: Described, composed: Composed) -> None:
    digests = {
        phatgoose.run_digest(composed, item, TEXTS, SETTINGS),
        phatgoose.run_digest(composed, item, TEXTS[::-1], SETTINGS),
        phatgoose.run_digest(composed, item, TEXTS, replace(SETTINGS, steps=5)),
        phatgoose.run_digest(replace(composed, mean=True), item, TEXTS, SETTINGS),
    }
    assert len(digests) == 4
    other = replace(SETTINGS, device="auto")
    assert phatgoose.run_digest(composed, item, TEXTS, other) in digests


def test_a_trained_gate_lowers_the_loss(item: Described, composed: Composed) -> None:
    # the adapters are random, so the best gate shuts them
    settings = replace(SETTINGS, steps=60, learning_rate=5e-2)
    model = phatgoose._model(composed, item)
    phatgoose._place(model, composed, 0)
    blocks = phatgoose._blocks(item, TEXTS[0], settings)
    ids, mask = torch.from_numpy(blocks.ids), torch.from_numpy(blocks.weights)
    labels = ids.masked_fill(~mask, -100)

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss)

    before = loss()
    gate_training.Training(model, blocks, settings, 0, "a").trained(Silent(), None)
    assert loss() < before - 0.1


def test_only_gates_move(item: Described, composed: Composed) -> None:
    model = phatgoose._model(composed, item)
    phatgoose._place(model, composed, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = phatgoose._blocks(item, TEXTS[1], SETTINGS)
    gate_training.Training(model, blocks, SETTINGS, 1, "b").trained(Silent(), None)
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    own = composed.adapters[1].modules
    assert moved == {f"{path}.router.weight" for path in own}


def test_rows_are_standardised() -> None:
    gates = numpy.random.Generator(numpy.random.Philox(0)).standard_normal((3, 40))
    gates = gates.astype(numpy.float32)
    gates[2] = 0
    rows = phatgoose.router_rows(gates)
    wide = torch.from_numpy(gates).double()
    expected = torch.nn.functional.layer_norm(wide, (40,)).numpy() / 40**0.5
    assert rows.dtype == numpy.float32
    assert numpy.linalg.norm(rows - expected) <= EPS * numpy.linalg.norm(expected)
    assert not rows[2].any()


def test_short_and_missing_texts(item: Described, composed: Composed, tmp_path: Path) -> None:
    few = (documents_of(("a b c",)), documents_of(("one two three four",)))
    found = phatgoose.phatgoose(composed, item, few, SETTINGS)
    assert all(numpy.isfinite(gate).all() for gate in found.values())
    with pytest.raises(OptionError, match="one text for each adapter; expected 2, found 1"):
        phatgoose.phatgoose(composed, item, TEXTS[:1], SETTINGS)
    empty = documents_of(("",))
    with pytest.raises(DataError, match="no document has two tokens"):
        phatgoose.phatgoose(composed, item, (empty, empty), SETTINGS)


def test_models_that_have_no_such_loss(dense: Dense, tmp_path: Path) -> None:
    bert = dense("bert")
    item = open_source(str(bert))
    folder = make_lora(bert, tmp_path / "one", target_modules=["query"])
    composed = compose([read_lora(folder)], item)
    with pytest.raises(OptionError, match=r"found model_type bert\. Choose --routing arrow"):
        phatgoose.phatgoose(composed, item, TEXTS[:1], SETTINGS)


def test_memory_that_does_not_suffice(
    item: Described, composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(phatgoose, "available_memory", lambda: 1000)
    with pytest.raises(ResourceError, match=r"loaded in float32 to train gates; expected .*of mem"):
        phatgoose.phatgoose(composed, item, TEXTS, SETTINGS)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3", "mixtral", "gemma2"])
def test_other_families(family: str, dense: Dense, tmp_path: Path) -> None:
    source = dense(family)
    item = open_source(str(source))
    # PEFT takes the experts of a mixture for linears too
    wanted = "all-linear" if family != "mixtral" else ["q_proj", "o_proj"]
    folder = make_lora(source, tmp_path / "one", target_modules=wanted)
    composed = compose([read_lora(folder)], item)
    found = phatgoose.phatgoose(composed, item, TEXTS[:1], replace(SETTINGS, steps=2))
    assert all(gate.any() for gate in found.values())


def test_a_model_that_is_adaptive_already(dense: Dense, tmp_path: Path) -> None:
    llama, split = dense("llama"), tmp_path / "split"
    api.convert(llama, destination=split, method="moefy", num_experts=4, verify=False)
    folder = make_lora(llama, tmp_path / "one")
    found = {}
    for source in (llama, split):
        item = open_source(str(source))
        composed = compose([read_lora(folder)], item)
        found[source] = phatgoose.phatgoose(composed, item, TEXTS[:1], SETTINGS)
    # every expert runs, so the split model computes what the dense one does
    for path, gate in found[llama].items():
        limit = 2**14 * EPS * numpy.linalg.norm(gate)
        assert numpy.linalg.norm(found[split][path] - gate) <= limit
