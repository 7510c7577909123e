"""Early exits as data: where they lie, and the tensors they have, as the runtime has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adaconvert.arch import exits
from adaconvert.arch.registry import describe, supported
from adaconvert.errors import SourceError
from adaconvert.methods.sources import open_source
from adaconvert.testing.exits_by_hand import KINDS, PLACES, exits_of
from adaconvert.testing.tiny_models import config_values, make

MIXTURES = [
    family
    for family in supported()
    if describe({"model_type": family, **config_values(family)}).num_experts
]
ARCHITECTURES = {"bert": "BertForSequenceClassification", "vit": "ViTForImageClassification"}


def spec_of(family: str, **more: Any) -> Any:
    """Return the description of a tiny model of a family, with a head to leave by."""
    named = {"architectures": [ARCHITECTURES[family]]} if family in ARCHITECTURES else {}
    return describe({"model_type": family, **config_values(family), **named, **more})


@pytest.mark.parametrize("family", PLACES)
def test_places_are_those_of_the_modules(family: str) -> None:
    blocks, tail, network = PLACES[family]
    spec = spec_of(family)
    found = exits.places_of(spec)
    assert (found.blocks, dict(found.tail)) == (blocks, tail)
    sparse = family in MIXTURES
    assert set(found.networks.values()) == ({network} - {None} if not sparse else set())
    assert found.kind == exits_of(family, [1])["kind"]


def test_kinds_are_those_of_the_runtime() -> None:
    assert dict(exits.KINDS) == KINDS


@pytest.mark.parametrize("family", [f for f in PLACES if f not in MIXTURES])
@pytest.mark.parametrize("kind", ["norm", "full"])
def test_tensors_are_those_of_the_modules(family: str, kind: str, tmp_path: Path) -> None:
    import transformers

    from adaconvert.modeling.adaptive_exits import fill_exits

    kind = "layer" if (family, kind) == ("bert", "full") else kind
    named = {"architecture": ARCHITECTURES[family]} if family in ARCHITECTURES else {}
    folder = make(family, tmp_path / "dense", layers=3, **named)  # type: ignore[arg-type]
    spec = open_source(str(folder)).spec
    content = exits_of(family, [1, 2], kind)
    found = {made.tensor.name: made.tensor.shape for made in exits.exit_tensors(spec, content)}
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, spec.architecture)(config)
    fill_exits(model, content)
    shapes = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name.startswith("exits.")
    }
    if family == "vit":
        # its blocks are called otherwise in files, here too
        found, shapes = (
            {n: s for n, s in x.items() if ".block." not in n} for x in (found, shapes)
        )
    assert found == shapes


@pytest.mark.parametrize("at", [2, 3])
def test_no_exit_lies_behind_the_last_block(at: int, tmp_path: Path) -> None:
    import transformers

    from adaconvert.modeling.adaptive_checks import AdaptiveConfigError
    from adaconvert.modeling.adaptive_exits import fill_exits

    content = exits_of("llama", [1, at])
    with pytest.raises(SourceError, match=f"has an exit after {at} blocks.*expected 1 to 1"):
        list(exits.exit_tensors(spec_of("llama"), content))
    folder = make("llama", tmp_path / "dense")
    config = transformers.AutoConfig.from_pretrained(folder)
    with pytest.raises(AdaptiveConfigError, match=f"an exit is at {at}, .* 2 blocks: 1 to 1"):
        fill_exits(transformers.LlamaForCausalLM(config), content)


def test_a_tied_head_begins_as_the_embedding() -> None:
    spec = spec_of("llama", tie_word_embeddings=True)
    heads = [e for e in exits.exit_tensors(spec, exits_of("llama", [1])) if "head" in e.tensor.role]
    assert [made.origin for made in heads] == ["model.embed_tokens.weight"]


def test_a_model_without_an_end_is_refused() -> None:
    assert "no head whose result" in str(exits.refusal(describe_bert("BertModel")))
    assert "BertForMaskedLM has no head" in str(exits.refusal(describe_bert("BertForMaskedLM")))
    assert exits.refusal(spec_of("olmo")) is None
    spec = spec_of("llama")
    without = tuple(t for t in spec.tensors if t.role != "norm_final")
    assert exits.refusal(replace(spec, tensors=without)) == "LlamaForCausalLM has no final norm"
    without = tuple(t for t in spec.tensors if t.role != "head")
    assert exits.refusal(replace(spec, tensors=without)) == "LlamaForCausalLM has no head"


def describe_bert(architecture: str) -> Any:
    """Return the description of a tiny BERT."""
    return spec_of("bert", architectures=[architecture])


@pytest.mark.parametrize(
    ("more", "is_taken"),
    [
        ({}, False),
        ({"thresholds": [None, 0.5]}, True),
        ({"measure": "patience", "patience": 2}, False),
        ({"measure": "patience", "patience": 1}, True),
    ],
)
def test_whether_an_exit_is_taken(more: dict[str, Any], is_taken: bool) -> None:
    content = exits_of("llama", [1, 2])
    content["decide"] |= more
    assert exits.is_taken(content) is is_taken


def test_checks_are_the_matrices_of_exits_that_may_be_taken() -> None:
    content = exits_of("llama", [1, 2], "mlp", tie=True)
    content["decide"]["thresholds"] = [0.5, None]
    spec = spec_of("llama", num_hidden_layers=3)
    own = [made.tensor for made in exits.exit_tensors(spec, content)]
    made = replace(spec, tensors=(*spec.tensors, *own), adaptive={"model": {"exits": content}})
    names = [tensor.name for tensor in exits.checked(made)]
    assert names == [
        *(f"exits.1.network.{part}_proj.weight" for part in ("gate", "up", "down")),
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    "broken",
    [
        {"heads": None},
        {"heads": [{"at": 0, "own": []}]},
        {"draft": {"at": 5, "vocab": None}},
        {"decide": {"thresholds": [None, None, None]}},
    ],
)
def test_what_cannot_be_read_is_refused(broken: dict[str, Any]) -> None:
    content = {**exits_of("llama", [1, 2]), **broken}
    with pytest.raises(SourceError, match=r"adaptive.model.exits is not usable"):
        exits.exits_of({"model": {"exits": content}})


def test_exits_outside_the_model_are_refused() -> None:
    with pytest.raises(SourceError, match="after 3 blocks; expected 1 to 1"):
        list(exits.exit_tensors(spec_of("llama"), exits_of("llama", [3])))


def with_site(path: str, slots: dict[str, Any]) -> Any:
    """Return the description of a tiny Llama with one adaptive site."""
    spec = spec_of("llama")
    found = {"version": 1, "sites": {path: slots}, "model": {"exits": None}}
    return replace(spec, adaptive=found)


def test_copies_that_would_compute_something_else() -> None:
    from adaconvert.arch.projections import Network

    network = Network(
        role="q", hidden=32, output=32, experts=1, width=64, up_bias=True, down_bias=True
    )
    spec = with_site("model.layers.1.self_attn.q_proj", {"linear": {"mlp": network.content()}})
    assert "q_proj, so its matrix is gone" in str(exits.uncopied(spec, 1, block=True))
    assert exits.uncopied(spec, 1, block=False) is None
    assert exits.uncopied(spec, 0, block=True) is None
    spec = with_site("model.layers.0.mlp", {"ffn": {"activation": "relu"}})
    assert "split with another activation" in str(exits.uncopied(spec, 0, block=False))
    spec = with_site("model.layers.0.mlp", {"ffn": {"activation": "silu"}})
    assert exits.uncopied(spec, 0, block=True) is None
