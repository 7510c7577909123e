"""Options of `upcycle`: what is refused, and in which words (exit code 2)."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaconvert.errors import OptionError
from adaconvert.methods.registry import make_config
from adaconvert.methods.upcycle.config import UpcycleConfig, parse_layers
from adaconvert.methods.upcycle.hidden import read_prompts, routers_from_means


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"top_k": 9}, r"--top-k: more experts per token .*expected 1 to 8, found 9"),
        ({"experts": 0}, r"--experts: must be at least 1"),
        ({"experts": 5000}, r"--experts: out of range; expected 1 to 4096"),
        ({"top_k": True}, r"--top-k: wrong type; expected int"),
        ({"experts": 8.0}, r"--experts: wrong type; expected int"),
        ({"granularity": 3, "experts": 9, "top_k": 3}, r"--granularity: .*power of two"),
        (
            {"granularity": 4, "experts": 8, "top_k": 2},
            r"--top-k: must be a multiple .*of 4, found 2",
        ),
        ({"granularity": 4, "experts": 6, "top_k": 4}, r"--experts: must be a multiple"),
        (
            {"granularity": 2, "router_init": "zeros"},
            r"--router-init: a zero router ties all groups",
        ),
        (
            {"shared_experts": "yes"},
            r"--shared-experts: unknown choice; expected none or neutral or split",
        ),
        ({"shared_width": 8}, r"--shared-width: only means something with"),
        ({"shared_width": 0, "shared_experts": "split"}, r"--shared-width: must be at least 1"),
        ({"noise": float("nan")}, r"--noise: out of range"),
        ({"drop": 1.5}, r"--drop: out of range; expected 0.0 to 1.0, found 1.5"),
        ({"dtype": "int8"}, r"--dtype: unknown choice"),
        ({"router_init": "hidden"}, r"go together"),
        ({"router_prompts": "p.txt"}, r"go together"),
        ({"num_expert": 4}, r"num_expert: unknown option"),
        ({"expert": 4}, r"Did you mean experts\?"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        make_config("upcycle", options)


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(
        OptionError, match=r"method: unknown method; expected upcycle or .*, found 'os\.system'"
    ):
        make_config("os.system", {})


def test_layers() -> None:
    assert parse_layers(None, 3) == {0, 1, 2}
    assert parse_layers("1-2, 4", 6) == {1, 2, 4}
    for text in ("", "3-1", "0-6", "6", "a", "1..2", "-1", "1,,2"):
        with pytest.raises(OptionError, match="--layers"):
            parse_layers(text, 6)


def test_defaults_are_eight_experts_top_two() -> None:
    config = UpcycleConfig()
    assert (config.experts, config.top_k, config.granularity) == (8, 2, 1)


def test_prompts_one_a_line_or_in_blocks(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n two \n")
    assert read_prompts(str(file), 2)[0] == (("one",), ("two",))
    file.write_text("a\nb\n\n\nc\n")
    assert read_prompts(str(file), 2)[0] == (("a", "b"), ("c",))
    with pytest.raises(OptionError, match="expected 3, one per full expert, found 2"):
        read_prompts(str(file), 3)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(OptionError, match="is not UTF-8"):
        read_prompts(str(file), 1)


def test_routers_from_means_prefer_their_own_prompts() -> None:
    import numpy as np

    means = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32) + 5
    routers = routers_from_means(means, 2)
    assert routers.shape == (8, 32)
    logits = means @ routers.T
    assert (logits.argmax(axis=1) // 2).tolist() == [0, 1, 2, 3]
    assert logits.std(axis=1).mean() == pytest.approx(1.0, rel=0.05)
